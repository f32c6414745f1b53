"""Postprocess stage of an ensemble: the model's tensors in, the answer out. See `trident_serving.postprocessing`."""

import triton_python_backend_utils as pb_utils

from trident_serving import postprocessing
from trident_serving.triton import adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        config = adapter.model_config(args)
        self.postprocess = postprocessing.create(adapter.parameters(config), adapter.version_folder(args))
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [adapter.answer(pb_utils, self.postprocess, request) for request in requests]

    def finalize(self):
        self.process.stop()
