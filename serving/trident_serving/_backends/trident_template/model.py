"""A task in front of a generator of this server. See `trident_serving.template_service`."""

import triton_python_backend_utils as pb_utils

from trident_serving import triton_adapter
from trident_serving.template_service import GrpcGenerator, TemplateService
from trident_serving.templates import TemplateTask


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        self.config = triton_adapter.model_config(args)
        task = TemplateTask(triton_adapter.parameters(self.config))
        self.timeout = task.limits.timeout
        generator = GrpcGenerator(task.limits.generator, self.process.own_pass)
        self.service = TemplateService(task, generator, task.limits.max_waiting)
        self.process.start()

    def execute(self, requests):
        for request in requests:
            channel = Channel(triton_adapter.Responder(pb_utils, request, self.process))
            try:
                triton_adapter.check_admission(request, self.process)
                seconds = triton_adapter.timeout_seconds(request, self.config, self.timeout)
                self.service.submit(triton_adapter.inputs(request), seconds, channel)
            except Exception as error:
                channel.fail(error)

    def finalize(self):
        self.service.stop()
        self.process.stop()


class Channel:
    """A `template_service.Channel` over Triton's response sender."""

    def __init__(self, responder):
        self.responder = responder

    def is_cancelled(self):
        return self.responder.is_cancelled()

    def send(self, result):
        self.responder.send(triton_adapter.response(pb_utils, result), final=True)

    def fail(self, error):
        self.responder.send(triton_adapter.response(pb_utils, error), final=True)
