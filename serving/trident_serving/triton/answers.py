"""The tensors of a response of text generation, whichever engine computed the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trident_serving import text
from trident_serving.triton import adapter

if TYPE_CHECKING:  # they import onnxruntime, and the generators' adapter chooses that later
    from trident_serving.generation.stream import Chunk
    from trident_serving.runtime.log_probabilities import TokenLogProbs

Tensors = dict[str, NDArray[Any]]
Spell = Callable[[int], bytes]


class AnswerResponder(adapter.Responder):
    """A `ResponseChannel` over Triton's response sender."""

    streams = True

    def tensors(self, answer: Chunk) -> Mapping[str, NDArray[Any]]:
        """See `Responder.tensors`."""
        answers = [answer, *answer.others]
        reasons = [each.finish_reason.value if each.finish_reason else "" for each in answers]
        log_probs = [token for each in answers for token in each.log_probs]
        tensors = {
            "text_output": text.encode_texts([each.text for each in answers]),
            "finish_reason": text.encode_texts(reasons),
            "index": np.array([each.index for each in answers], np.int32),
            "num_input_tokens": np.array([answer.num_input_tokens], np.int32),
            "num_output_tokens": np.array([each.num_output_tokens for each in answers], np.int32),
            "output_log_probs": np.array([token.chosen for token in log_probs], np.float32),
            **_likeliest("output", log_probs, answer.spell),
        }
        if answer.spell is not None:
            ids = [token for each in answers for token in each.token_ids]
            tensors |= _told("output", ids, answer.spell, "ids")
        if answer.prompt_ids:
            tensors |= _told("prompt", answer.prompt_ids, answer.spell)
        if answer.prompt_log_probs:
            tensors["prompt_log_probs"] = np.array([token.chosen for token in answer.prompt_log_probs], np.float32)
            tensors |= _likeliest("prompt", answer.prompt_log_probs, answer.spell)
        for name in ("reasoning", "tool_calls"):
            if getattr(answer, name) is not None:
                tensors[name] = text.encode_texts([getattr(each, name) for each in answers])
        if answer.findings is not None:
            tensors["guard"] = text.encode_texts([each.findings or "" for each in answers])
        # Texts are [answers], without the batch, as the TensorRT-LLM backend sends them: LlamaIndex iterates over them.
        return {name: tensor if name == "text_output" else tensor[None] for name, tensor in tensors.items()}

    def is_last(self, answer: Chunk) -> bool:
        """See `Responder.is_last`."""
        return answer.final


def _told(name: str, ids: Sequence[int], spell: Spell | None, kind: str = "token_ids") -> Tensors:
    """The tensors of tokens, with their bytes where these were asked for."""
    tensors: Tensors = {f"{name}_{kind}": np.array(ids, np.int32)}
    if spell is not None:
        tensors[f"{name}_tokens"] = np.array([spell(token) for token in ids], np.object_)
    return tensors


def _likeliest(name: str, tokens: Sequence[TokenLogProbs], spell: Spell | None) -> Tensors:
    """The tensors of the likeliest tokens, if they were asked for."""
    if not any(token.top for token in tokens):
        return {}
    tensors: Tensors = {
        f"{name}_top_token_ids": np.array([[i for i, _ in token.top] for token in tokens], np.int32),
        f"{name}_top_log_probs": np.array([[p for _, p in token.top] for token in tokens], np.float32),
    }
    if spell is not None:
        tensors[f"{name}_top_tokens"] = np.array([[spell(i) for i, _ in token.top] for token in tokens], np.object_)
    return tensors
