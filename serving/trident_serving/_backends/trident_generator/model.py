"""Text generation with continuous batching: text in, text out. See `trident_serving.generation`."""

import sys

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import onnx_runtime, text
from trident_serving.schema.limits import GenerationLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.triton import adapter
from trident_serving.triton.metrics import Publisher


class TritonPythonModel:
    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.config = config = adapter.model_config(args)
        parameters = adapter.parameters(config)
        onnx_runtime.choose(parameters.get("device", "cpu"))
        # Imports the onnxruntime that was chosen.
        from trident_serving.generation.service import GenerationService

        limits = read_parameters(GenerationLimits, parameters)
        name, version = args["model_name"], args["model_version"]
        unloading = adapter.unloading(pb_utils, name, version)
        device = int(args["model_instance_device_id"])
        self.service = GenerationService(adapter.version_folder(args), limits, unloading, device)
        self.publisher = Publisher(pb_utils, self.service.recorder, {"model": name, "version": version})
        # Not through Triton's logger, whose level would hide the line. It shows the memory that the limits take.
        drafted = f", drafted by {self.service.draft_name}" if self.service.draft_name else ""
        print(
            f"trident: {name}: {limits.slots} slots of {limits.context} tokens{drafted}; {self.service.memory}",
            file=sys.stderr,
            flush=True,
        )
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
    """A `ResponseChannel` over Triton's response sender."""

    streams = True

    def tensors(self, chunk):
        answers = [chunk, *chunk.others]
        reasons = [answer.finish_reason.value if answer.finish_reason else "" for answer in answers]
        log_probs = [token for answer in answers for token in answer.log_probs]
        tensors = {
            "text_output": text.encode_texts([answer.text for answer in answers]),
            "finish_reason": text.encode_texts(reasons),
            "index": np.array([answer.index for answer in answers], np.int32),
            "num_input_tokens": np.array([chunk.num_input_tokens], np.int32),
            "num_output_tokens": np.array([answer.num_output_tokens for answer in answers], np.int32),
            "output_log_probs": np.array([token.chosen for token in log_probs], np.float32),
            **likeliest("output", log_probs, chunk.spell),
        }
        if chunk.spell is not None:
            tensors |= told("output", [token for answer in answers for token in answer.token_ids], chunk.spell, "ids")
        if chunk.prompt_ids:
            tensors |= told("prompt", chunk.prompt_ids, chunk.spell)
        if chunk.prompt_log_probs:
            tensors["prompt_log_probs"] = np.array([token.chosen for token in chunk.prompt_log_probs], np.float32)
            tensors |= likeliest("prompt", chunk.prompt_log_probs, chunk.spell)
        for name in ("reasoning", "tool_calls"):
            if getattr(chunk, name) is not None:
                tensors[name] = text.encode_texts([getattr(answer, name) for answer in answers])
        # Texts are [answers], without the batch, as the TensorRT-LLM backend sends them: LlamaIndex iterates over them.
        return {name: tensor if name == "text_output" else tensor[None] for name, tensor in tensors.items()}

    def is_last(self, chunk):
        return chunk.final


def told(name, ids, spell, kind="token_ids"):
    """The tensors of tokens, with their bytes where these were asked for."""
    tensors = {f"{name}_{kind}": np.array(ids, np.int32)}
    if spell is not None:
        tensors[f"{name}_tokens"] = np.array([spell(token) for token in ids], np.object_)
    return tensors


def likeliest(name, tokens, spell):
    """The tensors of the likeliest tokens, if they were asked for."""
    if not any(token.top for token in tokens):
        return {}
    tensors = {
        f"{name}_top_token_ids": np.array([[i for i, _ in token.top] for token in tokens], np.int32),
        f"{name}_top_log_probs": np.array([[p for _, p in token.top] for token in tokens], np.float32),
    }
    if spell is not None:
        tensors[f"{name}_top_tokens"] = np.array([[spell(i) for i, _ in token.top] for token in tokens], np.object_)
    return tensors
