"""Translation and summarization with an encoder-decoder model: text in, text out. See `trident_serving.seq2seq`."""

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import text
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.seq2seq.service import Seq2SeqService
from trident_serving.triton import adapter
from trident_serving.triton.engine_model import EngineModel


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


class TritonPythonModel(EngineModel):
    api, limits, channel = pb_utils, Seq2SeqLimits, Channel

    def make_service(self, args, limits, unloading):
        return Seq2SeqService(adapter.version_folder(args), limits, unloading)
