"""A task in front of a generator of this server. See `trident_serving.templates`."""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import triton_python_backend_utils as pb_utils

from trident_serving import templates, text, triton_adapter
from trident_serving.errors import DeadlineExceeded, Overloaded

OUTPUTS = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "output_log_probs"]
WATCH_SECONDS = 0.05


class TritonPythonModel:
    def initialize(self, args):
        triton_adapter.setup(pb_utils)
        self.config = triton_adapter.model_config(args)
        parameters = triton_adapter.parameters(self.config)
        self.task = templates.TemplateTask(parameters)
        self.limit = int(parameters["max_waiting"])
        self.pool = ThreadPoolExecutor(self.limit, thread_name_prefix="template")
        self.open = {}
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.watcher.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                inputs = triton_adapter.inputs(request)
                prompts = self.task.prompts(inputs)
                seconds = triton_adapter.timeout_seconds(request, self.config)
                call = Call(sender, inputs, prompts, None if seconds is None else time.monotonic() + seconds)
                with self.lock:
                    if len(self.open) >= self.limit:
                        raise Overloaded(f"{self.limit} requests are being answered already")
                    self.open[call.key] = call
                self.pool.submit(self.run, call)
            except Exception as error:
                send(sender, error)

    def finalize(self):
        self.stopping.set()
        self.pool.shutdown()
        self.watcher.join()

    def run(self, call):
        try:
            completions = [self.complete(call, prompt) for prompt in call.prompts if not call.cancelled]
            result = self.task.answer(call.prompts, completions)
        except Exception as error:
            result = error
        with self.lock:
            del self.open[call.key]
        send(call.sender, result)

    def complete(self, call, prompt):
        tensors = self.task.generator_inputs(call.inputs, prompt)
        tensors["request_key"] = text.encode_texts([call.key])[None]
        left = 0
        if call.deadline is not None:
            left = int((call.deadline - time.monotonic()) * 1e6)
            if left <= 0:
                raise DeadlineExceeded("the timeout was over before all was answered")
        for response in self.call(tensors, timeout=left):
            if response.has_error():
                raise templates.error_from(response.error().message())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if outputs:
                return templates.Completion.from_tensors(outputs)
        raise RuntimeError(f"{self.task.generator} gave no answer")

    def call(self, tensors, timeout=0):
        request = pb_utils.InferenceRequest(
            model_name=self.task.generator,
            requested_output_names=OUTPUTS,
            inputs=[pb_utils.Tensor(name, tensor) for name, tensor in tensors.items()],
            timeout=timeout,
        )
        return request.exec(decoupled=True)

    def watch(self):
        """Triton does not pass a cancellation on to the generator, so it is told by the key of the request."""
        while not self.stopping.wait(WATCH_SECONDS):
            with self.lock:
                calls = list(self.open.values())
            for call in calls:
                if call.sender.is_cancelled():
                    call.cancelled = True
                    list(self.call({"cancel_key": text.encode_texts([call.key])[None]}))


class Call:
    def __init__(self, sender, inputs, prompts, deadline):
        self.key = uuid.uuid4().hex
        self.sender = sender
        self.inputs = inputs
        self.prompts = prompts
        self.deadline = deadline
        self.cancelled = False


def send(sender, result):
    sender.send(triton_adapter.response(pb_utils, result), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
