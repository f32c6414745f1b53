"""Text generation with continuous batching: text in, text out. See `trident_serving.generation`."""

import triton_python_backend_utils as pb_utils

from trident_serving import onnx_runtime
from trident_serving.schema.limits import GenerationLimits
from trident_serving.triton import adapter
from trident_serving.triton.answers import AnswerResponder
from trident_serving.triton.engine_model import EngineModel
from trident_serving.triton.guarding import guarded


class TritonPythonModel(EngineModel):
    api, limits, channel = pb_utils, GenerationLimits, AnswerResponder

    def make_service(self, args, limits, unloading):
        onnx_runtime.choose(limits.device)
        # Imports the onnxruntime that was chosen.
        from trident_serving.generation.service import GenerationService

        device = int(args["model_instance_device_id"])
        folder = adapter.version_folder(args)
        service = GenerationService(folder, limits, unloading, device)
        return guarded(service, self._config, limits, self._process.own_pass, unloading, folder.parents[1])

    def room(self, limits):
        drafted = f", drafted by {self._service.draft_name}" if self._service.draft_name else ""
        return f"{limits.slots} slots of {limits.context} tokens{drafted}"
