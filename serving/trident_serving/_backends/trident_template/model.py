"""A task in front of a generator of this server. See `trident_serving.template_service`."""

import triton_python_backend_utils as pb_utils

from trident_serving.template_service import GrpcGenerator, TemplateService
from trident_serving.templates import TemplateTask
from trident_serving.triton import adapter


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.config = adapter.model_config(args)
        task = TemplateTask(adapter.parameters(self.config))
        self.timeout = task.limits.timeout
        generator = GrpcGenerator(task.limits.generator, self.process.own_pass)
        unloading = adapter.unloading(pb_utils, args["model_name"], args["model_version"])
        self.service = TemplateService(task, generator, task.limits.max_waiting, unloading)
        self.process.start()

    def execute(self, requests):
        adapter.submit_each(pb_utils, requests, self.process, self.submit)

    def submit(self, request, channel):
        seconds = adapter.timeout_seconds(request, self.config, self.timeout)
        self.service.submit(adapter.inputs(request), seconds, channel)

    def finalize(self):
        self.process.ends()
        self.service.stop()
        self.process.stop()
