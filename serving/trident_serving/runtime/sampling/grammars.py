"""Answers that follow a grammar: which tokens may come next, by llguidance.

A grammar is compiled on a thread of its own, so that a large one delays nobody, and kept for the next request. Each
answer walks its own copy. The masks of a step are computed while the model runs: they depend on what was generated,
and, behind a draft's tokens, on the draft.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 32 * 1024  # larger ones may compile for seconds
KEPT_GRAMMARS = 64
# A multipleOf takes as many states as the number has remainders: a million compile for half a minute, into 600 MB.
MAX_REMAINDERS = 50_000
# A quarter of llguidance's own: neighbours wait for a step's masks, which a hostile regular expression stretched to
# 80 ms. Schemas in use take a hundredth of it.
STEP_LEXER_FUEL = 50_000
# Of a million: 15,000 optional letters took 4 to 18 s and 600 to 900 MB. A literal of 18 KB is lost with them, one of
# 15 KB is not.
INITIAL_LEXER_FUEL = 30_000
Mask = NDArray[np.bool_]


class GrammarKind(StrEnum):
    """What the text of a grammar is.

    json: any JSON object or array, and no text. json_schema: a JSON schema. regex: a regular expression without
    look-around and references. choice: a JSON list of texts. lark, gbnf: a grammar in one of these notations.
    """

    JSON = "json"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"
    GBNF = "gbnf"


@dataclass(frozen=True)
class Grammar:
    """What an answer must follow, as a request says it."""

    kind: GrammarKind
    text: str = ""
    field: str = "grammar"


class Guide:
    """Where one answer is in its grammar.

    Args:
        matcher: llguidance's, for this answer only.
        vocabulary_size: tokens of the model.
    """

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._size = vocabulary_size

    def copy(self) -> Guide:
        """The same place, for another answer."""
        return Guide(self._matcher.deep_copy(), self._size)

    def fits(self, draft: Sequence[int]) -> list[int]:
        """The beginning of a draft that the grammar allows."""
        return list(draft[: self._matcher.validate_tokens(list(draft))])

    def forced(self, limit: int) -> list[int]:
        """Tokens that come next whatever the model says; often none."""
        tokens: list[int] = self._matcher.compute_ff_tokens()[: max(limit, 0)]
        return tokens

    def masks(self, draft: Sequence[int]) -> Mask:
        """Which tokens may come next, and behind each token of a draft that fits: [1 + draft, vocabulary]."""
        words = np.zeros((1 + len(draft), (self._size + 31) // 32), np.int32)
        consumed = 0
        for index, row in enumerate(words):
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            # Behind the grammar's end an end token is taken, but is none that can be rolled back.
            if index < len(draft) and not self._matcher.is_stopped():
                self._matcher.consume_token(draft[index])
                consumed += 1
        self._matcher.rollback(consumed)
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        mask: Mask = bits[:, : self._size].view(np.bool_)
        return mask

    def accept(self, token: int) -> bool:
        """Go on with a token; True: the grammar has no further one.

        Raises:
            InvalidRequest: the grammar takes too much to follow.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar can't be followed further: {_reason(self._matcher.get_error())}")
        stopped: bool = self._matcher.is_stopped()
        return stopped


