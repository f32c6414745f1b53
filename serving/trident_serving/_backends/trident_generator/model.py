"""Text generation with continuous batching: text in, text out. See `trident_serving.generation`."""

import sys

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import onnx_runtime, text
from trident_serving.schema.limits import GenerationLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.triton import adapter
from trident_serving.triton.metrics import Publisher


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.config = config = adapter.model_config(args)
        parameters = adapter.parameters(config)
        onnx_runtime.choose(parameters.get("device", "cpu"))
        # Imports the onnxruntime that was chosen.
        from trident_serving.generation.service import GenerationService

        limits = read_parameters(GenerationLimits, parameters)
        name, version = args["model_name"], args["model_version"]
        unloading = adapter.unloading(pb_utils, name, version)
        device = int(args["model_instance_device_id"])
        self.service = GenerationService(adapter.version_folder(args), limits, unloading, device)
        self.publisher = Publisher(pb_utils, self.service.recorder, {"model": name, "version": version})
        # Not through Triton's logger, whose level would hide the line. It shows the memory that the limits take.
        print(
            f"trident: {name}: {limits.slots} slots of {limits.context} tokens; {self.service.memory}",
            file=sys.stderr,
            flush=True,
        )
        self.process.start(self.service.steps, self.service.busy)

    def execute(self, requests):
        adapter.submit_each(pb_utils, requests, self.process, self.submit, Channel)

    def submit(self, request, channel):
        timeout = adapter.timeout(request, self.config)
        self.service.submit(self.service.parse(adapter.inputs(request), timeout), channel)

    def finalize(self):
        self.service.stop()
        self.publisher.stop()
        self.process.stop()


class Channel(adapter.Responder):
    """A `ResponseChannel` over Triton's response sender."""

    streams = True

    def tensors(self, chunk):
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
        for name, part in (("reasoning", chunk.reasoning), ("tool_calls", chunk.tool_calls)):
            if part is not None:
                tensors[name] = text.encode_texts([part])
        return {name: tensor[None] for name, tensor in tensors.items()}

    def is_last(self, chunk):
        return chunk.finish_reason is not None
