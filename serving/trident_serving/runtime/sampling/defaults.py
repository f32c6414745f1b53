"""What a causal model's generation config says about the choice of tokens, for requests that do not say otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "generation_config.json"
TOP_K = 50  # of a config that samples and does not say


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of a generation config that the runtime applies; their meaning is transformers'.

    Attributes:
        temperature: where a request gives none, as the other fields of a request; 0 unless the config samples.
        min_length: before it, prompt included, no answer ends; `min_new_tokens` without the prompt.
        bad_words: sequences of tokens that never appear.
        forced_bos_token_id: the token behind a prompt of one token.
        forced_eos_token_ids: the last token of an answer of the largest length.
        suppress_tokens: never appear; `begin_suppress_tokens` not as the first of an answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
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
            **_sampling(config),
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


def _sampling(config: dict[str, Any]) -> dict[str, Any]:
    """How a config samples, by the names of a request; empty where it takes the likeliest token."""
    if not config.get("do_sample"):
        return {}
    unsaid = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    return unsaid | {name: config[name] for name in unsaid if config.get(name) is not None}


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
