"""Answers of transformers' question-answering pipeline, which its version 5 no longer has, and how they were recorded.

python -m tests.golden.question_answering make FOLDER              here: models and questions
python tests/golden/question_answering.py answer FOLDER            where transformers 4.57.6 is: question_answering.json
"""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

ANSWERS = Path(__file__).with_suffix(".json")
FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet")
WINDOWS = {"max_seq_len": 96, "doc_stride": 24}


@cache
def questions() -> list[tuple[str, str, dict[str, Any]]]:
    """Fifty questions; contexts from one window to a dozen; the pipeline's options."""
    from trident_export import corpora

    generator = random.Random(5)
    paragraphs = [text.encode()[:240].decode(errors="ignore") for text in corpora.held_out()]
    found = []
    for row in range(50):
        context = "\n".join(generator.sample(paragraphs, 1 + row % 4))
        question = paragraphs[row % len(paragraphs)].encode()[: 12 + row % 16].decode(errors="ignore")
        options = {"top_k": 1 + row % 3, "handle_impossible_answer": row % 2 == 0, "max_answer_len": 8 + row % 10}
        found.append((question.strip() + "?", context, options))
    return found


@cache
def answers() -> dict[str, list[list[tuple[int, int, float]]]]:
    """By model, of each question its answers: first character, the one behind the last, score."""
    return json.loads(ANSWERS.read_text(encoding="utf-8"))


def _make(folder: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    from tests import tiny_models

    for family in FAMILIES:
        path = folder / f"qa-{family}"
        tiny_models.settle(tiny_models.make_reader(path, family, AutoModelForQuestionAnswering))
        # What version 4 wants to be told in its own words.
        file = path / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, "extra_special_tokens": {}}), encoding="utf-8")
    (folder / "questions.json").write_text(json.dumps(questions()), encoding="utf-8")


def _answer(folder: Path) -> None:
    from transformers import pipeline

    found = {}
    for family in FAMILIES:
        path = str(folder / f"qa-{family}")
        pipe = pipeline("question-answering", model=path, tokenizer=path, device="cpu")
        rows = []
        for question, context, options in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            given = pipe(question=question, context=context, **WINDOWS, **options)
            given = given if isinstance(given, list) else [given]
            rows.append([(a["start"], a["end"], round(a["score"], 7)) for a in given])
            assert all(a["answer"] == context[a["start"] : a["end"]] for a in given)
        found[f"qa-{family}"] = rows
    ANSWERS.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    {"make": _make, "answer": _answer}[sys.argv[1]](Path(sys.argv[2]))
