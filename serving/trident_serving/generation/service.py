"""Everything that serves one causal model from its artefact folder; the Triton adapter only carries tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from trident_serving.artefacts import DRAFT, TOWER, read_draft
from trident_serving.errors import DoesNotFit
from trident_serving.generation import draft_model
from trident_serving.generation.answer import Job
from trident_serving.generation.batch import Embeds, SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.drafting import MAX_DRAFT
from trident_serving.generation.engine import Engine, EngineSettings
from trident_serving.generation.image_tower import ImageThread, ImageTower
from trident_serving.generation.images import ImageReader, PromptImages
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stream import TextStream
from trident_serving.generation.text_service import TextService
from trident_serving.memory import MEBIBYTE, available_bytes
from trident_serving.runtime.sampling.grammars import Guide
from trident_serving.schema.limits import GenerationLimits


@dataclass(frozen=True)
class MemoryNeeds:
    """What a model takes at most, in bytes.

    Attributes:
        weights: the files of the graph, and of the draft's.
        cache_tokens: tokens that the KV cache may hold.
        bytes_per_token: of the KV cache, and of the draft's.
        logits: the buffer for the logits, and the draft's.
        states: of all slots, beside the KV cache; 0 for most models.
    """

    weights: int
    cache_tokens: int
    bytes_per_token: int
    logits: int
    states: int = 0

    @property
    def cache(self) -> int:
        """Bytes of the KV cache, if it is full."""
        return self.cache_tokens * self.bytes_per_token

    def __str__(self) -> str:
        parts = (self.weights, self.cache, self.logits, self.states)
        weights, cache, logits, states, total = (f"{part / MEBIBYTE:.0f}" for part in (*parts, sum(parts)))
        return (
            f"{weights} MiB of weights + {cache} MiB of KV cache ({self.cache_tokens} tokens of "
            f"{self.bytes_per_token} bytes) + {f'{states} MiB of states + ' if self.states else ''}"
            f"{logits} MiB of logits = {total} MiB"
        )


def plan_memory(
    limits: GenerationLimits, decoder: OnnxDecoder, weights: int, available: int, draft: OnnxDecoder | None = None
) -> MemoryNeeds:
    """What the settings take on this machine, once the weights are loaded.

    Args:
        draft: the decoder that drafts, whose slots hold what those of the model hold.

    Raises:
        DoesNotFit: the cache can't hold a single context, or the memory that is available can't hold the cache.
    """
    decoders = [decoder] if draft is None else [decoder, draft]
    each = sum(one.cache.bytes_per_token for one in decoders)
    tokens = limits.slots * limits.context
    if limits.kv_cache_mib and each:
        tokens = min(tokens, limits.kv_cache_mib * MEBIBYTE // each)
    if tokens < limits.context:
        raise DoesNotFit(
            f"kv_cache_mib is {limits.kv_cache_mib}, but one context of {limits.context} tokens takes "
            f"{limits.context * each / MEBIBYTE:.0f} MiB: raise kv_cache_mib or lower context"
        )
    states = limits.slots * decoder.states.bytes_per_slot
    logits = limits.slots * sum(one.vocabulary_size for one in decoders) * 4
    needs = MemoryNeeds(weights, tokens, each, logits, states)
    if decoder.cache.device != "cpu":
        return needs  # a GPU's cache is taken when it is made, and fails there
    if needs.cache + needs.states + needs.logits > available:
        raise DoesNotFit(
            f"{needs}, of which all but the weights must fit into the {available / MEBIBYTE:.0f} MiB that are "
            "available: set kv_cache_mib, or lower slots or context"
        )
    return needs


class GenerationService(TextService):
    """Parser, engine and sender of one model.

    Args:
        folder: the model's artefacts.
        unloading: asked while requests run; once it says yes, they fail.
        device_id: which GPU, where the device is one.

    Attributes:
        memory: what it takes.
        draft_name: the model that drafts; "": none does.

    Raises:
        DoesNotFit: the settings take more memory than there is.
    """

    memory: MemoryNeeds
    _engine: Engine

    def __init__(
        self,
        folder: Path,
        limits: GenerationLimits,
        unloading: Callable[[], bool] = lambda: False,
        device_id: int = 0,
    ) -> None:
        decoder = OnnxDecoder(
            folder / "model.onnx",
            slots=limits.slots,
            context=limits.context,
            longest_run=max(limits.prefill_chunk, MAX_DRAFT + 1),
            threads=limits.threads,
            device=limits.device,
            device_id=device_id,
        )
        settings = read_draft(folder)
        drafting = None if settings is None else draft_model.open_decoder(folder, settings, limits, device_id)
        graphs = [file for name in ("model.onnx", f"{DRAFT}/model.onnx", TOWER) for file in folder.glob(f"{name}*")]
        weights = sum(file.stat().st_size for file in graphs)
        self.memory = plan_memory(limits, decoder, weights, available_bytes(), drafting)
        for each in (decoder,) if drafting is None else (decoder, drafting):
            each.run([SlotTokens(0, 0, [0])])  # a graph that can't run is not served
            each.release(0, 0)
        draft = None
        if settings is not None and drafting is not None:
            draft = draft_model.over_decoder(drafting, settings, limits, decoder.vocabulary_size)
        self.draft_name = "" if settings is None else settings.name
        self._images: ImageThread | None = None
        reader: ImageReader | None = None
        if limits.images:
            tower = ImageTower(folder, limits)
            tower.warm_up()
            reader = ImageReader(tower.settings, limits)
            self._images = ImageThread(tower, limits.max_waiting)
        super().__init__(folder, limits, decoder.vocabulary_size, decoder.adapters, unloading, images=reader)
        self._engine = Engine(
            decoder,
            EngineSettings(
                slots=limits.slots,
                cache_tokens=self.memory.cache_tokens,
                prefill_chunk=limits.prefill_chunk,
                max_waiting=limits.max_waiting,
                prefix_reuse=limits.prefix_reuse,
                # A draft that is refused can't be taken back from a state.
                prompt_lookup=limits.prompt_lookup and not decoder.states,
                ngram_pool=limits.ngram_pool,
                whole_prefixes=bool(decoder.states),
                original_context=decoder.original_context,
            ),
            eos_token_ids=self._eos_token_ids,
            recorder=self.recorder,
            draft=draft,
        )

    def stop(self) -> None:
        """See `TextService.stop`."""
        if self._images is not None:
            self._images.stop()
        super().stop()

    def _read_images(self, images: PromptImages) -> Future[Embeds]:
        assert self._images is not None
        return self._images.begin(images)

    def _queue(
        self,
        request: GenerationRequest,
        streams: Sequence[TextStream],
        guide: Guide | None,
        embeds: Embeds | None,
        since: float | None,
    ) -> None:
        self._engine.submit(*(_job(request, index, each, guide, embeds, since) for index, each in enumerate(streams)))


def _job(
    request: GenerationRequest,
    index: int,
    stream: TextStream,
    guide: Guide | None,
    embeds: Embeds | None,
    since: float | None,
) -> Job:
    """The job of one of a request's answers."""
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
    return Job(
        request.prompt_ids,
        sampling,
        stream,
        log_probs=request.return_log_probs,
        top_log_probs=request.top_log_probs,
        prompt_lookup=request.prompt_lookup,
        seconds=request.timeout_seconds,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        prompt_log_probs=None if index else request.prompt_log_probs,
        guide=None if guide is None else guide.copy(),
        adapter=request.adapter,
        submitted=since,
        images=() if request.images is None else request.images.begins,
        embeds=embeds,
        rope=None if request.images is None else request.images.rope,
    )