class MaskMaker:
    """Computes the masks of a step on a thread of its own, which is there once a grammar is used."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "masks")

    def begin(self, wanted: Sequence[tuple[Guide | None, Sequence[int]]]) -> Future[list[Mask | None]] | None:
        """The masks of each answer and its draft; None where none follows a grammar."""
        if all(guide is None for guide, _ in wanted):
            return None
        return self._thread.submit(lambda: [guide.masks(draft) if guide else None for guide, draft in wanted])


class Grammars:
    """The grammars of one model's requests.

    Args:
        tokenizer: the model's tokenizer.json.
        vocabulary_size: tokens of the model.
        eos_token_ids: end an answer where its grammar may end.
    """

    def __init__(self, tokenizer: Path, vocabulary_size: int, eos_token_ids: frozenset[int]) -> None:
        self._path = tokenizer
        self._size = vocabulary_size
        self._ends = sorted(eos_token_ids)
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiler = ThreadPoolExecutor(1, "grammars")

    def guide(self, grammar: Grammar) -> Future[Guide]:
        """An answer's way through a grammar, once that is compiled; `InvalidRequest` where it can't be."""
        found = self._kept(grammar)
        if found is None:
            return self._compiler.submit(self._compile, grammar)
        ready: Future[Guide] = Future()
        ready.set_result(found)
        return ready

    def stop(self) -> None:
        """End the thread that compiles; what waits is given up."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _kept(self, grammar: Grammar) -> Guide | None:
        with self._lock:
            found = self._compiled.get((grammar.kind, grammar.text))
        return None if found is None else Guide(found.deep_copy(), self._size)

    def _compile(self, grammar: Grammar) -> Guide:
        import llguidance

        if (kept := self._kept(grammar)) is not None:  # compiled for another request while this one waited
            return kept
        if self._tokenizer is None:
            ends = self._ends or None
            self._tokenizer = llguidance.LLTokenizer(str(self._path), n_vocab=self._size, eos_token=ends)
        limits = llguidance.LLParserLimits(step_lexer_fuel=STEP_LEXER_FUEL, initial_lexer_fuel=INITIAL_LEXER_FUEL)
        matcher = llguidance.LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(f"{grammar.field} is refused: {_reason(matcher.get_error())}")
        any_first = Guide(matcher, self._size).masks([]).any()
        if not any_first or matcher.get_error().startswith("NoExtension"):
            raise InvalidRequest(f"{grammar.field} admits no text: no token could come first")
        if matcher.is_error():
            raise InvalidRequest(f"{grammar.field} is too complex: {_reason(matcher.get_error())}")
        with self._lock:
            self._compiled[grammar.kind, grammar.text] = matcher
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy(), self._size)


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance reads it.

    Raises:
        InvalidRequest: it is none.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    text, field = grammar.text, grammar.field
    if len(text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{field} has more than {MAX_GRAMMAR_BYTES} bytes")
    found: str
    try:
        match grammar.kind:
            case GrammarKind.JSON:
                found = LLMatcher.grammar_from_json_schema({"type": ["object", "array"]}, _JSON)
            case GrammarKind.JSON_SCHEMA:
                schema = _object(text, field)
                _check_divisors([schema], field)
                found = LLMatcher.grammar_from_json_schema(schema, _JSON)
            case GrammarKind.REGEX:
                found = LLMatcher.grammar_from_regex(text)
            case GrammarKind.CHOICE:
                found = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, _choices(text, field))))
            case GrammarKind.LARK:
                _check_divisors(list(_schemas_in(text)), field)
                found = LLMatcher.grammar_from_lark(text)
            case GrammarKind.GBNF:
                found = LLMatcher.grammar_from_lark(any_to_lark(text))
    except InvalidRequest:
        raise
    except Exception as error:  # what llguidance's readers raise
        raise InvalidRequest(f"{field} is refused: {_reason(str(error))}") from None
    return found


# Without free white space a model can't fill an answer with it, and more of the answer is certain.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
        json.dumps(schema, allow_nan=False)  # NaN and 1e400, which Python reads, would be null
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field} must be a JSON schema, an object, found {text[:80]!r}")
    return schema


def _schemas_in(lark: str) -> Iterator[Any]:
    """The JSON schemas within a grammar; what is none, llguidance refuses."""
    for found in re.finditer(r"%json[^{]*", lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]
        except (ValueError, RecursionError):
            continue


def _check_divisors(schemas: Sequence[Any], field: str) -> None:
    """Refuse schemas whose `multipleOf` take too much to compile.

    Each takes a state for every remainder, powers of ten aside. Where schemas can be joined, it is their least common
    multiple's.
    """
    divisors: list[Decimal] = []
    joined, left = False, list(schemas)
    while left:
        value = left.pop()
        if isinstance(value, dict):
            divisor = value.get("multipleOf")
            if isinstance(divisor, int | float) and not isinstance(divisor, bool) and divisor > 0:
                divisors.append(Decimal(str(divisor)))
            joined |= any(key in value for key in ("allOf", "anyOf", "oneOf", "$ref"))
            left += value.values()
        elif isinstance(value, list):
            left += value
    if not divisors:
        return
    scale = 10 ** max(0, *(-int(divisor.as_tuple().exponent) for divisor in divisors))
    whole = [int(divisor * scale) for divisor in divisors]
    found = max(sum(map(_remainders, whole)), _remainders(math.lcm(*whole)) if joined else 0)
    if found > MAX_REMAINDERS:
        raise InvalidRequest(
            f"{field} is too complex: its multipleOf have {found:.7g} remainders, the limit is {MAX_REMAINDERS}"
        )


def _remainders(divisor: int) -> int:
    while divisor and divisor % 10 == 0:
        divisor //= 10
    return divisor


def _choices(text: str, field: str) -> list[str]:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError):
        choices = None
    if (
        not isinstance(choices, list)
        or not choices
        or not all(choice and isinstance(choice, str) for choice in choices)
    ):
        raise InvalidRequest(f"{field} must be a list of texts that are not empty")
    return choices


def _reason(text: str) -> str:
    """What llguidance says, without the lines that show where: its first, and what a regular expression lacks."""
    first, *more = text.strip().splitlines() or ["no reason is given"]
    error = next((line.removeprefix("error:") for line in more if line.startswith("error:")), None)
    if error is None:
        return first[:300]
    about, _, _ = first.rpartition("regex parse error:")
    about = f"{about[:200]}... " if len(about) > 200 else about
    return f"{about}regex parse error:{error[:200]}"
