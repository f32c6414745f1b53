"""A generation request, checked: from the tensors of the call to what the engine runs.

Field names and types are those of Triton's TensorRT-LLM backend (see the config that
`trident_export.configs` writes), plus `messages` for the chat template. Everything but the prompt is
optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest
from trident_serving.generation.sampling import SamplingParams
from trident_serving.text import decode_texts
from trident_serving.tokenization import ChatTemplate, TextTokenizer, parse_messages

MAX_STOP_WORDS = 32
MAX_TOP_LOG_PROBS = 20
DEFAULT_TIMEOUT_SECONDS = 300.0
Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class GenerationRequest:
    """One checked request.

    Attributes:
        prompt: the text that was tokenized, after the chat template.
        prompt_ids: its tokens, at least one.
        top_log_probs: for how many of the likeliest tokens log-probabilities are returned at each position.
        include_prompt: whether the answer repeats the prompt's text.
        prompt_lookup: whether drafts may be taken from the prompt.
        timeout_seconds: the request fails once so much time is over.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_words: tuple[str, ...] = ()
    stream: bool = False
    return_log_probs: bool = False
    top_log_probs: int = 0
    include_prompt: bool = False
    prompt_lookup: bool = True
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS


class RequestParser:
    """Turns tensors into requests for one model.

    Args:
        context: tokens that prompt and answer may have together.
        default_max_tokens: length of the answer where the request names none; less where the context ends.
        timeout: seconds that a request may take, waiting included; a request may ask for less.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        chat_template: ChatTemplate | None,
        *,
        context: int,
        default_max_tokens: int,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._context = context
        self._default_max_tokens = default_max_tokens
        self._timeout = timeout

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """Check the tensors of one request, each of them [1, n].

        Args:
            timeout: the request parameter of that name, in microseconds; None or 0 where there is none.

        Raises:
            InvalidRequest: a field is missing, malformed or out of range.
        """
        prompt, prompt_ids = self._prompt(inputs)
        room = self._context - len(prompt_ids)
        max_tokens = int(scalar(inputs, "max_tokens", min(self._default_max_tokens, room)))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=int(scalar(inputs, "min_tokens", 0)),
            temperature=float(scalar(inputs, "temperature", 0.0)),
            top_k=int(scalar(inputs, "top_k", 0)),
            top_p=float(scalar(inputs, "top_p", 1.0)),
            min_p=float(scalar(inputs, "min_p", 0.0)),
            repetition_penalty=float(scalar(inputs, "repetition_penalty", 1.0)),
            presence_penalty=float(scalar(inputs, "presence_penalty", 0.0)),
            frequency_penalty=float(scalar(inputs, "frequency_penalty", 0.0)),
            seed=int(inputs["random_seed"].reshape(-1)[0]) if "random_seed" in inputs else None,
        )
        if max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {max_tokens}, but the prompt's {len(prompt_ids)} tokens leave room for {room} "
                f"in the context of {self._context}"
            )
        top_log_probs = int(scalar(inputs, "top_logprobs", 0))
        if not 0 <= top_log_probs <= MAX_TOP_LOG_PROBS:
            raise InvalidRequest(f"top_logprobs must be between 0 and {MAX_TOP_LOG_PROBS}, found {top_log_probs}")
        return GenerationRequest(
            prompt=prompt,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            stop_words=_stop_words(inputs),
            stream=bool(scalar(inputs, "stream", False)),
            return_log_probs=bool(scalar(inputs, "return_log_probs", False)) or top_log_probs > 0,
            top_log_probs=top_log_probs,
            include_prompt=not bool(scalar(inputs, "exclude_input_in_output", True)),
            prompt_lookup=bool(scalar(inputs, "prompt_lookup", True)),
            timeout_seconds=timeout_seconds(timeout, self._timeout),
        )

    def _prompt(self, inputs: Inputs) -> tuple[str, list[int]]:
        given = [name for name in ("text_input", "messages") if name in inputs]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of text_input and messages, found {' and '.join(given) or 'neither'}"
            )
        field = given[0]
        prompt = single_text(inputs, field)
        self._check_bytes(prompt, field)
        if field == "messages":
            if self._chat_template is None:
                raise InvalidRequest("messages needs a model with a chat template: send text_input instead")
            prompt = self._chat_template.render(parse_messages(prompt))
            self._check_bytes(prompt, field)
        ids = self._tokenizer.encode(prompt, add_special_tokens=field == "text_input")
        if not ids:
            raise InvalidRequest(f"{field} is empty: the model needs at least one token to go on from")
        if len(ids) >= self._context:
            raise InvalidRequest(
                f"{field} has {len(ids)} tokens, the model's context of {self._context} allows "
                f"{self._context - 1} and one generated token"
            )
        return prompt, ids

    def _check_bytes(self, text: str, field: str) -> None:
        """Refuse a hopeless text before tokenizing it: a megabyte takes half a second, which others wait."""
        longest = self._tokenizer.longest_token_bytes
        size = len(text.encode("utf-8", "surrogatepass"))
        if longest is not None and size > longest * self._context:
            raise InvalidRequest(
                f"{field} has {size} bytes, at least {-(-size // longest)} tokens, and the model's context "
                f"is {self._context} tokens"
            )


def timeout_seconds(value: object, limit: float) -> float:
    """Triton's request parameter `timeout`, in microseconds, where 0 means none; at most the model's limit.

    Args:
        value: the parameter; None where there is none.
        limit: seconds.

    Raises:
        InvalidRequest: it is no such number.
    """
    number = 0 if value is None else value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None and isinstance(value, str) and value.isdecimal():
        number = int(value)
    if number is None or not 0 <= number < 2**63:
        raise InvalidRequest(f"timeout must be a number of microseconds, 0 (none) or more, found {value!r}")
    return min(number / 1e6, limit) if number else limit


def scalar(inputs: Inputs, name: str, default: float | bool) -> Any:
    """The one value of a tensor, or the default where it is missing."""
    tensor = inputs.get(name)
    if tensor is None:
        return default
    if tensor.size != 1:
        raise InvalidRequest(f"{name} must hold one value, found {tensor.size}")
    return tensor.reshape(-1)[0]


def single_text(inputs: Inputs, name: str) -> str:
    """The one text of a BYTES tensor."""
    texts = decode_texts(inputs[name], name)
    if len(texts) != 1:
        raise InvalidRequest(f"{name} must hold one text, found {len(texts)}")
    return texts[0]


def _stop_words(inputs: Inputs) -> tuple[str, ...]:
    tensor = inputs.get("stop_words")
    if tensor is None:
        return ()
    if tensor.size > MAX_STOP_WORDS:
        raise InvalidRequest(f"stop_words holds {tensor.size} texts, the limit is {MAX_STOP_WORDS}")
    return tuple(word for word in decode_texts(tensor.astype(np.object_), "stop_words", 1024) if word)
