"""Takes units from a prompt, and asks a generator how probable the answer still is: the drop of its log-probability.

Tokens are removed, and the others stay the same tokens; a generator has no mask token. Nothing is generated but the
answer to the whole prompt, if it is not given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trident_serving.errors import InvalidRequest
from trident_serving.explanation.units import Attribution, By, Explanation, Places, Span, check_work, units

CALLERS = 8
TOKENS = 64  # of an answer that is not given
_PART = "text_input"


@dataclass(frozen=True)
class Answered:
    """What a generator gives, as far as it was asked for; the client's `Generation` has the same attributes."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_tokens: tuple[bytes, ...] = ()
    prompt_log_probs: tuple[float, ...] = ()


# Asks a generator, from several threads: called with a prompt (a text, its tokens or messages) and options of a
# request; gives what `Answered` has.
Generate = Callable[..., Any]


@dataclass(frozen=True)
class _Tokens:
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


def explain(
    generate: Generate,
    model: str,
    text: str,
    *,
    by: By,
    answer: str = "",
    chat: bool = False,
    max_tokens: int = TOKENS,
    most: int | None = None,
    callers: int = CALLERS,
) -> Explanation:
    """What the answer to a prompt rests on, in nats.

    Args:
        answer: "": what the model answers greedily.
        chat: whether the text is a message, for the model's chat template.
        max_tokens: of an answer that the model gives.
        most: prompts that may be read; None: any.
        callers: of the generator at once.

    Raises:
        InvalidRequest: the prompt has no such units, or too many, or there is no answer.
    """
    prompt, given = _asked(generate, text, answer, chat)
    spans = _spans(prompt, text)
    chosen = units(_PART, text, by, [span for span in spans if span is not None])
    check_work(len(chosen), most)
    shown = answer
    if not given:
        found = generate(list(prompt.ids), max_tokens=max_tokens, temperature=0, return_tokens=True)
        given, shown = found.token_ids, found.text
        if not given:
            raise InvalidRequest("the model answers nothing: give an answer")
    places = Places(spans)

    def log_prob(unit: Span | None) -> float:
        hidden = frozenset() if unit is None else frozenset(places.of(unit))
        kept = [token for place, token in enumerate(prompt.ids) if place not in hidden]
        if not kept:
            raise InvalidRequest("without one of its parts nothing is left of the prompt: explain it by smaller ones")
        found = generate([*kept, *given], max_tokens=0, prompt_logprobs=0)
        if len(found.prompt_log_probs) != len(kept) + len(given) - 1:
            raise InvalidRequest("the model did not read the prompt as it was sent: nothing can be said of its parts")
        return float(sum(found.prompt_log_probs[-len(given) :]))

    with ThreadPoolExecutor(callers) as pool:
        asked = [pool.submit(log_prob, unit) for unit in (None, *chosen)]
        try:
            whole, *others = (each.result() for each in asked)
        finally:
            for each in asked:
                each.cancel()
    return Explanation(
        model,
        "text-generation",
        shown,
        whole,
        "log-probability",
        by,
        "removed",
        {_PART: text},
        tuple(
            Attribution(text[unit.start : unit.end], *unit, whole - other)
            for unit, other in zip(chosen, others, strict=True)
        ),
    )


def _asked(generate: Generate, text: str, answer: str, chat: bool) -> tuple[_Tokens, tuple[int, ...]]:
    """The prompt's tokens, and those of the answer: none where it is not given."""

    def tokens(text: str, *, chat: bool = False) -> _Tokens:
        prompt = [{"role": "user", "content": text}] if chat else text
        found = generate(prompt, max_tokens=0, return_prompt_token_ids=True, return_tokens=True)
        return _Tokens(found.prompt_token_ids, found.prompt_tokens)

    if not answer:
        return tokens(text, chat=chat), ()
    # The answer as it follows the prompt: its tokens are those that hold its bytes. Behind a template nothing joins.
    both = tokens(answer if chat else text + answer)
    length = len(answer.encode())
    rest = itertools.accumulate(len(piece) for piece in reversed(both.pieces))
    count = next((number for number, held in enumerate(rest, 1) if held >= length), len(both.ids))
    prompt = tokens(text, chat=True) if chat else _Tokens(both.ids[:-count], both.pieces[:-count])
    return prompt, both.ids[-count:]


def _spans(prompt: _Tokens, text: str) -> list[Span | None]:
    """The characters of the text that each token holds; None for those of a template, and special ones."""
    held, wanted = b"".join(prompt.pieces), text.strip()
    at = held.rfind(wanted.encode())
    if not wanted or at < 0:
        raise InvalidRequest("the text is not in the prompt as it is written: its tokenizer or its template changes it")
    # Of each byte of what was found the character that it belongs to.
    lead = len(text) - len(text.lstrip())
    characters = [lead + place for place, character in enumerate(wanted) for _ in character.encode()]
    spans: list[Span | None] = []
    end = -at
    for piece in prompt.pieces:
        start, end = end, end + len(piece)
        inside = characters[max(start, 0) : max(end, 0)]
        spans.append(Span(_PART, inside[0], inside[-1] + 1) if inside else None)
    return spans
