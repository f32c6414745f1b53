"""Postprocess stage of an ensemble: the model's tensors in, the answer out. See `trident_serving.encoders`."""

import triton_python_backend_utils as pb_utils

from trident_serving.encoders import task_of
from trident_serving.triton import adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        parameters = adapter.parameters(adapter.model_config(args))
        self.postprocess = task_of(parameters).postprocess(adapter.version_folder(args), parameters)
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [adapter.answer(pb_utils, self.postprocess, request) for request in requests]

    def finalize(self):
        self.process.stop()
