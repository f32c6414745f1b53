"""What grammars cost, and whether every answer follows its own: python -m benchmarks.guided [--schemas 1000].

An exported generator runs in this process, so that nothing but the engine is measured. Random JSON schemas are answered
16 at a time; each answer must parse and have its schema's form, unless `max_tokens` cut it. The cost is the time of 16
streams under a grammar that allows every text, over that of the same streams without one, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trident_client import _wire
from trident_serving.generation.service import GenerationService
from trident_serving.generation.stream import Chunk
from trident_serving.schema.limits import GenerationLimits

STREAMS = 16
PROMPTS = ["Describe a person as JSON:", "A recipe:", "The weather today is", "My favourite book:", "{"]
ANYTHING = r"(?s:.*)"


class Waiting:
    """A channel that waits for its last chunk."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.chunk: Chunk | None = None
        self.error: Exception | None = None

    def send(self, chunk: Chunk) -> None:
        """The answer."""
        self.chunk = chunk
        self.done.set()

    def fail(self, error: Exception) -> None:
        """It failed."""
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        """Never."""
        return False


def ask(service: GenerationService, prompt: str, **fields: Any) -> Chunk:
    """One answer."""
    inputs = {"text_input": _wire.texts([prompt])[None]}
    for name, value in fields.items():
        if isinstance(value, str):
            inputs[name] = _wire.texts([value])[None]
        else:
            inputs[name] = np.array([[value]], np.float32 if isinstance(value, float) else np.int32)
    channel = Waiting()
    service.submit(service.parse(inputs), channel)
    channel.done.wait()
    if channel.error is not None:
        raise channel.error
    assert channel.chunk is not None
    return channel.chunk


def random_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of objects, lists and values."""
    kinds = ["string", "integer", "number", "boolean", "enum", "null"] + ["object", "array"] * (depth < 3)
    kind = "object" if depth == 0 else source.choice(kinds)
    if kind == "object":
        names = [f"{source.choice(['name', 'age', 'size', 'tag', 'id', 'ü'])}{index}" for index in range(1, 5)]
        names = names[: source.randint(1, 4)]
        properties = {name: random_schema(source, depth + 1) for name in names}
        return {"type": kind, "properties": properties, "required": names, "additionalProperties": False}
    if kind == "array":
        return {"type": kind, "items": random_schema(source, depth + 1), "maxItems": source.randint(0, 3)}
    if kind == "enum":
        return {"enum": source.sample(["red", "green", 1, 2.5, None, True, 'a "quoted" one'], 3)}
    if kind == "string":
        return {"type": kind, "maxLength": source.randint(1, 20)} | (
            {"pattern": "^[a-z]+$"} if source.random() < 0.3 else {}
        )
    if kind == "integer":
        return {"type": kind, "minimum": -5, "maximum": 500}
    return {"type": kind}


def follows(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value has the form of a schema of `random_schema`."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "object":
        parts = schema["properties"]
        return isinstance(value, dict) and set(value) == set(parts) and all(follows(value[k], parts[k]) for k in parts)
    if schema["type"] == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(follows(v, schema["items"]) for v in value)
        )
    if schema["type"] == "string":
        plain = "pattern" not in schema or (value.isascii() and value.isalpha() and value.islower())
        return isinstance(value, str) and len(value) <= schema["maxLength"] and plain
    if schema["type"] == "integer":
        return type(value) is int and -5 <= value <= 500
    kinds: dict[str, tuple[type, ...]] = {"number": (int, float), "boolean": (bool,), "null": (type(None),)}
    return isinstance(value, kinds[schema["type"]])


def check_schemas(service: GenerationService, count: int) -> dict[str, int]:
    """How many answers are complete and right, cut, or wrong."""
    source = random.Random(0)
    asked = [
        (source.choice(PROMPTS), random_schema(source), float(source.choice([0.0, 0.7, 1.2]))) for _ in range(count)
    ]

    def judge(each: tuple[str, dict[str, Any], float]) -> str:
        prompt, schema, temperature = each
        answer = ask(service, prompt, max_tokens=160, temperature=temperature, guided_json=json.dumps(schema))
        if answer.finish_reason == "length":
            return "cut"
        try:
            return "right" if follows(json.loads(answer.text), schema) else "wrong"
        except ValueError:
            return "wrong"

    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(judge, asked))
    return {kind: found.count(kind) for kind in ("right", "cut", "wrong")}


def cost(service: GenerationService, rounds: int, tokens: int) -> tuple[float, float]:
    """Seconds of 16 streams without a grammar and with one that allows everything, medians over rounds in turns."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in range(rounds):
            for guided in (False, True):
                more: dict[str, Any] = {"max_tokens": tokens, "temperature": 0.5}
                more |= {"guided_regex": ANYTHING} if guided else {}
                started = time.perf_counter()
                prompts = [f"{index}. {PROMPTS[index % 4]}" for index in range(STREAMS)]
                list(pool.map(lambda prompt, more=more: ask(service, prompt, **more), prompts))
                taken[guided].append(time.perf_counter() - started)
    return statistics.median(taken[False][1:]), statistics.median(taken[True][1:])


def main() -> int:
    """Print what was found; status 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    limits = GenerationLimits(context=1024, slots=STREAMS, max_waiting=128, default_max_tokens=64, threads=0)
    service = GenerationService(options.repository / options.model / "1", limits)
    try:
        free, guided = cost(service, options.rounds, 48)
        print(
            f"{STREAMS} streams: {free:.2f} s free, {guided:.2f} s under a grammar: {guided / free - 1:+.1%}",
            flush=True,
        )
        found = check_schemas(service, options.schemas)
        print(f"{options.schemas} schemas: {found['right']} right, {found['cut']} cut, {found['wrong']} wrong")
    finally:
        service.stop()
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
