"""Requests of speech recognition: tensors to a checked `SpeechRequest`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from trident_serving.errors import InvalidRequest
from trident_serving.runtime.sampling.params import SAMPLING, SamplingParams
from trident_serving.schema.fields import SPEECH, Inputs, by_name, timeout_seconds
from trident_serving.schema.limits import SpeechLimits
from trident_serving.seq2seq.request import RULES, GenerationDefaults
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import SearchParams
from trident_serving.speech import audio
from trident_serving.speech.rules import Timestamps
from trident_serving.speech.settings import SpeechSettings

_FIELDS = by_name(SPEECH)


@dataclass(frozen=True)
class SpeechRequest:
    """A checked request.

    Attributes:
        audio: the file.
        language: its code; None: the settings' one, or heard.
        task: None: the settings' one.
        timestamps: whether the answer has segments.
        stream: whether it comes in parts.
        max_tokens: of a window's answer; None: as many as fit.
        search: how each window is searched, by the names of `SearchParams`; `rules` by those of `Rules`.
    """

    audio: bytes
    language: str | None
    task: str | None
    timestamps: bool
    stream: bool
    max_tokens: int | None
    search: dict[str, Any]
    rules: dict[str, Any]
    timeout_seconds: float


class RequestParser:
    """Checks requests against a model's limits."""

    def __init__(self, settings: SpeechSettings, defaults: GenerationDefaults, limits: SpeechLimits) -> None:
        self._settings = settings
        self._defaults = defaults
        self._limits = limits

    def parse(self, inputs: Inputs, timeout: object = None) -> SpeechRequest:
        """Check the tensors of one request, each of them [1, n].

        Args:
            timeout: the request parameter of that name, in microseconds; None or 0 where there is none.

        Raises:
            InvalidRequest: a field is missing, malformed or out of range; the file itself is looked at later.
        """
        defaults, limits = self._defaults, self._limits
        content = self._audio(inputs)
        language = _FIELDS["language"].read(inputs)
        task = _FIELDS["task"].read(inputs)
        code = self._settings.code(language) if language else None
        timestamps = _FIELDS["timestamps"].read(inputs)
        longest = len(self._settings.prompt(code, task, timestamps=False))
        max_tokens = _FIELDS["max_tokens"].read(inputs, None, limits.max_target_tokens - longest)
        num_beams = _FIELDS["num_beams"].read(inputs, min(defaults.num_beams, limits.max_beams), limits.max_beams)
        values = {name: _FIELDS[name].read(inputs) for name in SAMPLING if name in _FIELDS and name not in RULES}
        sampling = SamplingParams(max_tokens=1, **values, seed=_FIELDS["random_seed"].read(inputs))
        if not sampling.greedy and num_beams > 1:
            raise InvalidRequest(f"temperature {sampling.temperature:g} needs num_beams 1, found {num_beams}")
        search = {
            "num_beams": num_beams,
            "length_penalty": _FIELDS["length_penalty"].read(inputs, defaults.length_penalty),
            "early_stopping": _FIELDS["early_stopping"].read(inputs, defaults.early_stopping),
            "sampling": None if sampling.greedy else sampling,
        }
        repeated = limits.max_target_tokens
        rules = {
            "min_new_tokens": _FIELDS["min_tokens"].read(inputs, 0, max_tokens or limits.max_target_tokens - longest),
            "repetition_penalty": _FIELDS["repetition_penalty"].read(inputs, defaults.repetition_penalty),
            "no_repeat_ngram_size": _FIELDS["no_repeat_ngram_size"].read(
                inputs, defaults.no_repeat_ngram_size, repeated
            ),
        }
        seconds = timeout_seconds(timeout, limits.timeout)
        stream = _FIELDS["stream"].read(inputs)
        return SpeechRequest(content, code, task, timestamps, stream, max_tokens, search, rules, seconds)

    def params(self, request: SpeechRequest, prompt_length: int, *, timestamps: bool) -> SearchParams:
        """How a window is searched behind a prompt of so many tokens."""
        defaults, settings = self._defaults, self._settings
        most = self._limits.max_target_tokens
        if defaults.max_length:
            most = min(defaults.max_length + prompt_length, most)
        if request.max_tokens is not None:
            most = min(prompt_length + request.max_tokens, most)
        clock = Timestamps(
            settings.first_timestamp, min(defaults.eos_token_ids), prompt_length, settings.max_initial_timestamp
        )
        return SearchParams(
            rules=Rules(
                max_length=most,
                min_length=defaults.min_length,
                prompt_length=prompt_length,
                eos_token_ids=defaults.eos_token_ids,
                bad_words=defaults.bad_words,
                suppress_tokens=defaults.suppress_tokens,
                begin_suppress_tokens=defaults.begin_suppress_tokens,
                more=(clock,) if timestamps else (),
                **request.rules,
            ),
            **request.search,
        )

    def _audio(self, inputs: Inputs) -> bytes:
        tensor = inputs["audio"]
        if tensor.size != 1:
            raise InvalidRequest(f"audio must hold one file, found {tensor.size}")
        content = tensor.reshape(-1)[0]
        if isinstance(content, str):
            content = content.encode()
        if not content:
            raise InvalidRequest("audio is empty: send the bytes of a file")
        content = _decoded(bytes(content))
        if len(content) > self._limits.max_bytes:
            raise InvalidRequest(f"audio has {len(content)} bytes, the limit is {self._limits.max_bytes} bytes")
        return content


def _decoded(content: bytes) -> bytes:
    """The file of a text in Base64, which is how JSON holds one; anything else as it is."""
    if audio.known(content):
        return content
    try:
        found = base64.b64decode(content, validate=True)
    except ValueError:
        return content
    return found if audio.known(found) else content
