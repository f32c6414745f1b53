"""The good requests of a soak, and the check of their answers.

The expected answers are the server's own before there is any traffic. A generator's answer does not depend on the rest
of its batch, to the last bit and with its log-probabilities; an embedding may differ by the amount that
docs/reference/precisions.md gives for a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype

from trident_serving.schema.fields import GENERATION, by_name

Answer = dict[str, list[Any]]

FIELDS = by_name(GENERATION)
GENERATED = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "output_log_probs")
SPANS = ("answer", "score", "start", "end", "no_answer_score")


@dataclass(frozen=True)
class Case:
    """One good request.

    Attributes:
        name: of the case; no two are the same.
        model: the Triton model.
        fields: its inputs by name: a text, a number, or a list of texts.
        outputs: the names of the outputs that are compared.
        tolerance: by how much numbers may differ from the expected ones; 0: not at all.
        rows: whether each text is a row of the batch, as encoders take them.
    """

    name: str
    model: str
    fields: Mapping[str, Any] = field(hash=False)
    outputs: Sequence[str] = GENERATED
    tolerance: float = 0.0
    rows: bool = False


ARTICLES = (
    "The Amazon rainforest covers most of the Amazon basin of South America. The majority of the forest, 60%, is in "
    "Brazil, followed by Peru with 13%. It has an estimated 390 billion individual trees.",
    "The Danube rises in the Black Forest and flows for 2,850 kilometres through ten countries to the Black Sea.",
)
SENTENCES = (
    "A cat sleeps on the sofa beside the window.",
    "The server answers many questions about models that it holds in memory every day.",
    "Rivers carry more water in spring, when the snow of the mountains melts.",
    "Zażółć gęślą jaźń, 中文 and an emoji 😀.",
)


def _generations(model: str) -> list[Case]:
    log_probs = {"return_log_probs": True}
    chat = '[{"role": "user", "content": "What is the capital of France?"}]'
    greedy: list[dict[str, Any]] = [
        {"text_input": "The capital of France is", "max_tokens": 40},
        {"text_input": "1, 2, 3, 4,", "max_tokens": 32} | log_probs,
        {"text_input": "Once upon a time there was a king", "max_tokens": 64},
        {"text_input": f"{ARTICLES[0]}\n\nThe same text once more:\n\nThe Amazon", "max_tokens": 48} | log_probs,
        {"messages": chat, "max_tokens": 24},
        {"messages": chat.replace("France", "Japan"), "max_tokens": 24} | log_probs,
        {"text_input": "Write about trains:", "max_tokens": 32, "repetition_penalty": 1.4},
        {"text_input": "a b c d e f", "max_tokens": 24, "stop_words": ["j"]},
        {"text_input": "😀 中文", "max_tokens": 16},
    ]
    sampled: list[dict[str, Any]] = [
        {"text_input": f"Tell a story, number {seed}:", "max_tokens": 32, "temperature": 0.9, "random_seed": seed}
        for seed in range(4)
    ]
    sampled[0] |= log_probs
    sampled[1] |= {"top_p": 0.9, "top_k": 40}
    return [
        Case(f"{model} {kind} {number}", model, fields)
        for kind, several in (("greedy", greedy), ("sampled", sampled))
        for number, fields in enumerate(several)
    ]


def _templates() -> list[Case]:
    cases = [
        Case(f"translate {number}", "translate", {"text_input": text, "max_tokens": 24})
        for number, text in enumerate(("Le chat est sur la table.", "Bonjour tout le monde.", "Il pleut beaucoup."))
    ]
    cases.append(Case("translate 3", "translate", {"text_input": "Good morning", "target_lang": "Spanish"}))
    cases += [
        Case(f"summarize {number}", "summarize", {"text_input": text, "max_tokens": 32})
        for number, text in enumerate(ARTICLES)
    ]
    questions = (["How many trees are there?"], ["Where is it?", "How many countries are there?"])
    cases += [
        Case(f"answer {number}", "answer", {"question": asked, "context": list(ARTICLES[: len(asked)])}, SPANS)
        for number, asked in enumerate(questions)
    ]
    return cases


def _embeddings(model: str, tolerance: float) -> list[Case]:
    batches = [[text] for text in SENTENCES[:3]] + [list(SENTENCES), [ARTICLES[0], SENTENCES[3]]]
    return [
        Case(f"{model} {number}", model, {"text_input": batch}, ("embedding",), tolerance, rows=True)
        for number, batch in enumerate(batches)
    ]


# All cases of the default models, by kind.
GENERATIONS = _generations("smollm2")
CACHED = [Case(f"smollm2_int8_cache {case.name}", "smollm2_int8_cache", case.fields) for case in GENERATIONS[:4]]
TEMPLATES = _templates()
EMBEDDINGS = _embeddings("minilm", 1e-5) + _embeddings("minilm_int8", 1e-3)
# Requests of the models that are loaded and unloaded meanwhile.
RELOADED = {
    "minilm_int8_static": _embeddings("minilm_int8_static", 1e-3)[:3],
    "smollm2_int4": [Case(f"smollm2_int4 {case.name}", "smollm2_int4", case.fields) for case in GENERATIONS[:2]],
}


def tensors(case: Case) -> dict[str, NDArray[Any]]:
    """The inputs of a case as the protocol carries them."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in case.fields.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], str):
            array = np.array([text.encode() for text in values], dtype=np.object_)
        else:
            array = np.array(values, dtype=triton_to_np_dtype(FIELDS[name].dtype))
        if case.rows:
            found[name] = array[:, None]
        else:
            found[name] = array if case.model == "answer" else array[None]
    return found


def flat(array: NDArray[Any]) -> list[Any]:
    """A tensor's values, texts decoded."""
    values = array.reshape(-1).tolist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def from_json(body: Mapping[str, Any], outputs: Sequence[str]) -> Answer:
    """The outputs that an answer of the generate endpoint holds, in the form of `flat`."""
    found: Answer = {}
    for name in outputs:
        if name in body:
            value = body[name]
            values = value if isinstance(value, list) else [value]
            found[name] = [float(np.float32(each)) if isinstance(each, float) else each for each in values]
    return found


def join(chunks: Sequence[Answer]) -> Answer:
    """One answer of the responses of a stream: texts and log-probabilities joined, the rest from the last."""
    if not chunks:
        return {}
    joined = dict(chunks[-1])
    joined["text_output"] = ["".join(chunk["text_output"][0] for chunk in chunks)]
    joined["output_log_probs"] = [value for chunk in chunks for value in chunk["output_log_probs"]]
    return joined


def difference(case: Case, expected: Answer, found: Answer) -> str:
    """What is wrong with an answer, in one line; "" where it is right."""
    for name in case.outputs:
        if name not in found:
            return f"{name} is missing"
        want, got = expected[name], found[name]
        if len(want) != len(got):
            return f"{name} has {len(got)} values, expected {len(want)}: {_short(got)} for {_short(want)}"
        if case.tolerance:
            worst = float(np.abs(np.subtract(want, got)).max(initial=0.0))
            if not worst <= case.tolerance:  # NaN included
                return f"{name} differs by {worst:.3g}, the limit is {case.tolerance:g}"
        elif want != got:
            return f"{name} is {_short(got)}, expected {_short(want)}"
    return ""


def _short(values: list[Any]) -> str:
    text = repr(values[0] if len(values) == 1 else values)
    return text if len(text) <= 200 else f"{text[:200]}..."
