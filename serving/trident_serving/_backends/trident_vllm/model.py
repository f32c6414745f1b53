"""Text generation that vLLM computes: text in, text out. See `trident_serving.vllm`."""

import triton_python_backend_utils as pb_utils

from trident_serving.schema.limits import VllmLimits
from trident_serving.triton import adapter
from trident_serving.triton.answers import AnswerResponder
from trident_serving.triton.engine_model import EngineModel
from trident_serving.triton.guarding import guarded
from trident_serving.vllm.service import VllmService, read_settings


class TritonPythonModel(EngineModel):
    api, limits, channel = pb_utils, VllmLimits, AnswerResponder

    def make_service(self, args, limits, unloading):
        settings = read_settings(adapter.parameters(self._config))
        folder = adapter.version_folder(args)
        service = VllmService(folder, limits, settings, unloading)
        return guarded(service, self._config, limits, self._process.own_pass, unloading, folder.parents[1])

    def room(self, limits):
        return f"{limits.slots} answers of {limits.context} tokens"
