"""What calls take and return."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

# The bytes of a file, or its path.
File = bytes | str | Path


class TextPart(TypedDict):
    """A part of a message's content; its type is "text"."""

    type: str
    text: str


class _ImagePart(TypedDict):
    type: str


class ImagePart(_ImagePart, total=False):
    """An image in a message's content, of a model that reads images.

    Attributes:
        type: "image", or "image_url" as OpenAI's API has it.
        image: of an "image": the bytes of a PNG, JPEG or WebP file, or its path. Without it, the part is the next of
            the call's `images`.
        image_url: of an "image_url": `{"url": "data:image/png;base64,..."}`. Addresses are not fetched.
    """

    image: File
    image_url: Mapping[str, str]


class _Role(TypedDict):
    role: str


class Message(_Role, total=False):
    """One message of a conversation; roles are the chat template's, usually `system`, `user`, `assistant`, `tool`.

    Attributes:
        content: a text, a list of parts, or None for a message of the assistant that calls tools.
        name: of who speaks, where the template shows it.
        reasoning_content: the assistant's thoughts.
        tool_calls: that the assistant made, as chat APIs have them; `Generation.message` gives them so.
        tool_call_id: of a message of role `tool`: the call whose result it is.
    """

    content: str | Sequence[TextPart | ImagePart] | None
    name: str
    reasoning_content: str | None
    tool_calls: Sequence[Mapping[str, Any]] | None
    tool_call_id: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, or, in a stream, more of one.

    Attributes:
        index: of the call in the answer, from 0.
        id: of the call, to which a message of role `tool` answers; "" in a stream where the call goes on.
        name: of the tool; "" in a stream where the call goes on.
        arguments: as JSON text, or more of it. A model may write JSON that is none.
    """

    index: int
    id: str
    name: str
    arguments: str

    def parsed(self) -> Any:
        """The arguments.

        Raises:
            ValueError: they are no JSON.
        """
        return json.loads(self.arguments)


@dataclass(frozen=True)
class Finding:
    """What a guard's rule found, in the request (`stage` "input") or in the answer ("output").

    Attributes:
        action: "block", "redact", "annotate", or "failed": the rule could not be checked.
        count: how often.
    """

    rule: str
    action: str
    stage: str
    count: int


@dataclass(frozen=True)
class GenerationChunk:
    """A chunk of an answer.

    Attributes:
        text: the new text.
        finish_reason: "stop", "length", "cancelled" or "content_filter" (a guard blocks the rest) in the last chunk, ""
            before.
        num_input_tokens: tokens of the prompt.
        num_output_tokens: tokens generated so far.
        log_probs: log-probabilities of the new tokens; () unless `return_log_probs` asks for them.
        top_log_probs: for each new token the likeliest tokens, as (id, log-probability); () unless `top_logprobs`
            asks for them.
        reasoning: the model's, where `return_reasoning` asks for it.
        tool_calls: calls of the request's `tools`; in a stream, what is new of them.
        prompt_log_probs: log-probabilities of the prompt's tokens but the first, in the first chunk; () unless
            `prompt_logprobs` asks for them.
        prompt_top_log_probs: the likeliest tokens at each of them.
        index: which of several answers it belongs to.
        token_ids: of the new tokens; () unless `return_tokens` asks for them.
        tokens: their bytes, some perhaps a part of a character.
        top_tokens: the bytes of the tokens of `top_log_probs`.
        prompt_token_ids: of the prompt, in the first chunk; () unless `return_prompt_token_ids` asks for them.
        prompt_tokens: their bytes, with `return_tokens`.
        prompt_top_tokens: the bytes of the tokens of `prompt_top_log_probs`.
        guard: what the model's guard found, in the last chunk; () where it found nothing, or there is none.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_log_probs: tuple[float, ...] = ()
    prompt_top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    index: int = 0
    token_ids: tuple[int, ...] = ()
    tokens: tuple[bytes, ...] = ()
    top_tokens: tuple[tuple[bytes, ...], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_tokens: tuple[bytes, ...] = ()
    prompt_top_tokens: tuple[tuple[bytes, ...], ...] = ()
    guard: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class SparseVector:
    """A sparse embedding: tokens of the vocabulary by their ids, rising, and the weight of each."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Label:
    """A class of a text, with its score.

    Attributes:
        label_id: its number among the model's classes; None: the labels are the caller's, or the server tells none.
    """

    label: str
    score: float
    label_id: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Entity:
    """A span of a text, [start, end) in characters, with its class; `word` is the tokenizer's form of it."""

    entity: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """A span of the context, [start, end) in characters.

    Attributes:
        answer: its text; "" if the context does not answer the question.
        score: of this answer.
        no_answer_score: of the statement that the context does not answer the question.
    """

    answer: str
    score: float
    start: int
    end: int
    no_answer_score: float


@dataclass(frozen=True)
class Filling:
    """A token for a mask.

    Attributes:
        token_str: the token's text.
        score: its probability.
        token: its id.
        sequence: the whole text with the token in place of the mask.
    """

    token_str: str
    score: float
    token: int
    sequence: str


@dataclass(frozen=True)
class Translation:
    """The answer of a translation or summarization model.

    Attributes:
        text: the answer.
        finish_reason: "stop", "length" if `max_tokens` cut it off, or "cancelled".
        num_input_tokens: tokens of the source.
        num_output_tokens: tokens generated.
        log_probs: of each token.
        scores: for each window of the source, the sum of its answer's log-probabilities, divided by the answer's
            length to the power of the length penalty.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start: seconds from the beginning of the recording; `end` too.
        text: what is said there.
        tokens: of it, with its timestamps, by their ids.
        log_prob: the mean of its tokens' log-probabilities.
        no_speech: the probability that nobody speaks in the window that it is from.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    log_prob: float = 0.0
    no_speech: float = 0.0


@dataclass(frozen=True)
class TranscriptionChunk:
    """A chunk of the answer of a model of speech recognition.

    Attributes:
        text: the new text.
        language: its code.
        duration: of the recording, in seconds.
        finish_reason: "stop", "length" if the limit of tokens cut off what was heard in a window, or "cancelled", in
            the last chunk; "" before.
        num_output_tokens: tokens of the windows that are complete by now.
        segments: the new ones, with times, where they were asked for; a window's come when it is complete, behind their
            text.
    """

    text: str
    language: str
    duration: float
    finish_reason: str
    num_output_tokens: int
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Transcription(TranscriptionChunk):
    """A complete answer: one chunk that holds all of it."""


@dataclass(frozen=True)
class Attribution:
    """A part of a text, [start, end) in characters, and what the score loses without it.

    Attributes:
        part: which of the texts that the model read, by its name in a request.
        value: below 0: the score is higher without it.
    """

    text: str
    part: str
    start: int
    end: int
    value: float


@dataclass(frozen=True)
class Explanation:
    """What one statement of a model rests on.

    Attributes:
        model: its public name.
        of: the statement: a label, an entity, an answer.
        score: of the whole text.
        measure: what the score is.
        by: what was hidden at a time.
        hidden: how: "masked" or "removed".
        texts: what the model read, by the names of a request.
        attributions: in the order of the texts.
    """

    model: str
    task: str
    of: str
    score: float
    measure: str
    by: str
    hidden: str
    texts: Mapping[str, str]
    attributions: tuple[Attribution, ...]


@dataclass(frozen=True)
class Ranked:
    """A passage, by its index in the list that was given, with its score."""

    index: int
    score: float


@dataclass(frozen=True)
class Generation(GenerationChunk):
    """A complete answer: one chunk that holds all of it."""

    @property
    def message(self) -> Message:
        """The answer as a message of the assistant, for the conversation to go on with."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class ModelStatus:
    """A model that the server knows.

    Attributes:
        state: Triton's word, "READY" if it answers.
        reason: why it does not answer; "" if it does.
    """

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Health:
    """Whether the server is up, and whether every model is loaded."""

    live: bool
    ready: bool
