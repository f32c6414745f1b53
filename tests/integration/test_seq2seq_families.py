"""Encoder-decoders whose graphs take a way of their own, run by the engine that serves, against `generate`.

`make families` does the same with every type. Texts are longer than windows and than what an expert takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import families_seq2seq
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs.seq2seq import export_encoder
from trident_export.huggingface.folder import HuggingFaceFolder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


# Experts that take few tokens; windows of an encoder; heads that share keys, and a decoder's rotation, soft cap and
# windows.
@pytest.mark.parametrize("name", ["switch_transformers", "led", "t5gemma"])
def test_every_token_is_that_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families_seq2seq, "BEAMS", (2,))
    monkeypatch.setattr(families_seq2seq, "LENGTHS", (5, 64))
    monkeypatch.setattr(families_seq2seq, "TOKENS", 12)
    monkeypatch.setitem(families_seq2seq.SIZES, "num_experts", 2)
    assert families_seq2seq.check(name) == ""


def test_experts_that_transformers_itself_runs_wrongly_are_refused(tmp_path: Path) -> None:
    """Once it runs others than the first two, this is served as Switch is."""
    config: Any = families_seq2seq.tiny("nllb-moe")
    assert isinstance(config, NllbMoeConfig)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    ran = []
    for number, expert in enumerate(model.model.encoder.layers[0].ffn.experts.values()):
        expert.register_forward_hook(lambda module, inputs, output, number=number: ran.append(number))
    with torch.inference_mode():
        model.model.encoder(input_ids=torch.arange(3, 63)[None])
    assert ran == [0, 1]
    with pytest.raises(UnsupportedArchitecture, match="runs the first two experts of an NLLB mixture for every token"):
        export_encoder(model, tmp_path / "encoder.onnx")


@pytest.mark.parametrize("name", ["led", "t5gemma"])
def test_the_longest_source_is_what_the_encoder_has_positions_for(tmp_path: Path, name: str) -> None:
    families_seq2seq.tiny(name).save_pretrained(tmp_path)
    assert HuggingFaceFolder(tmp_path).longest_input == families_seq2seq.CONTEXT
