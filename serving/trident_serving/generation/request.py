"""A generation request, checked: from the tensors of the call to what the engine runs.

The fields are those of `trident_serving.schema.fields`, plus `text_input` or `messages`. Everything but the prompt is
optional.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trident_serving.chat.messages import (
    Conversation,
    ToolMode,
    parse_documents,
    parse_messages,
    parse_options,
    parse_tool_choice,
    parse_tools,
)
from trident_serving.chat.origins import plain
from trident_serving.errors import InvalidRequest
from trident_serving.generation.chat import Chat
from trident_serving.runtime.sampling.defaults import NO_DEFAULTS, GenerationDefaults
from trident_serving.runtime.sampling.params import SAMPLING, SamplingParams
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import (
    DEFAULT_TIMEOUT_SECONDS,
    GENERATION,
    MAX_STOP_WORD_BYTES,
    MAX_STOP_WORDS,
    MESSAGES,
    Inputs,
    by_name,
    single_text,
    timeout_seconds,
)
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import decode_texts

_SPLIT_SPECIAL_TOKENS = by_name(MESSAGES)["split_special_tokens"]


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
        conversation: what the chat template was given; None: the prompt is a text of the request.
        end_token_ids: tokens that end the answer, besides those of every answer.
        return_reasoning: whether the model's reasoning comes apart from the text of its answer.
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
    conversation: Conversation | None = None
    end_token_ids: frozenset[int] = frozenset()
    return_reasoning: bool = False


class RequestParser:
    """Turns tensors into requests for one model.

    Args:
        chat: the model's conversations; None: it takes texts only.
        defaults: what the model's generation config says where a request does not.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        chat: Chat | None,
        limits: GenerationLimits,
        defaults: GenerationDefaults = NO_DEFAULTS,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._defaults = defaults

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """Check the tensors of one request, each of them [1, n].

        Args:
            timeout: the request parameter of that name, in microseconds; None or 0 where there is none.

        Raises:
            InvalidRequest: a field is missing, malformed or out of range.
        """
        conversation = self._conversation(inputs)
        prompt, prompt_ids = self._prompt(inputs, conversation)
        if self._chat and conversation and self._chat.forced_grammar(conversation, prompt) is not None:
            raise InvalidRequest(f"tool_choice must be auto or none, found {conversation.tool_choice[:80]!r}")
        room = self._limits.context - len(prompt_ids)
        values = {field.name: field.read(inputs) for field in GENERATION if field.shape == (1,)}
        if values["max_tokens"] is None:
            values["max_tokens"] = min(self._limits.default_max_tokens, room)
        if "repetition_penalty" not in inputs:
            values["repetition_penalty"] = self._defaults.repetition_penalty
        if "min_tokens" not in inputs:
            values["min_tokens"] = min(self._defaults.min_new_tokens, values["max_tokens"])
        sampling = SamplingParams(
            **{name: values[name] for name in SAMPLING if name in values},
            seed=values["random_seed"],
            defaults=self._defaults,
        )
        if sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {sampling.max_tokens}, but the prompt's {len(prompt_ids)} tokens leave room for {room} "
                f"in the context of {self._limits.context}"
            )
        return GenerationRequest(
            prompt=prompt,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            stop_words=_stop_words(inputs),
            stream=values["stream"],
            return_log_probs=values["return_log_probs"] or values["top_logprobs"] > 0,
            top_log_probs=values["top_logprobs"],
            include_prompt=not values["exclude_input_in_output"],
            prompt_lookup=values["prompt_lookup"],
            timeout_seconds=timeout_seconds(timeout, self._limits.timeout),
            conversation=conversation,
            end_token_ids=self._chat.end_token_ids if self._chat and conversation else frozenset(),
            return_reasoning=values["return_reasoning"],
        )

    def _conversation(self, inputs: Inputs) -> Conversation | None:
        """What the chat template gets; None where the prompt is a text."""
        given = [name for name in ("text_input", "messages") if name in inputs]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of text_input and messages, found {' and '.join(given) or 'neither'}"
            )
        if given == ["text_input"]:
            for field in MESSAGES:
                if field.name in inputs and field.read(inputs) not in (False, field.default):
                    raise InvalidRequest(f"{field.name} needs messages; text_input is read as it is")
            return None
        text = self._checked_text(inputs, "messages")
        if self._chat is None:
            raise InvalidRequest("messages needs a model with a chat template: send text_input instead")
        sent = {
            name: self._checked_text(inputs, name)
            for name in ("tools", "documents", "chat_template_kwargs", "tool_choice")
            if name in inputs
        }
        messages = parse_messages(text)
        tools = parse_tools(sent["tools"]) if "tools" in sent else None
        choice = parse_tool_choice(sent["tool_choice"], tools) if "tool_choice" in sent else ToolMode.AUTO
        return Conversation(
            messages,
            tools=None if choice == ToolMode.NONE else tools,
            tool_choice=choice,
            documents=parse_documents(sent["documents"]) if "documents" in sent else None,
            options=parse_options(sent["chat_template_kwargs"]) if "chat_template_kwargs" in sent else {},
        )

    def _prompt(self, inputs: Inputs, conversation: Conversation | None) -> tuple[str, list[int]]:
        if conversation is None:
            field = "text_input"
            prompt = self._checked_text(inputs, field)
            ids = self._tokenizer.encode(prompt)
        else:
            field = "messages"
            assert self._chat is not None
            rendered = self._chat.template.render(conversation)
            self._check_bytes(rendered, field)
            prompt = plain(rendered)
            if _SPLIT_SPECIAL_TOKENS.read(inputs):
                ids = self._chat.control.encode(rendered, conversation.texts)
            else:
                ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        if not ids:
            raise InvalidRequest(f"{field} is empty: the model needs at least one token to go on from")
        if len(ids) >= self._limits.context:
            raise InvalidRequest(
                f"{field} has {len(ids)} tokens, the model's context of {self._limits.context} allows "
                f"{self._limits.context - 1} and one generated token"
            )
        return prompt, ids

    def _checked_text(self, inputs: Inputs, field: str) -> str:
        text = single_text(inputs, field)
        self._check_bytes(text, field)
        return text

    def _check_bytes(self, text: str, field: str) -> None:
        """Refuse a hopeless text before tokenizing it: a megabyte takes half a second, which others wait."""
        longest = self._tokenizer.longest_token_bytes
        size = len(text.encode("utf-8", "surrogatepass"))
        if longest is not None and size > longest * self._limits.context:
            raise InvalidRequest(
                f"{field} has {size} bytes, at least {-(-size // longest)} tokens, and the model's context "
                f"is {self._limits.context} tokens"
            )


def _stop_words(inputs: Inputs) -> tuple[str, ...]:
    tensor = inputs.get("stop_words")
    if tensor is None:
        return ()
    if tensor.size > MAX_STOP_WORDS:
        raise InvalidRequest(f"stop_words holds {tensor.size} texts, the limit is {MAX_STOP_WORDS}")
    words = decode_texts(tensor.astype(np.object_), "stop_words", MAX_STOP_WORD_BYTES)
    return tuple(word for word in words if word)
