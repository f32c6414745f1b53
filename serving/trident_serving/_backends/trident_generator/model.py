"""Text generation with continuous batching: text in, text out. See `trident_serving.generation`."""

import sys

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import onnx_runtime, text, triton_adapter
from trident_serving.schema.limits import GenerationLimits
from trident_serving.schema.reading import read_texts
from trident_serving.triton_metrics import Publisher


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        self.config = config = triton_adapter.model_config(args)
        parameters = triton_adapter.parameters(config)
        onnx_runtime.choose(parameters.get("device", "cpu"))
        # Imports onnxruntime: the one that was chosen.
        from trident_serving.generation.service import GenerationService

        limits = read_texts(GenerationLimits, parameters)
        name, version = args["model_name"], args["model_version"]
        unloading = triton_adapter.unloading(pb_utils, name, version)
        device = int(args["model_instance_device_id"])
        self.service = GenerationService(triton_adapter.version_folder(args), limits, unloading, device)
        self.publisher = Publisher(pb_utils, self.service.recorder, {"model": name, "version": version})
        # Not through Triton's logger, whose level hides it: this is how one sees what limits cost.
        print(
            f"trident: {name}: {limits.slots} slots of {limits.context} tokens; {self.service.memory}",
            file=sys.stderr,
            flush=True,
        )
        self.process.start(self.service.steps, self.service.busy)

    def execute(self, requests):
        for request in requests:
            channel = Channel(triton_adapter.Responder(pb_utils, request, self.process))
            try:
                triton_adapter.check_admission(request, self.process)
                timeout = triton_adapter.timeout(request, self.config)
                self.service.submit(self.service.parse(triton_adapter.inputs(request), timeout), channel)
            except Exception as error:
                channel.fail(error)

    def finalize(self):
        self.service.stop()
        self.publisher.stop()
        self.process.stop()


class Channel:
    """A `ResponseChannel` over Triton's response sender."""

    def __init__(self, responder):
        self.responder = responder

    def is_cancelled(self):
        return self.responder.is_cancelled()

    def send(self, chunk):
        reason = chunk.finish_reason
        tensors = {
            "text_output": text.encode_texts([chunk.text]),
            "finish_reason": text.encode_texts([reason.value if reason else ""]),
            "num_input_tokens": np.array([chunk.num_input_tokens], np.int32),
            "num_output_tokens": np.array([chunk.num_output_tokens], np.int32),
            "output_log_probs": np.array([token.chosen for token in chunk.log_probs], np.float32),
            "output_top_token_ids": np.array([[i for i, _ in token.top] for token in chunk.log_probs], np.int32),
            "output_top_log_probs": np.array([[p for _, p in token.top] for token in chunk.log_probs], np.float32),
        }
        if not any(token.top for token in chunk.log_probs):
            del tensors["output_top_token_ids"], tensors["output_top_log_probs"]
        batch = {name: tensor[None] for name, tensor in tensors.items()}
        self.responder.send(triton_adapter.response(pb_utils, batch), final=reason is not None)

    def fail(self, error):
        self.responder.send(triton_adapter.stream_error(pb_utils, error), final=True)
