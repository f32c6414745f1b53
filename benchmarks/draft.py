"""What a draft model gives: python -m benchmarks.draft [--model smollm2_fp32 --draft smollm2] [--streams 1 4 16].

An exported generator runs in this process with another one as its draft and without it, in turns, so that nothing but
the engine is measured. Both answer the same questions greedily, whole prompts included. Texts of their own draft in
both, as they do when served; other answers do not, because the questions come again in each round. Answers must be
equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.guided import Waiting
from trident_client import _wire
from trident_serving.artefacts import DRAFT, VERSION, DraftSettings
from trident_serving.generation.service import GenerationService
from trident_serving.schema.limits import GenerationLimits

CONTEXT = 1024
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "How do vaccines work?",
    "Give me a recipe for pancakes.",
    "What are the differences between a lake and a sea?",
    "Describe the water cycle.",
    "Why is the sky blue?",
    "Write a Python function that reverses a list, and explain it.",
    "What should I pack for a week in the mountains?",
    "Tell me about the history of the printing press.",
    "How does a refrigerator cool its inside?",
    "List five habits of people who sleep well.",
    "What is inflation, in simple words?",
    "Write a polite email that asks for a day off.",
    "How do bees make honey?",
]


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        seconds: from the first request to the last answer.
        cpu: seconds of all threads.
        tokens: of all answers.
        texts: the answers.
    """

    seconds: float
    cpu: float
    tokens: int
    texts: list[str]


def version_folder(folder: Path, repository: Path, model: str, draft: str) -> Path:
    """A version folder of links to a model's files, and to those of another model that drafts; "": none does."""
    folder.mkdir()
    for file in (repository / model / VERSION).resolve().iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    if draft:
        (folder / DRAFT).mkdir()
        for file in (repository / draft / VERSION).resolve().glob("model.onnx*"):
            (folder / DRAFT / file.name).symlink_to(file)
        DraftSettings(draft, CONTEXT, 128).write(folder / DRAFT)
    return folder


def ask(service: GenerationService, question: str, tokens: int) -> tuple[str, int]:
    """The text of an answer, and how many tokens it has."""
    messages = json.dumps([{"role": "user", "content": question}])
    inputs = {"messages": _wire.texts([messages])[None], "max_tokens": np.array([[tokens]], np.int32)}
    channel = Waiting()
    service.submit(service.parse(inputs), channel)
    channel.done.wait()
    if channel.error is not None:
        raise channel.error
    assert channel.chunk is not None
    return channel.chunk.text, channel.chunk.num_output_tokens


def run(service: GenerationService, streams: int, questions: Sequence[str], tokens: int) -> Round:
    """All questions, so many at once."""
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(streams) as pool:
        found = list(pool.map(lambda question: ask(service, question, tokens), questions))
    took = time.perf_counter() - started, time.process_time() - cpu
    return Round(*took, sum(count for _, count in found), [text for text, _ in found])


def main() -> int:
    """Print medians; status 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="smollm2_fp32")
    parser.add_argument("--draft", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    limits = GenerationLimits(context=CONTEXT, slots=16, threads=options.threads, prefix_reuse=False, ngram_pool=False)
    questions, wrong = QUESTIONS[: options.questions], False
    with tempfile.TemporaryDirectory() as temporary:
        services = {
            name: GenerationService(
                version_folder(Path(temporary) / name, options.repository, options.model, draft), limits
            )
            for name, draft in (("without", ""), ("with", options.draft))
        }
        try:
            for streams in options.streams:
                rounds: dict[str, list[Round]] = {name: [] for name in services}
                services["with"].recorder.drain()
                for _ in range(options.rounds):
                    for name, service in services.items():
                        rounds[name].append(run(service, streams, questions, options.tokens))
                wrong |= any(one.texts != rounds["without"][0].texts for each in rounds.values() for one in each)
                print(_line(streams, rounds, services["with"]), flush=True)
        finally:
            for service in services.values():
                service.stop()
    if wrong:
        print("answers differ")
    return int(wrong)


def _line(streams: int, rounds: dict[str, list[Round]], drafted: GenerationService) -> str:
    counters = drafted.recorder.drain().counters
    shown = []
    for name, each in rounds.items():
        speed = statistics.median(one.tokens / one.seconds for one in each)
        cpu = statistics.median(1000 * one.cpu / one.tokens for one in each)
        shown.append(f"{speed:.1f} tokens/s and {cpu:.1f} ms of CPU a token {name}")
    faster = statistics.median(
        without.seconds / one.seconds for without, one in zip(rounds["without"], rounds["with"], strict=True)
    )
    right = counters["model_draft_tokens_accepted"], counters["model_draft_tokens"]
    return (
        f"{streams} streams: {', '.join(shown)}: {faster:.2f} times as fast; "
        f"{right[0]} of {right[1]} tokens of the draft were right, of {counters['generated_tokens']} in all"
    )


if __name__ == "__main__":
    raise SystemExit(main())
