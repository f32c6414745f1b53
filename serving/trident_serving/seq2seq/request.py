"""Requests of translation and summarization: tensors to a checked `Seq2SeqRequest`.

The fields are those of text generation where they mean the same; `num_beams`, `length_penalty`, `early_stopping` and
`no_repeat_ngram_size` are transformers'. What a request leaves out comes from the model's generation config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trident_serving.errors import InvalidRequest
from trident_serving.runtime.sampling.params import SAMPLING, SamplingParams
from trident_serving.schema import reading
from trident_serving.schema.fields import SEQ2SEQ, Inputs, LongInput, by_name, single_text, timeout_seconds
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import EarlyStopping, SearchParams
from trident_serving.seq2seq.source import SourceText, Window

_DEFAULTS = "generation.json"
_FIELDS = by_name(SEQ2SEQ)
# The rest of the sampling fields is for the search's rules.
RULES = ("max_tokens", "min_tokens", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's generation config, as far as it counts; `generation.json`, which the export writes.

    Attributes:
        prompt: the decoder's start tokens.
        max_length: of an answer, start tokens included; 0: the config does not say.
    """

    prompt: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    max_length: int = 0
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> GenerationDefaults:
        """Read `folder/generation.json`."""
        return reading.load(cls, folder / _DEFAULTS)

    def save(self, folder: Path) -> None:
        """Write `folder/generation.json`."""
        reading.save(self, folder / _DEFAULTS)


def positions(max_target_tokens: int, prompt: Sequence[int]) -> int:
    """Positions that a slot needs: the last token of an answer is never read."""
    return max_target_tokens + len(prompt) - 1


@dataclass(frozen=True)
class Seq2SeqRequest:
    """A checked request: the windows of its text, and how each is answered."""

    windows: Sequence[Window]
    prompt: tuple[int, ...]
    params: SearchParams
    timeout_seconds: float


class RequestParser:
    """Checks requests against a model's limits."""

    def __init__(self, source: SourceText, defaults: GenerationDefaults, limits: Seq2SeqLimits) -> None:
        self._source = source
        self._defaults = defaults
        self._limits = limits

    def parse(self, inputs: Inputs, timeout: object = None) -> Seq2SeqRequest:
        """Check the tensors of one request, each of them [1, n].

        Args:
            timeout: the request parameter of that name, in microseconds; None or 0 where there is none.

        Raises:
            InvalidRequest: a field is missing, malformed or out of range.
        """
        text = single_text(inputs, "text_input")
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self._limits.max_bytes:
            raise InvalidRequest(f"text_input has {size} bytes, the limit is {self._limits.max_bytes} bytes")
        source_lang, target_lang = (_FIELDS[name].read(inputs) for name in ("source_lang", "target_lang"))
        forced_bos = self._source.forced_bos(target_lang)
        params = self._params(inputs, forced_bos)
        policy = LongInput(_FIELDS["long_input"].read(inputs, self._limits.long_input))
        windows = self._source.windows(text, policy, source_lang, target_lang)
        if len(windows) > self._limits.max_windows:
            raise InvalidRequest(
                f"text_input takes {len(windows)} windows, the limit is {self._limits.max_windows}: send it in parts"
            )
        return Seq2SeqRequest(windows, self._defaults.prompt, params, timeout_seconds(timeout, self._limits.timeout))

    def _params(self, inputs: Inputs, forced_bos: int | None) -> SearchParams:
        defaults, limits = self._defaults, self._limits
        configured = defaults.max_length - len(defaults.prompt)
        usual = min(configured if configured > 0 else limits.default_max_tokens, limits.max_target_tokens)
        max_tokens = _FIELDS["max_tokens"].read(inputs, usual, limits.max_target_tokens)
        num_beams = _FIELDS["num_beams"].read(inputs, min(defaults.num_beams, limits.max_beams), limits.max_beams)
        sampling = _sampling(inputs, max_tokens)
        if sampling is not None and num_beams > 1:
            raise InvalidRequest(f"temperature {sampling.temperature:g} needs num_beams 1, found {num_beams}")
        return SearchParams(
            rules=Rules(
                max_length=len(defaults.prompt) + max_tokens,
                min_length=defaults.min_length,
                min_new_tokens=_FIELDS["min_tokens"].read(inputs, 0, max_tokens),
                prompt_length=len(defaults.prompt),
                eos_token_ids=defaults.eos_token_ids,
                repetition_penalty=_FIELDS["repetition_penalty"].read(inputs, defaults.repetition_penalty),
                no_repeat_ngram_size=_FIELDS["no_repeat_ngram_size"].read(
                    inputs, defaults.no_repeat_ngram_size, max_tokens + 1
                ),
                bad_words=defaults.bad_words,
                forced_bos_token_id=forced_bos if forced_bos is not None else defaults.forced_bos_token_id,
                forced_eos_token_ids=defaults.forced_eos_token_ids,
                suppress_tokens=defaults.suppress_tokens,
                begin_suppress_tokens=defaults.begin_suppress_tokens,
            ),
            num_beams=num_beams,
            length_penalty=_FIELDS["length_penalty"].read(inputs, defaults.length_penalty),
            early_stopping=_FIELDS["early_stopping"].read(inputs, defaults.early_stopping),
            sampling=sampling,
        )


def _sampling(inputs: Inputs, max_tokens: int) -> SamplingParams | None:
    own = [name for name in SAMPLING if name in _FIELDS and name not in RULES]
    values = {name: _FIELDS[name].read(inputs) for name in own}
    params = SamplingParams(max_tokens=max_tokens, **values, seed=_FIELDS["random_seed"].read(inputs))
    return None if params.greedy else params
