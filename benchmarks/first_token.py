"""The time to the first token of a lone request: served, and by the engine in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

from benchmarks.peers.trident import TridentEngine
from trident_client import Client
from trident_export import corpora
from trident_serving.runtime.tokenizer import TextTokenizer

PROMPT_TOKENS = 60
REQUESTS = 8  # of a round
ANSWER = 4  # tokens of an answer, so that the engine goes on while the first is sent
PAUSE = 0.05  # in which threads that spin fall asleep

Prompt = tuple[str, list[int]]


def prompts(tokenizer: TextTokenizer) -> Iterator[Prompt]:
    """Texts of 60 tokens without end, no two of which begin alike, so that no prefix is reused."""
    texts = [text for text in corpora.held_out() if len(text) > 400]
    for number in count(11):
        ids = tokenizer.encode(f"{number * 7919 % 9973} {texts[number % len(texts)]}")[:PROMPT_TOKENS]
        text = tokenizer.decode(ids)
        if tokenizer.encode(text) == ids:
            yield text, ids


def first_tokens(
    client: Client, model: str, engine: TridentEngine, made: Iterator[Prompt], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds to the first token of lone requests, one of each side in turns: both see the same machine."""
    found: dict[str, list[float]] = {"served": [], "in process": []}
    for _ in range(rounds * REQUESTS):
        text, ids = next(made)
        time.sleep(PAUSE)
        found["in process"].append(1e3 * engine.generate([ids], ANSWER)[0][0])
        time.sleep(PAUSE)
        started = time.perf_counter()
        stream = client.stream(text, model=model, max_tokens=ANSWER, min_tokens=ANSWER, prompt_lookup=False)
        next(stream)
        found["served"].append(1e3 * (time.perf_counter() - started))
        for _ in stream:
            pass
    return found
