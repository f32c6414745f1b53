"""Tokenizer stage of an ensemble: texts in, padded token ids out. See `trident_serving.encoders`."""

import triton_python_backend_utils as pb_utils

from trident_serving import triton_adapter
from trident_serving.encoders import task_of


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        config = triton_adapter.model_config(args)
        parameters = triton_adapter.parameters(config)
        self.preprocess = task_of(parameters).preprocess(triton_adapter.version_folder(args), parameters)
        self.outputs = [output["name"] for output in config["output"]]
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [triton_adapter.answer(pb_utils, self.encode, request, self.process) for request in requests]

    def finalize(self):
        self.process.stop()

    def encode(self, inputs):
        tensors = self.preprocess(inputs)
        return {name: tensors[name] for name in self.outputs}
