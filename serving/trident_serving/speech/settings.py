"""What a speech model is asked with: the tokens of languages and tasks before an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trident_serving.errors import InvalidRequest
from trident_serving.schema import reading

_SETTINGS = "speech.json"
_TRANSCRIBE = "transcribe"
DETECTED = -1  # in a prompt: the language that the model hears


@dataclass(frozen=True)
class SpeechSettings:
    """`speech.json`, which the export writes.

    Attributes:
        start: the first token.
        no_timestamps: the token that asks for text alone; timestamps are the tokens behind it.
        no_speech: the token whose probability behind the first says that nobody speaks.
        languages: the token of each language, by its code; none: the model knows English alone.
        names: the code of a language by its English name.
        tasks: the token of each task.
        language: where a request names none; "": the model hears it. `task` too; "": as `forced` says.
        forced: tokens behind the first where neither request nor settings name a language or a task.
        max_initial_timestamp: how many steps of the clock the first timestamp may be from the beginning; None: any.
        seconds_per_step: of the clock of the timestamps.
    """

    start: int
    no_timestamps: int
    no_speech: int
    languages: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    language: str = ""
    task: str = ""
    forced: tuple[int, ...] = ()
    max_initial_timestamp: int | None = None
    seconds_per_step: float = 0.02

    @classmethod
    def load(cls, folder: Path) -> SpeechSettings:
        """Read `folder/speech.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/speech.json`."""
        reading.save(self, folder / _SETTINGS)

    @property
    def first_timestamp(self) -> int:
        """The token of second 0."""
        return self.no_timestamps + 1

    def code(self, language: str) -> str:
        """The code of a language that a request names by its code, its token or its English name.

        Raises:
            InvalidRequest: the model does not know it.
        """
        plain = language.strip().lower().removeprefix("<|").removesuffix("|>")
        code = self.names.get(plain, plain)
        known = self.languages or ({"en": 0} if plain in ("en", "english") else {})
        if plain == "english" and not self.languages:
            code = "en"
        if code not in known:
            names = list(self.languages) or ["en"]
            shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            raise InvalidRequest(f"language {language[:80]!r} is not known to this model; known: {shown}")
        return code

    def prompt(self, language: str | None, task: str | None, *, timestamps: bool) -> list[int]:
        """The tokens before an answer, as transformers' `generate` puts them together; `DETECTED` may be the second.

        Args:
            language: its code; None: the settings' one.
            task: "transcribe" or "translate"; None: the settings' one.
            timestamps: whether the answer has them.

        Raises:
            InvalidRequest: the model has no such task.
        """
        if not self.languages:
            if task not in (None, _TRANSCRIBE):
                raise InvalidRequest(f"task {task!r} needs a multilingual model, this one knows English alone")
            return self._timed([self.start, *self.forced], timestamps=timestamps)
        language, task = language or self.language or None, task or self.task or None
        if language is None and task is None and self.forced:
            return self._timed([self.start, *self.forced], timestamps=timestamps)
        tokens = [self.start, DETECTED if language is None else self.languages[language]]
        if task is None and language is not None:
            task = _TRANSCRIBE
        if task is not None:
            if task not in self.tasks:
                raise InvalidRequest(f"task {task!r} is not one of this model's: {', '.join(self.tasks) or 'none'}")
            tokens.append(self.tasks[task])
        return self._timed(tokens, timestamps=timestamps)

    def language_of(self, prompt: list[int]) -> str:
        """The code of the language that a prompt asks for."""
        if not self.languages:
            return "en"
        return next((code for code, token in self.languages.items() if token in prompt[1:2]), "")

    def _timed(self, tokens: list[int], *, timestamps: bool) -> list[int]:
        plain = [token for token in tokens if token != self.no_timestamps]
        return plain if timestamps else [*plain, self.no_timestamps]
