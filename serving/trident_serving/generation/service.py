"""Everything that serves one causal model from its artefact folder; the Triton adapter only carries tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.engine import Engine, Job
from trident_serving.generation.outbox import Outbox
from trident_serving.generation.request import GenerationRequest, Inputs, RequestParser
from trident_serving.generation.stream import ResponseChannel, TextStream
from trident_serving.tokenization import ChatTemplate, TextTokenizer


@dataclass(frozen=True)
class GenerationSettings:
    """The `parameters` of the model's config.pbtxt, which come from models.toml.

    Attributes:
        context: tokens of prompt and answer together.
        slots: answers that are generated at once.
        prefill_chunk: prompt tokens run in one step at most.
        max_waiting: requests that may wait for a slot.
        default_max_tokens: length of an answer where the request names none.
        threads: ONNX Runtime's intra-op threads.
    """

    context: int
    slots: int
    prefill_chunk: int
    max_waiting: int
    default_max_tokens: int
    threads: int

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> GenerationSettings:
        """Read the settings.

        Raises:
            ValueError: one is missing or is no positive integer.
        """
        values = {}
        for field in fields(cls):
            text = parameters.get(field.name, "")
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"parameter {field.name!r} must be a positive integer, found {text!r}")
            values[field.name] = int(text)
        return cls(**values)


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of the model's generation_config.json: one id, a list, or none."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ids = config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


class GenerationService:
    """Parser, engine and sender of one model."""

    def __init__(self, folder: Path, settings: GenerationSettings) -> None:
        tokenizer = TextTokenizer.load(folder)
        self._tokenizer = tokenizer
        self._eos_token_ids = read_eos_token_ids(folder)
        self._parser = RequestParser(
            tokenizer,
            ChatTemplate.load(folder),
            context=settings.context,
            default_max_tokens=settings.default_max_tokens,
        )
        decoder = OnnxDecoder(
            folder / "model.onnx", slots=settings.slots, capacity=settings.context, threads=settings.threads
        )
        self.cache_bytes = decoder.cache.nbytes
        self._outbox = Outbox()
        self._engine = Engine(
            decoder,
            eos_token_ids=self._eos_token_ids,
            prefill_chunk=settings.prefill_chunk,
            max_waiting=settings.max_waiting,
        )

    def parse(self, inputs: Inputs) -> GenerationRequest:
        """See `RequestParser.parse`."""
        return self._parser.parse(inputs)

    def submit(self, request: GenerationRequest, channel: ResponseChannel) -> None:
        """Start a request; its responses go to the channel.

        Raises:
            Overloaded: the queue is full; nothing is sent to the channel.
        """
        stream = TextStream(request, self._tokenizer, self._eos_token_ids, channel, self._outbox.notify)
        self._outbox.add(stream)
        try:
            self._engine.submit(
                Job(request.prompt_ids, request.sampling, stream, want_log_probs=request.return_log_probs)
            )
        except Exception:
            self._outbox.discard(stream)
            raise

    def stop(self) -> None:
        """End both threads; unfinished requests fail."""
        self._engine.stop()
        self._outbox.stop()
