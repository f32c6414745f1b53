"""What a causal model's generation config says about the choice of tokens, for requests that do not say otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_serving.errors import InvalidRequest, LoadError
from trident_serving.schema.fields import GENERATION, by_name

FILE = "generation_config.json"
TOP_K = 50  # of a config that samples and does not say
_FIELDS = by_name(GENERATION)


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
    def load(cls, folder: Path, vocabulary_size: int = 2**31) -> GenerationDefaults:
        """Read `folder/generation_config.json`; without it nothing is set.

        Args:
            vocabulary_size: tokens of the model. Others are not forbidden: they never come.

        Raises:
            LoadError: a setting is no number, or not one that a request may have; or a forced token is none.
        """
        config = read_config(folder)
        listed = {
            name: token_ids(config, name)
            for name in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
        }
        known = {
            name: tuple(token for token in tokens if 0 <= token < vocabulary_size) for name, tokens in listed.items()
        }
        forced = token_ids(config, "forced_bos_token_id")
        if len(forced) > 1:
            raise LoadError(f"{FILE}: forced_bos_token_id must be one token, found {list(forced)}")
        for token in (*forced, *listed["forced_eos_token_id"]):
            if not 0 <= token < vocabulary_size:
                raise LoadError(f"{FILE} forces the token {token}, the model has {vocabulary_size}")
        return cls(
            **_sampling(config),
            repetition_penalty=_number(config, "repetition_penalty", 1.0, "repetition_penalty"),
            no_repeat_ngram_size=int(_number(config, "no_repeat_ngram_size", 0)),
            bad_words=_bad_words(config, vocabulary_size, listed["eos_token_id"]),
            min_length=int(_number(config, "min_length", 0)),
            min_new_tokens=int(_number(config, "min_new_tokens", 0)),
            forced_bos_token_id=forced[0] if forced else None,
            forced_eos_token_ids=known["forced_eos_token_id"],
            suppress_tokens=known["suppress_tokens"],
            begin_suppress_tokens=known["begin_suppress_tokens"],
        )


def _sampling(config: dict[str, Any]) -> dict[str, Any]:
    """How a config samples, by the names of a request; empty where it takes the likeliest token."""
    if not config.get("do_sample"):
        return {}
    unsaid = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    return {name: _number(config, name, value, name) for name, value in unsaid.items()}


def _number(config: dict[str, Any], name: str, unsaid: float, field: str = "min_tokens") -> float:
    """A setting, as the field of a request would take it.

    Args:
        field: whose type and range it has; at least 0, if it has none of its own.
    """
    value = config.get(name)
    if value is None or (field == "repetition_penalty" and value == 0):
        return unsaid
    whole = _FIELDS[field].dtype == "INT32"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value % 1 != 0):
        raise LoadError(f"{FILE}: {name} must be a {'whole ' if whole else ''}number, found {value!r}")
    try:
        _FIELDS[field].check(value)
    except InvalidRequest as error:
        raise LoadError(f"{FILE}: {str(error).replace(field, name)}") from None
    return int(value) if whole else float(value)


def _bad_words(config: dict[str, Any], vocabulary_size: int, ends: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    words = config.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise LoadError(f"{FILE}: bad_words_ids must be lists of tokens, found {str(words)[:80]}")
    found = [token_ids({"bad_words_ids": word}, "bad_words_ids") for word in words]
    return tuple(
        word
        for word in found
        if (len(word) > 1 or word[0] not in ends) and all(0 <= token < vocabulary_size for token in word)
    )


# What a request does not change.
NO_DEFAULTS = GenerationDefaults()


def read_config(folder: Path) -> dict[str, Any]:
    """The generation config in a version folder; empty where there is none."""
    path = folder / FILE
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(config, dict):
        raise LoadError(f"{FILE} must hold an object, found {str(config)[:80]}")
    return config


def token_ids(config: dict[str, Any], name: str) -> tuple[int, ...]:
    """A setting that is one token, a list of them, or none."""
    value = config.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    for token in found:
        if type(token) is not int:
            raise LoadError(f"{FILE}: {name} must be tokens by their ids, found {token!r}")
    return tuple(found)
