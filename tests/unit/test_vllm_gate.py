"""How the gate compares the likeliest tokens that vLLM tells with Hugging Face's logits of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trident_export.errors import FidelityError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.tasks.vllm import Told, compare, difference, filled, link_folder

VOCABULARY, TEXT, ANSWER = 50, [1, 2, 3, 4, 5], [6, 7, 8]
ROWS = len(TEXT) + len(ANSWER) - 1


def told(log_probs: NDArray[np.float64], count: int, tokens: list[int] = ANSWER) -> Told:
    """What vLLM would tell of a distribution: its likeliest tokens."""
    ids = np.argsort(-log_probs, axis=-1, kind="stable")[:, :count]
    return Told(tokens, ids, np.take_along_axis(log_probs, ids, axis=-1).astype(np.float32))


@pytest.fixture
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize("count", [10, VOCABULARY])
def test_the_same_model_passes(logits: NDArray[np.float32], count: int) -> None:
    found = compare([TEXT], [ANSWER], [logits], [told(fidelity.log_softmax(logits), count)])
    assert found["kl"] < 1e-6
    assert (found["top1"], found["tokens"]) == (1.0, ROWS)
    assert found["perplexity"] == pytest.approx(found["hf_perplexity"], rel=1e-5)
    fidelity.check("text-generation", "fp32", found | {"batch_effect": 0.0}, precision="vllm_fp32")


def test_the_rest_counts_as_one_token(logits: NDArray[np.float32]) -> None:
    other = fidelity.log_softmax(logits + np.random.default_rng(1).normal(0, 0.5, logits.shape))
    given = told(other, 10)
    rows = filled(given, logits)
    np.testing.assert_allclose(np.exp(rows).sum(axis=-1), 1, atol=1e-5)
    expected = []
    for own, theirs, ids in zip(fidelity.log_softmax(logits), other, given.ids, strict=True):
        p, q = (np.append(np.exp(each[ids]), 1 - np.exp(each[ids]).sum()) for each in (own, theirs))
        expected.append((p * np.log(p / q)).sum())
    found = compare([TEXT], [ANSWER], [logits], [given])["kl"]
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
    whole = compare([TEXT], [ANSWER], [logits], [told(other, VOCABULARY)])["kl"]
    assert found < whole < 1.5 * found  # a bound from below, and near
    with pytest.raises(FidelityError, match="vllm|fp32 does not compute what Hugging Face computes: kl is"):
        fidelity.check("text-generation", "fp32", {"kl": found, "top1": 1, "batch_effect": 0}, precision="vllm_fp32")


def test_behind_another_token_nothing_is_compared(logits: NDArray[np.float32]) -> None:
    same = fidelity.log_softmax(logits)
    wrong = same.copy()
    wrong[-1] = wrong[-1, ::-1]  # behind another prefix
    given = told(wrong, VOCABULARY, [6, 9, 8])
    found = compare([TEXT], [ANSWER], [logits], [given])
    assert found["tokens"] == ROWS - 1
    assert found["kl"] < 1e-6
    assert compare([TEXT], [ANSWER], [logits], [told(wrong, VOCABULARY)])["kl"] > 0.1


def test_the_difference_of_two_runs(logits: NDArray[np.float32]) -> None:
    first = fidelity.log_softmax(logits)
    second = first.copy()
    second[2, first[2].argmax()] += 0.25
    assert difference(told(first, 5), told(first, 5)) == 0
    assert difference(told(first, 5), told(second, 5)) == pytest.approx(0.25, abs=1e-6)
    second = first.copy()
    second[-1] += 1  # behind another token
    assert difference(told(first, 5), told(second, 5, [6, 9, 8])) == 0


def test_a_folder_is_linked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "README.md", "x.gguf"):
        (source / name).write_text(name)
    for trusted, code in ((False, []), (True, ["modeling_x.py"])):
        target = tmp_path / f"target-{trusted}"
        link_folder(HuggingFaceFolder(source, trust_remote_code=trusted), target)
        assert sorted(file.name for file in target.iterdir()) == sorted(["config.json", "model.safetensors", *code])
    assert (target / "model.safetensors").samefile(source / "model.safetensors")
