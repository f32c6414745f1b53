"""What a causal model's generation config says about the choice of tokens, for requests that do not say otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of a generation config that the runtime applies; their meaning is transformers'.

    Attributes:
        repetition_penalty: where a request gives none.
        min_length: before it, prompt included, no answer ends; `min_new_tokens` without the prompt.
        bad_words: sequences of tokens that never appear.
        forced_bos_token_id: the token behind a prompt of one token.
        forced_eos_token_ids: the last token of an answer of the largest length.
        suppress_tokens: never appear; `begin_suppress_tokens` not as the first of an answer.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> GenerationDefaults:
        """Read `folder/generation_config.json`; without it nothing is set."""
        config = read_config(folder)
        ends = ids(config.get("eos_token_id"))
        words = [tuple(word) for word in config.get("bad_words_ids") or [] if list(word) not in [[end] for end in ends]]
        return cls(
            repetition_penalty=float(config.get("repetition_penalty") or 1.0),
            no_repeat_ngram_size=config.get("no_repeat_ngram_size") or 0,
            bad_words=tuple(words),
            min_length=config.get("min_length") or 0,
            min_new_tokens=config.get("min_new_tokens") or 0,
            forced_bos_token_id=config.get("forced_bos_token_id"),
            forced_eos_token_ids=ids(config.get("forced_eos_token_id")),
            suppress_tokens=ids(config.get("suppress_tokens")),
            begin_suppress_tokens=ids(config.get("begin_suppress_tokens")),
        )


# What a request does not change.
NO_DEFAULTS = GenerationDefaults()


def read_config(folder: Path) -> dict[str, Any]:
    """The generation config in a version folder; empty where there is none."""
    path = folder / FILE
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, a list, or none."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)
