"""First stage of an ensemble: texts or images in, what the graph reads out. See `trident_serving.encoders`."""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from trident_serving.encoders import task_of
from trident_serving.triton import adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        config = adapter.model_config(args)
        parameters = adapter.parameters(config)
        adapter.check_native_graphs(args, Path(__file__))
        self.task = task_of(parameters)
        self.preprocess = self.task.preprocess(adapter.version_folder(args), parameters)
        self.outputs = [output["name"] for output in config["output"]]
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return [adapter.answer(pb_utils, self.encode, request, self.entry(request)) for request in requests]

    def finalize(self):
        self.process.stop()

    def entry(self, request):
        """What refuses the request while the server shuts down; nothing where it is a step of one that runs."""
        return self.process if self.task.begins([tensor.name() for tensor in request.inputs()]) else None

    def encode(self, inputs):
        tensors = self.preprocess(inputs)
        return {name: tensors[name] for name in self.outputs if name in tensors}
