"""How the tokens of one request are chosen, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trident_serving.errors import InvalidRequest


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; greedy where `temperature` is 0.

    Raises:
        InvalidRequest: a value is out of its range; the message names field, value and range.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        _check(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        for name in ("top_p", "typical_p"):
            _check(0.0 < getattr(self, name) <= 1.0, name, getattr(self, name), "above 0 and at most 1")
        _check(
            0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0 and at most 100",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "between -2 and 2")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


# The fields of a request that say how tokens are chosen.
SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name != "seed")


def _check(holds: bool, field: str, value: float, expected: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field} must be {expected}, found {value}")
