"""Translation and summarization with an encoder-decoder model: text in, text out. See `trident_serving.seq2seq`."""

import sys

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import text, triton_adapter
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.schema.reading import read_texts
from trident_serving.seq2seq.service import Seq2SeqService
from trident_serving.triton_metrics import Publisher


class TritonPythonModel:
    def initialize(self, args):
        self.process = triton_adapter.setup(pb_utils, args)
        self.config = config = triton_adapter.model_config(args)
        limits = read_texts(Seq2SeqLimits, triton_adapter.parameters(config))
        name, version = args["model_name"], args["model_version"]
        unloading = triton_adapter.unloading(pb_utils, name, version)
        self.service = Seq2SeqService(triton_adapter.version_folder(args), limits, unloading)
        self.publisher = Publisher(pb_utils, self.service.recorder, {"model": name, "version": version})
        print(f"trident: {name}: {limits.slots} slots; {self.service.memory}", file=sys.stderr, flush=True)
        self.process.start(self.service.steps, self.service.busy)

    def execute(self, requests):
        for request in requests:
            channel = Channel(triton_adapter.Responder(pb_utils, request, self.process))
            try:
                triton_adapter.check_admission(request, self.process)
                timeout = triton_adapter.timeout(request, self.config)
                checked = self.service.parse(triton_adapter.inputs(request), timeout)
                self.service.submit(checked, channel)
            except Exception as error:
                channel.fail(error)

    def finalize(self):
        self.service.stop()
        self.publisher.stop()
        self.process.stop()


class Channel:
    """A `ReplyChannel` over Triton's response sender."""

    def __init__(self, responder):
        self.responder = responder

    def is_cancelled(self):
        return self.responder.is_cancelled()

    def send(self, reply):
        tensors = {
            "text_output": text.encode_texts([reply.text]),
            "finish_reason": text.encode_texts([reply.finish_reason]),
            "num_input_tokens": np.array([reply.num_input_tokens], np.int32),
            "num_output_tokens": np.array([reply.num_output_tokens], np.int32),
            "output_log_probs": np.array(reply.log_probs, np.float32),
            "sequence_scores": np.array(reply.scores, np.float32),
        }
        self._send(triton_adapter.response(pb_utils, {name: tensor[None] for name, tensor in tensors.items()}))

    def fail(self, error):
        self._send(triton_adapter.response(pb_utils, error))

    def _send(self, response):
        self.responder.send(response, final=True)
