"""Postprocess stage of an ensemble: the model's tensors in, the answer out. See `trident_serving.postprocessing`."""

import triton_python_backend_utils as pb_utils

from trident_serving import postprocessing, triton_adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        config = triton_adapter.model_config(args)
        self.postprocess = postprocessing.create(triton_adapter.parameters(config), triton_adapter.version_folder(args))
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [triton_adapter.answer(pb_utils, self.postprocess, request) for request in requests]

    def finalize(self):
        self.process.stop()
