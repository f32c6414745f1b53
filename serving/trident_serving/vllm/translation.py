"""A checked request as what vLLM is asked. What vLLM would ignore or change without a word is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trident_serving.artefacts import WEIGHTS, VllmBuild
from trident_serving.errors import InvalidRequest, LoadError
from trident_serving.generation.request import GenerationRequest
from trident_serving.memory import MEBIBYTE
from trident_serving.runtime.sampling.defaults import FILE, GenerationDefaults
from trident_serving.runtime.sampling.grammars import Grammar, GrammarKind
from trident_serving.schema.fields import MAX_TOP_LOG_PROBS
from trident_serving.schema.limits import VllmLimits
from trident_serving.schema.vllm import VllmSettings

# vLLM takes lower temperatures as this one, with a line in its log.
LOWEST_TEMPERATURE = 0.01
# JSON as our own engine writes it: llguidance, which vLLM is told to use, reads this key of a schema.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Settings of a generation config that vLLM has no parameter for, with what is no setting.
_NOT_THERE: dict[str, object] = {
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words": (),
    "forced_bos_token_id": None,
    "forced_eos_token_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
}


def engine_arguments(
    version_folder: Path, limits: VllmLimits, settings: VllmSettings, build: VllmBuild
) -> dict[str, Any]:
    """What vLLM's engine is built with."""
    found: dict[str, Any] = {
        "model": str((version_folder / WEIGHTS).resolve()),
        "dtype": build.dtype,
        "trust_remote_code": build.trust_remote_code,
        "max_model_len": limits.context,
        "max_num_seqs": limits.slots,
        "enable_prefix_caching": limits.prefix_reuse,
        "max_logprobs": MAX_TOP_LOG_PROBS,
        # Before penalties and temperature, as our own engine tells them.
        "logprobs_mode": "raw_logprobs",
        # What a request leaves out comes from our side, which reads the same file.
        "generation_config": "vllm",
    }
    if limits.kv_cache_mib:
        found["kv_cache_memory_bytes"] = limits.kv_cache_mib * MEBIBYTE
    return found | settings.arguments()


def check_defaults(defaults: GenerationDefaults) -> None:
    """Refuse a model whose generation config says what vLLM does not do.

    Raises:
        LoadError: it does.
    """
    found = [name for name, harmless in _NOT_THERE.items() if getattr(defaults, name) != harmless]
    if found:
        raise LoadError(
            f"{FILE} sets {', '.join(found)}, for which vLLM has no parameter: take that out of the file, or serve the "
            'model without engine = "vllm"'
        )


def check(request: GenerationRequest) -> None:
    """Refuse a request that vLLM would answer otherwise than it says.

    Raises:
        InvalidRequest: the message names the field.
    """
    sampling = request.sampling
    if sampling.watermark is not None:
        raise InvalidRequest("watermarking_config is not for this model, which vLLM computes: it has no watermark")
    if sampling.greedy:
        return  # the likeliest token is what it is, whatever else is said
    if sampling.typical_p != 1.0:
        raise InvalidRequest(
            f"typical_p must be 1 for this model, found {sampling.typical_p:g}: vLLM computes it and has no such "
            "parameter; top_p or min_p are alike"
        )
    if sampling.temperature < LOWEST_TEMPERATURE:
        raise InvalidRequest(
            f"temperature must be 0 or at least {LOWEST_TEMPERATURE:g} for this model, which vLLM computes, found "
            f"{sampling.temperature:g}"
        )


def ends(request: GenerationRequest, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end an answer; one that follows a grammar ends at the model's own whatever it ignores."""
    own = frozenset() if request.ignore_eos and request.grammar is None else eos_token_ids
    return request.stop_token_ids | own


def message(request: GenerationRequest, index: int, ending: frozenset[int]) -> dict[str, Any]:
    """What the worker is asked for one of a request's answers.

    Args:
        index: which of several.
        ending: see `ends`.
    """
    sampling = request.sampling
    prompt = len(request.prompt_ids)
    shortest = max(sampling.min_tokens, min(sampling.defaults.min_length - prompt, sampling.max_tokens))
    parameters: dict[str, Any] = {
        "max_tokens": max(sampling.max_tokens, 1),  # 0 is for what is told of the prompt, and vLLM's least is 1
        "min_tokens": shortest,
        "temperature": sampling.temperature,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop_token_ids": sorted(ending),
    }
    if not sampling.greedy:
        likeliest = sampling.top_p == 0
        parameters |= {
            "top_k": 1 if likeliest else sampling.top_k,
            "top_p": 1.0 if likeliest else sampling.top_p,
            "min_p": sampling.min_p,
        }
        if sampling.seed is not None:
            parameters["seed"] = (sampling.seed + index) % 2**64
    if request.bad_words:
        parameters["bad_words"] = list(request.bad_words)
    if sampling.logit_bias:
        parameters["logit_bias"] = [list(pair) for pair in sampling.logit_bias]
    if request.return_log_probs:
        parameters["logprobs"] = request.top_log_probs
    if request.prompt_log_probs is not None and index == 0:
        parameters["prompt_logprobs"] = request.prompt_log_probs
    asked: dict[str, Any] = {"prompt": list(request.prompt_ids), "sampling": parameters}
    if request.grammar is not None:
        asked["grammar"] = grammar(request.grammar)
    return asked


def grammar(given: Grammar) -> dict[str, Any]:
    """A grammar by the name of vLLM's structured output; ours was compiled by the same library before."""
    text: Any = given.text
    match given.kind:
        case GrammarKind.JSON:
            return {"json": json.dumps({"type": ["object", "array"], "x-guidance": _JSON})}
        case GrammarKind.JSON_SCHEMA:
            return {"json": json.dumps({**json.loads(text), "x-guidance": _JSON})}
        case GrammarKind.REGEX:
            return {"regex": text}
        case GrammarKind.CHOICE:
            return {"choice": json.loads(text)}
        case _:
            return {"grammar": text}


def top(entries: Sequence[Sequence[float]], count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens that the worker told, which are sorted, without those behind the count."""
    return tuple((int(token), float(value)) for token, value in entries[:count])
