"""Explains the answers of another model of this server. See `trident_serving.explanation.service`."""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from trident_serving import integrity
from trident_serving.explanation.service import Explained, ExplanationService
from trident_serving.template_service import GrpcModel
from trident_serving.triton import adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.config = adapter.model_config(args)
        parameters = adapter.parameters(self.config)
        version, folders = args["model_version"], Path(args["model_repository"]).parent
        model = Explained.read(parameters, folders, version)
        for folder in model.stage_folders:
            integrity.check(folder)
        own_pass = self.process.own_pass
        self.service = ExplanationService(
            model,
            parameters,
            lambda name: GrpcModel(name, own_pass, version=version),
            adapter.unloading(pb_utils, args["model_name"], version),
        )
        self.process.start()

    def execute(self, requests):
        adapter.submit_each(pb_utils, requests, self.process, self.submit)

    def submit(self, request, channel):
        seconds = adapter.timeout_seconds(request, self.config, self.service.limits.timeout)
        self.service.submit(adapter.inputs(request), seconds, channel)

    def finalize(self):
        self.process.ends()
        self.service.stop()
        self.process.stop()
