"""What chat and text completions have in common: the fields that say how an answer is made, and its log-probabilities.

Beside OpenAI's fields there are those that vLLM and Trident's own clients know, under their names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trident_client import GenerationChunk
from trident_gateway.bodies import Body, Neutral
from trident_gateway.errors import ApiError, invalid

Json = dict[str, Any]
_SEEDS = 2**64


class StreamOptions(Body):
    """Options of a stream; `include_obfuscation` is about padding that nobody needs here."""

    include_usage: bool = False
    include_obfuscation: Neutral = None


class JsonSchema(Body):
    """A schema as `response_format` has it; it is followed strictly, whatever `strict` says."""

    name: Neutral = None
    description: Neutral = None
    schema_: Json | None = Field(None, alias="schema")
    strict: Neutral = None


class ResponseFormat(Body):
    """Which form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def options(self) -> Json:
        """The options of the client's calls.

        Raises:
            ApiError: the schema is missing.
        """
        if self.type == "text":
            return {}
        if self.type == "json_object":
            return {"guided_json": {"type": "object"}}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise invalid("response_format of type json_schema needs json_schema.schema", "response_format")
        return {"guided_json": self.json_schema.schema_}


class Sampling(Body):
    """The fields of both."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    watermarking_config: Json | None = None
    # Of no consequence for the answer.
    user: Neutral = None
    metadata: Neutral = None
    store: Neutral = None
    service_tier: Neutral = None
    safety_identifier: Neutral = None
    prompt_cache_key: Neutral = None
    prompt_cache_retention: Neutral = None

    @field_validator("top_k")
    @classmethod
    def _all_of_them(cls, value: int | None) -> int | None:
        return 0 if value == -1 else value  # vLLM's word for "off"

    @property
    def answers(self) -> int:
        """How many answers there are."""
        return 1 if self.n is None else self.n

    def names(self) -> dict[str, str]:
        """The fields that the server calls otherwise."""
        return {} if self.response_format is None else {"guided_json": "response_format"}

    def include_usage(self) -> bool:
        """Whether a stream ends with what was used.

        Raises:
            ApiError: there is no stream.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise invalid("stream_options needs stream true", "stream_options")
        return self.stream_options.include_usage

    def options(self) -> Json:
        """The options of the client's calls.

        Raises:
            ApiError: a seed has no form in 64 bits.
        """
        if self.answers < 1:
            raise invalid(f"n must be at least 1, found {self.answers}", "n")
        found = {name: getattr(self, name) for name in _SAME}
        found["stop_words"] = [self.stop] if isinstance(self.stop, str) else self.stop
        found["random_seed"] = None if self.seed is None else self.seed % _SEEDS
        found["logit_bias"] = self.logit_bias or None
        return {name: value for name, value in found.items() if value is not None}


_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens", "stop_token_ids"),
    *("max_tokens", "presence_penalty", "frequency_penalty", "bad_words", "ignore_eos", "skip_special_tokens"),
    *("truncate_prompt_tokens", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    "watermarking_config",
)


def reason(chunk: GenerationChunk, *, calls: bool = False) -> str | None:
    """Why an answer ended, in OpenAI's words; None where it goes on.

    Raises:
        ApiError: it was given up.
    """
    if chunk.finish_reason == "cancelled":
        raise ApiError(503, "the server gave the request up: try again", code="cancelled", retry_after=1)
    if chunk.finish_reason == "stop" and calls:
        return "tool_calls"
    return chunk.finish_reason or None


def noted(chunk: GenerationChunk) -> Json:
    """What a choice tells beside OpenAI's fields: what the model's guard found; nothing where that is nothing."""
    return {"guard": [asdict(finding) for finding in chunk.guard]} if chunk.guard else {}


def usage(prompt: int, completion: int) -> Json:
    """What a request used, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def shown(token: bytes) -> str:
    """The text of a token; what of it is no character by itself is shown as one that stands for it."""
    return token.decode("utf-8", "replace")


def event(content: Mapping[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n").encode()


DONE = b"data: [DONE]\n\n"
