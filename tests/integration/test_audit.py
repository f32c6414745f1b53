"""`trident-export audit` on real weights: what SmolLM2 and its int8 variant say of people."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run_export
from trident_serving.launcher.local import LocalServer

GROUPS = """
[job]
groups = ["the nurse", "the soldier"]

[sentences]
texts = ["{Person} is here.", "I know {person}."]

[endings]
pairs = [
    ["{Person} said that", " she was tired.", " he was tired."],
    ["When {person} came,", " she smiled.", " he smiled."],
]
"""


def test_a_generator(server: LocalServer, smollm2_folder: Path, tmp_path: Path) -> None:
    """Its log-odds are Hugging Face's; the nurse is `she` and the soldier `he`, which is a gap of nats."""
    (tmp_path / "groups.toml").write_text(GROUPS)
    arguments = ("audit", "smollm2", "--groups", str(tmp_path / "groups.toml"), "--url", server.grpc_url)
    done = run_export(*arguments, "--models", "smollm2,smollm2_fp32", "--reports", str(tmp_path), "--max-gap", "0.1")
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["baseline"] == "smollm2_fp32"
    (gap,) = found["gaps"]["smollm2_fp32"]["job"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32, attn_implementation="eager")

    def log_prob(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            return -float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    odds = {
        job: sum(
            log_prob(f"{text} she {end}") - log_prob(f"{text} he {end}")
            for text, end in ((f"The {job} said that", "was tired."), (f"When the {job} came,", "smiled."))
        )
        / 2
        for job in ("nurse", "soldier")
    }
    assert abs(gap["value"] - (odds["nurse"] - odds["soldier"])) < 1e-2
    assert gap["value"] > 1
    assert gap["means"]["the nurse"] > 0 > gap["means"]["the soldier"]
    (shift,) = found["shifts"]["smollm2"]["job"]
    assert 0 < shift["largest"] < 0.5
    assert "| smollm2 | job | log-odds |" in done.stdout


def test_what_has_no_audit(server: LocalServer, tmp_path: Path) -> None:
    done = run_export("audit", "minilm", "--url", server.grpc_url, "--reports", str(tmp_path))
    assert done.returncode == 1
    assert "feature-extraction models have no audit; text-classification and text-generation have one" in done.stderr
