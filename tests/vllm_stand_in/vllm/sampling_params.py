"""vLLM's parameters of a request."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm.exceptions import VLLMClientError


class RequestOutputKind(Enum):
    """What an output holds."""

    CUMULATIVE = 0
    DELTA = 1


@dataclass
class StructuredOutputsParams:
    """A grammar."""

    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


@dataclass
class SamplingParams:
    """How tokens are chosen."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Any = None
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.temperature > 2:
            raise VLLMClientError(f"temperature must be in [0, 2], got {self.temperature}.")
