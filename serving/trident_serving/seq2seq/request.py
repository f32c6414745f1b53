"""Requests of translation and summarization: tensors to a checked `Seq2SeqRequest`.

The fields are those of text generation where they mean the same; `num_beams`, `length_penalty`, `early_stopping` and
`no_repeat_ngram_size` are transformers'. What a request leaves out comes from the model's generation config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trident_serving.errors import InvalidRequest
from trident_serving.generation.request import DEFAULT_TIMEOUT_SECONDS, Inputs, scalar, single_text, timeout_seconds
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import EarlyStopping, SearchParams
from trident_serving.seq2seq.source import LongInput, SourceText, Window

_DEFAULTS = "generation.json"


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
        values: dict[str, Any] = json.loads((folder / _DEFAULTS).read_text(encoding="utf-8"))
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Write `folder/generation.json`."""
        (folder / _DEFAULTS).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def positions(max_target_tokens: int, prompt: Sequence[int]) -> int:
    """Positions that a slot needs: the last token of an answer is never read."""
    return max_target_tokens + len(prompt) - 1


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for.

    Attributes:
        max_target_tokens: of an answer.
        default_max_tokens: where neither request nor generation config says.
        max_beams: of a search.
        max_windows: of a text.
        max_bytes: of a text that is tokenized at all.
        long_input: the policy where the request does not say.
        timeout: seconds that a request may take, waiting included; a request may ask for less.
    """

    max_target_tokens: int
    default_max_tokens: int
    max_beams: int
    max_windows: int
    max_bytes: int
    long_input: LongInput
    timeout: float = DEFAULT_TIMEOUT_SECONDS


@dataclass(frozen=True)
class Seq2SeqRequest:
    """A checked request: the windows of its text, and how each is answered."""

    windows: Sequence[Window]
    prompt: tuple[int, ...]
    params: SearchParams
    timeout_seconds: float


class RequestParser:
    """Checks requests against a model's limits."""

    def __init__(self, source: SourceText, defaults: GenerationDefaults, limits: RequestLimits) -> None:
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
        source_lang = single_text(inputs, "source_lang") if "source_lang" in inputs else None
        target_lang = single_text(inputs, "target_lang") if "target_lang" in inputs else None
        forced_bos = self._source.forced_bos(target_lang)
        params = self._params(inputs, forced_bos)
        windows = self._source.windows(text, self._policy(inputs), source_lang, target_lang)
        if len(windows) > self._limits.max_windows:
            raise InvalidRequest(
                f"text_input takes {len(windows)} windows, the limit is {self._limits.max_windows}: send it in parts"
            )
        return Seq2SeqRequest(windows, self._defaults.prompt, params, timeout_seconds(timeout, self._limits.timeout))

    def _policy(self, inputs: Inputs) -> LongInput:
        if "long_input" not in inputs:
            return self._limits.long_input
        name = single_text(inputs, "long_input")
        if name not in list(LongInput):
            raise InvalidRequest(f"long_input must be one of {', '.join(LongInput)}, found {name[:80]!r}")
        return LongInput(name)

    def _params(self, inputs: Inputs, forced_bos: int | None) -> SearchParams:
        defaults, limits = self._defaults, self._limits
        usual = min(defaults.max_length - len(defaults.prompt) or limits.default_max_tokens, limits.max_target_tokens)
        max_tokens = int(scalar(inputs, "max_tokens", usual if usual > 0 else limits.default_max_tokens))
        _check(1 <= max_tokens <= limits.max_target_tokens, "max_tokens", max_tokens, 1, limits.max_target_tokens)
        min_tokens = int(scalar(inputs, "min_tokens", 0))
        _check(0 <= min_tokens <= max_tokens, "min_tokens", min_tokens, 0, max_tokens)
        num_beams = int(scalar(inputs, "num_beams", min(defaults.num_beams, limits.max_beams)))
        _check(1 <= num_beams <= limits.max_beams, "num_beams", num_beams, 1, limits.max_beams)
        ngram = int(scalar(inputs, "no_repeat_ngram_size", defaults.no_repeat_ngram_size))
        _check(0 <= ngram <= max_tokens + 1, "no_repeat_ngram_size", ngram, 0, max_tokens + 1)
        repetition = float(scalar(inputs, "repetition_penalty", defaults.repetition_penalty))
        _check(0.0 < repetition <= 100.0, "repetition_penalty", repetition, "above 0", 100)
        length_penalty = float(scalar(inputs, "length_penalty", defaults.length_penalty))
        _check(-10.0 <= length_penalty <= 10.0, "length_penalty", length_penalty, -10, 10)
        early = inputs.get("early_stopping")
        sampling = _sampling(inputs, max_tokens)
        if sampling is not None and num_beams > 1:
            raise InvalidRequest(f"temperature {sampling.temperature:g} needs num_beams 1, found {num_beams}")
        return SearchParams(
            rules=Rules(
                max_length=len(defaults.prompt) + max_tokens,
                min_length=defaults.min_length,
                min_new_tokens=min_tokens,
                prompt_length=len(defaults.prompt),
                eos_token_ids=defaults.eos_token_ids,
                repetition_penalty=repetition,
                no_repeat_ngram_size=ngram,
                bad_words=defaults.bad_words,
                forced_bos_token_id=forced_bos if forced_bos is not None else defaults.forced_bos_token_id,
                forced_eos_token_ids=defaults.forced_eos_token_ids,
                suppress_tokens=defaults.suppress_tokens,
                begin_suppress_tokens=defaults.begin_suppress_tokens,
            ),
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=defaults.early_stopping if early is None else bool(early.any()),
            sampling=sampling,
        )


def _sampling(inputs: Mapping[str, Any], max_tokens: int) -> SamplingParams | None:
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=float(scalar(inputs, "temperature", 0.0)),
        top_k=int(scalar(inputs, "top_k", 0)),
        top_p=float(scalar(inputs, "top_p", 1.0)),
        min_p=float(scalar(inputs, "min_p", 0.0)),
        seed=int(inputs["random_seed"].reshape(-1)[0]) if "random_seed" in inputs else None,
    )
    return None if params.greedy else params


def _check(holds: bool, field: str, value: float, least: object, most: object) -> None:
    if not holds:
        raise InvalidRequest(f"{field} must be between {least} and {most}, found {value:g}")
