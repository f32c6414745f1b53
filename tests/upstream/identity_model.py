"""What a model of Triton's C++ backend `identity` does: each input comes back, `execute_delay_ms` later.

`models.py` copies this file into version folders; it runs in Triton's Python backend.
"""

import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        sides = zip(config["input"], config["output"], strict=True)
        self.pairs = [(one["name"], other["name"]) for one, other in sides]
        delay = config.get("parameters", {}).get("execute_delay_ms", {"string_value": "0"})
        self.seconds = float(delay["string_value"]) / 1000

    def execute(self, requests):
        time.sleep(self.seconds)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        found = [(pb_utils.get_input_tensor_by_name(request, one), other) for one, other in self.pairs]
        return pb_utils.InferenceResponse([pb_utils.Tensor(other, one.as_numpy()) for one, other in found])
