"""Translation and summarization with an encoder-decoder model: text in, text out. See `trident_serving.seq2seq`."""

import sys

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import text
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.seq2seq.service import Seq2SeqService
from trident_serving.triton import adapter
from trident_serving.triton.metrics import Publisher


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.config = config = adapter.model_config(args)
        limits = read_parameters(Seq2SeqLimits, adapter.parameters(config))
        name, version = args["model_name"], args["model_version"]
        unloading = adapter.unloading(pb_utils, name, version)
        self.service = Seq2SeqService(adapter.version_folder(args), limits, unloading)
        self.publisher = Publisher(pb_utils, self.service.recorder, {"model": name, "version": version})
        print(f"trident: {name}: {limits.slots} slots; {self.service.memory}", file=sys.stderr, flush=True)
        self.process.start(self.service.steps, self.service.busy)

    def execute(self, requests):
        adapter.submit_each(pb_utils, requests, self.process, self.submit, Channel)

    def submit(self, request, channel):
        timeout = adapter.timeout(request, self.config)
        self.service.submit(self.service.parse(adapter.inputs(request), timeout), channel)

    def finalize(self):
        self.service.stop()
        self.publisher.stop()
        self.process.stop()


class Channel(adapter.Responder):
    """A `ReplyChannel` over Triton's response sender."""

    def tensors(self, reply):
        tensors = {
            "text_output": text.encode_texts([reply.text]),
            "finish_reason": text.encode_texts([reply.finish_reason]),
            "num_input_tokens": np.array([reply.num_input_tokens], np.int32),
            "num_output_tokens": np.array([reply.num_output_tokens], np.int32),
            "output_log_probs": np.array(reply.log_probs, np.float32),
            "sequence_scores": np.array(reply.scores, np.float32),
        }
        return {name: tensor[None] for name, tensor in tensors.items()}
