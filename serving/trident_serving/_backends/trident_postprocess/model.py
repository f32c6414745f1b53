"""Postprocess stage of an ensemble: the model's tensors in, the answer out. See `trident_serving.encoders`."""

import triton_python_backend_utils as pb_utils

from trident_serving import triton_adapter
from trident_serving.encoders import task_of


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        parameters = triton_adapter.parameters(triton_adapter.model_config(args))
        self.postprocess = task_of(parameters).postprocess(triton_adapter.version_folder(args), parameters)
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [triton_adapter.answer(pb_utils, self.postprocess, request) for request in requests]

    def finalize(self):
        self.process.stop()
