"""Takes units from a prompt, and asks a server how probable the answer still is: the drop of its log-probability.

Tokens are removed, and the others stay the same tokens; a generator has no mask token. Nothing is generated but the
answer to the whole prompt, if it is not given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from trident_client import Client, Message, TridentError
from trident_export.errors import TextError
from trident_export.explanation.units import Attribution, By, Explanation, Span, units

CALLERS = 8
TOKENS = 64  # of an answer that is not given
_PART = "text_input"


@dataclass(frozen=True)
class _Tokens:
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


def explain(
    client: Client, model: str, text: str, *, by: By, answer: str = "", chat: bool = False, max_tokens: int = TOKENS
) -> Explanation:
    """What the answer to a prompt rests on, in nats.

    Args:
        answer: "": what the model answers greedily.
        chat: whether the text is a message, for the model's chat template.
        max_tokens: of an answer that the model gives.

    Raises:
        TextError: the server refuses the text or can't be asked, the prompt has no such units, or there is no answer.
    """
    try:
        prompt, given, shown = _asked(client, model, text, answer, chat, max_tokens)
        spans = _spans(prompt, text)
        chosen = units(_PART, text, by, [span for span in spans if span is not None])
        hidden = [[span is not None and span.touches(unit) for span in spans] for unit in chosen]
        nothing = [False] * len(spans)

        def log_prob(taken: Sequence[bool]) -> float:
            kept = [token for token, away in zip(prompt.ids, taken, strict=True) if not away]
            if not kept:
                raise TextError("without one of its parts nothing is left of the prompt: explain it by smaller ones")
            found = client.generate([*kept, *given], model=model, max_tokens=0, prompt_logprobs=0)
            return sum(found.prompt_log_probs[-len(given) :])

        with ThreadPoolExecutor(CALLERS) as pool:
            whole, *others = pool.map(log_prob, [nothing, *hidden])
    except TridentError as error:
        raise TextError(f"the server says: {error}") from error
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


def _asked(
    client: Client, model: str, text: str, answer: str, chat: bool, max_tokens: int
) -> tuple[_Tokens, tuple[int, ...], str]:
    """The prompt's tokens, those of the answer, and its text."""

    def tokens(text: str, *, chat: bool = False) -> _Tokens:
        prompt: str | list[Message] = [{"role": "user", "content": text}] if chat else text
        found = client.generate(prompt, model=model, max_tokens=0, return_prompt_token_ids=True, return_tokens=True)
        return _Tokens(found.prompt_token_ids, found.prompt_tokens)

    if not answer:
        prompt = tokens(text, chat=chat)
        found = client.generate(list(prompt.ids), model=model, max_tokens=max_tokens, temperature=0, return_tokens=True)
        if not found.token_ids:
            raise TextError("the model answers nothing: give an answer with --answer")
        return prompt, found.token_ids, found.text
    # The answer as it follows the prompt: its tokens are those that hold its bytes. Behind a template nothing joins.
    both = tokens(answer if chat else text + answer)
    length = len(answer.encode())
    rest = itertools.accumulate(len(piece) for piece in reversed(both.pieces))
    count = next((number for number, held in enumerate(rest, 1) if held >= length), len(both.ids))
    prompt = tokens(text, chat=True) if chat else _Tokens(both.ids[:-count], both.pieces[:-count])
    return prompt, both.ids[-count:], answer


def _spans(prompt: _Tokens, text: str) -> list[Span | None]:
    """The characters of the text that each token holds; None for those of a template, and special ones."""
    held, wanted = b"".join(prompt.pieces), text.strip()
    at = held.rfind(wanted.encode())
    if not wanted or at < 0:
        raise TextError("the text is not in the prompt as it is written: its tokenizer or its template changes it")
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
