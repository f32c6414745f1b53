"""Speech recognition with Whisper: an audio file in, text and segments out. See `trident_serving.speech`."""

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import text
from trident_serving.schema.limits import SpeechLimits
from trident_serving.speech import audio
from trident_serving.speech.service import SpeechService
from trident_serving.triton import adapter
from trident_serving.triton.engine_model import EngineModel


class Channel(adapter.Responder):
    """A `ReplyChannel` over Triton's response sender."""

    streams = True

    def is_last(self, reply):
        return bool(reply.finish_reason)

    def tensors(self, reply):
        segments = [segment for segment, _ in reply.segments]
        tensors = {
            "text_output": text.encode_texts([reply.text]),
            "finish_reason": text.encode_texts([reply.finish_reason]),
            "language": text.encode_texts([reply.language]),
            "duration": np.array([reply.duration], np.float32),
            "num_output_tokens": np.array([reply.count], np.int32),
            "output_ids": np.array(reply.tokens, np.int32),
            "segment_text": text.encode_texts([found for _, found in reply.segments]),
            "segment_start": np.array([each.start for each in segments], np.float32),
            "segment_end": np.array([each.end for each in segments], np.float32),
            "segment_tokens": np.array([len(each.tokens) for each in segments], np.int32),
            "segment_log_prob": np.array([each.log_prob for each in segments], np.float32),
            "segment_no_speech": np.array([each.no_speech for each in segments], np.float32),
        }
        return {name: tensor[None] for name, tensor in tensors.items()}


class TritonPythonModel(EngineModel):
    api, limits, channel = pb_utils, SpeechLimits, Channel

    def make_service(self, args, limits, unloading):
        audio.silence()
        return SpeechService(adapter.version_folder(args), limits, unloading)
