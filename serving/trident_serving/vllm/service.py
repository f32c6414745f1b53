"""Everything that serves one causal model through vLLM; the Triton adapter only carries tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from trident_serving.artefacts import read_vllm
from trident_serving.generation.batch import Embeds
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stream import TextStream
from trident_serving.generation.text_service import TextService
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.defaults import GenerationDefaults
from trident_serving.runtime.sampling.grammars import Guide
from trident_serving.schema import reading
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import VllmLimits
from trident_serving.schema.vllm import VllmSettings
from trident_serving.vllm import interpreter, translation
from trident_serving.vllm.engine import VllmAnswer, VllmEngine
from trident_serving.vllm.process import WorkerProcess

logger = logging.getLogger(__name__)


class VllmService(TextService):
    """Parser, worker and sender of one model.

    Args:
        folder: the model's artefacts.
        settings: arguments of vLLM's engine.
        unloading: asked while requests run; once it says yes, they fail.

    Attributes:
        memory: what the cache holds, in words.

    Raises:
        LoadError: vLLM is not there, can't serve the model, or can't do what its generation config says.
    """

    memory: str
    _engine: VllmEngine

    def __init__(
        self,
        folder: Path,
        limits: VllmLimits,
        settings: VllmSettings,
        unloading: Callable[[], bool] = lambda: False,
    ) -> None:
        build = read_vllm(folder)
        translation.check_defaults(GenerationDefaults.load(folder))
        python = interpreter.find(settings.python)
        arguments = translation.engine_arguments(folder, limits, settings, build)
        recorder = Recorder()
        engine = VllmEngine(
            partial(WorkerProcess, python, arguments, limits.threads),
            slots=limits.slots,
            max_waiting=limits.max_waiting,
            recorder=recorder,
        )
        ready = engine.ready
        if ready.version != build.version:
            logger.warning(
                "the gate compared vLLM %s with Hugging Face, and %s serves: export the model again with this one",
                build.version,
                ready.version,
            )
        try:
            super().__init__(folder, limits, ready.vocabulary, unloading=unloading, recorder=recorder)
        except BaseException:
            engine.stop()
            raise
        self.memory = f"vLLM {ready.version}, {build.dtype}, KV cache of {ready.cache_tokens} tokens"
        self._engine = engine

    @property
    def worker_pid(self) -> int | None:
        """The process that computes; None while none does."""
        return self._engine.worker_pid

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """See `RequestParser.parse`; what vLLM can't do is refused."""
        request = super().parse(inputs, timeout)
        translation.check(request)
        return request

    def _queue(
        self,
        request: GenerationRequest,
        streams: Sequence[TextStream],
        guide: Guide | None,
        embeds: Embeds | None,
        since: float | None,
    ) -> None:
        ends = translation.ends(request, self._eos_token_ids)
        self._engine.submit(*(VllmAnswer(request, index, stream, ends, since) for index, stream in enumerate(streams)))


def read_settings(parameters: Mapping[str, str]) -> VllmSettings:
    """The table `[model.vllm]` from the parameters of a config.

    Raises:
        ReadingError: it says something impossible.
    """
    return reading.read(VllmSettings, json.loads(parameters.get("vllm", "{}")), "parameter 'vllm'")
