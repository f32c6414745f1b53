"""How the tokens of one request are chosen, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trident_serving.runtime.sampling.defaults import NO_DEFAULTS, GenerationDefaults
from trident_serving.runtime.sampling.watermark import Watermark
from trident_serving.schema.fields import GENERATION, by_name

_FIELDS = by_name(GENERATION)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; greedy where `temperature` is 0.

    Attributes:
        bad_words: sequences of tokens that never appear.
        logit_bias: tokens, and what is added to their logits.
        watermark: which tokens are made likelier, so that the text can be told from others; None: none.
        defaults: what the model's generation config adds; a field of the request is no longer among it.

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
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    watermark: Watermark | None = None
    defaults: GenerationDefaults = NO_DEFAULTS

    def __post_init__(self) -> None:
        for name in SAMPLING:
            _FIELDS[name].check(getattr(self, name), self.max_tokens if name == "min_tokens" else None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


# The fields of a request that say how tokens are chosen.
_OTHERS = ("seed", "bad_words", "logit_bias", "watermark", "defaults")
SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name not in _OTHERS)
