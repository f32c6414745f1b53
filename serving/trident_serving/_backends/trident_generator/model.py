"""Text generation with continuous batching: text in, text out. See `trident_serving.generation`."""

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_serving import onnx_runtime, text
from trident_serving.schema.limits import GenerationLimits
from trident_serving.triton import adapter
from trident_serving.triton.engine_model import EngineModel


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
        if chunk.findings is not None:
            tensors["guard"] = text.encode_texts([answer.findings for answer in answers])
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


def around(service, guard, limits, own_pass):
    """The service behind a guard, which is the text of the config's parameter."""
    from trident_serving.guard.asking import Models
    from trident_serving.guard.rules import Guard
    from trident_serving.guard.service import GuardedService
    from trident_serving.template_service import GrpcModel

    rules = Guard.from_json(guard)
    models = Models(rules, lambda name: GrpcModel(name, own_pass))
    return GuardedService(service, rules, models, limits.slots + limits.max_waiting)


class TritonPythonModel(EngineModel):
    api, limits, channel = pb_utils, GenerationLimits, Channel

    def make_service(self, args, limits, unloading):
        onnx_runtime.choose(limits.device)
        # Imports the onnxruntime that was chosen.
        from trident_serving.generation.service import GenerationService

        device = int(args["model_instance_device_id"])
        service = GenerationService(adapter.version_folder(args), limits, unloading, device)
        guard = adapter.parameters(self._config).get("guard")
        return around(service, guard, limits, self._process.own_pass) if guard else service

    def room(self, limits):
        drafted = f", drafted by {self._service.draft_name}" if self._service.draft_name else ""
        return f"{limits.slots} slots of {limits.context} tokens{drafted}"
