"""A quantized base with an adapter is exported, gated against both unmerged, and answers as they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.unit import test_adapters, test_quantized
from trident_export import install
from trident_export.errors import ExportError
from trident_export.huggingface import sources
from trident_export.huggingface.adapters import AdaptedFolder
from trident_export.tasks import text_generation
from trident_serving.artefacts import VERSION, read_manifest

pytestmark = pytest.mark.filterwarnings("ignore")


def test_served_as_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models.make_causal(tmp_path / "base", "llama")
    folder = test_adapters.adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=test_adapters.LINEAR))
    test_quantized.quantize(base, *test_quantized.CASES["awq"])
    spec = test_adapters.spec_of(base, folder, tmp_path)
    repository = tmp_path / "repository"
    install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
    manifest = read_manifest(repository, "tiny")
    assert manifest is not None
    assert not manifest.unverified
    found = sources.fetch(spec, tmp_path, tmp_path, lambda message: None)
    prompts = [[5, 9, 44, 200], list(range(3, 40))]
    reference = found.reference(AutoModelForCausalLM)
    expected = [text_generation.greedy_answer(reference, ids) for ids in prompts]
    assert text_generation.served_answers(repository / "tiny" / VERSION, prompts) == expected

    # The gate sees it when the adapter is left out.
    monkeypatch.setattr(AdaptedFolder, "load", lambda self, head: self.base.load(head))
    monkeypatch.setattr(sources, "identity", lambda spec, base: "changed")
    with pytest.raises(ExportError, match="does not compute what Hugging Face computes"):
        install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
