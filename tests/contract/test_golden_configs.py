"""One config.pbtxt of each kind is written out, so that a diff shows every change of what Triton is told.

TRIDENT_WRITE_GOLDEN=1 writes the files again.
"""

from __future__ import annotations

import os
from dataclasses import fields
from itertools import pairwise

import pytest

from tests.conftest import ROOT
from trident_export import configs, models_file
from trident_serving import encoders

GOLDEN = ROOT / "tests" / "golden"
GENERATOR = {
    "task": "text-generation",
    "source": {"path": "x"},
    "variants": ["int8"],
    "limits": {"slots": 4},
    "adapters": {"polite": "a", "sql": "b"},
}
VLLM = {
    "task": "text-generation",
    "source": {"path": "x"},
    "engine": "vllm",
    "variants": ["bf16"],
    "limits": {"slots": 4},
    "vllm": {"tensor_parallel_size": 2},
}
SEQ2SEQ = {"task": "translation", "source": {"path": "x"}, "variants": ["fp32"], "limits": {"long_input": "window"}}
SPEECH = {"task": "automatic-speech-recognition", "source": {"path": "x"}, "variants": ["fp32"], "limits": {}}
TEMPLATE = {
    "task": "translation",
    "generator": "generator",
    "template": "To {{ target_lang }}: {{ text_input }}",
    "target_lang": "English",
}


def _encoder(task: str, **limits: object) -> dict[str, object]:
    return {"task": task, "source": {"path": "x"}, "variants": ["fp32"], "limits": limits}


# The file's name by the table and the Triton model of it that is written out.
KINDS = {
    "generator": (GENERATOR, "x"),
    "vllm": (VLLM, "x"),
    "seq2seq": (SEQ2SEQ, "x"),
    "speech": (SPEECH, "x"),
    "template": (TEMPLATE, "x"),
    "ensemble": (_encoder("text-classification", labels=3), "x"),
    "tokenizer": (_encoder("text-classification", labels=3), "x_tokenizer"),
    "onnxruntime": (_encoder("text-classification", labels=3), "x_model"),
    "postprocess": (_encoder("text-classification", labels=3), "x_postprocess"),
    "ensemble_of_windows": (_encoder("question-answering", stride=64), "x"),
    "ensemble_of_embeddings": (
        _encoder("feature-extraction", dimensions=8, matryoshka=[4]) | {"prompts": True},
        "x",
    ),
    "ensemble_of_images": (_encoder("image-classification", labels=3), "x"),
    "ensemble_of_towers": (_encoder("zero-shot-image-classification", dimensions=8), "x"),
    "preprocess": (_encoder("zero-shot-image-classification", dimensions=8), "x_preprocess"),
    "explanation": (_encoder("text-classification", labels=3) | {"explain": {"max_runs": 8}}, "x_explain"),
    "ensemble_of_lists": (_encoder("feature-extraction", dimensions=8), "x_texts"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_as_it_was(kind: str) -> None:
    table, name = KINDS[kind]
    text = configs.to_text(configs.build(models_file.parse("x", table))[name])
    file = GOLDEN / f"{kind}.pbtxt"
    if os.environ.get("TRIDENT_WRITE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", encoders.TASKS)
def test_no_two_steps_of_an_ensemble_run_at_once(task: str) -> None:
    """Each reads what the one before it gives. Triton ends where a request is cancelled while two of its steps run."""
    known = {field.name for field in fields(models_file.LIMITS[task])}
    limits = {name: 8 for name in ("dimensions", "labels") if name in known}
    ensemble = configs.build(models_file.parse("x", _encoder(task, **limits)))["x"]
    steps = ensemble.ensemble_scheduling.step
    assert len(steps) >= 3
    for before, step in pairwise(steps):
        assert set(before.output_map.values()) & set(step.input_map.values()), step.model_name
