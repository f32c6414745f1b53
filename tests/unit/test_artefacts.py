"""The format of artefacts: what it covers, and that an artefact of another format is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from trident_serving import artefacts
from trident_serving.artefacts import FORMAT, DraftSettings, Manifest, VllmBuild

# The fields of what an artefact holds, by format. A field that is added with a default, which older artefacts may leave
# out, changes only this list; where a reader would misunderstand an older artefact, FORMAT is raised too.
HELD = {
    2: {
        "Manifest": (
            "name task triton_models public_models fingerprint fidelity unverified aliases drafts processor recipes "
            "files source licences format engine image_tokens"
        ),
        "VllmBuild": "version dtype trust_remote_code",
        "DraftSettings": "name context longest_run",
        "GenerationDefaults": (
            "prompt eos_token_ids max_length min_length num_beams length_penalty early_stopping repetition_penalty "
            "no_repeat_ngram_size bad_words forced_bos_token_id forced_eos_token_ids suppress_tokens "
            "begin_suppress_tokens"
        ),
    }
}


def _manifest() -> Manifest:
    return Manifest("m", "text-generation", ["m"], {"fp32": "m"}, "f")


def test_the_fields_that_artefacts_hold_are_those_of_their_format() -> None:
    from trident_serving.seq2seq.request import GenerationDefaults

    for kind in (Manifest, DraftSettings, VllmBuild, GenerationDefaults):
        assert " ".join(field.name for field in dataclasses.fields(kind)) == HELD[FORMAT][kind.__name__]


def test_an_artefact_of_another_format_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    _manifest().write(folder)
    found = artefacts.read_manifest(tmp_path, "m")
    assert found == dataclasses.replace(_manifest(), format=FORMAT)
    assert artefacts.loadable(tmp_path) == ["m"]
    written = json.loads((folder / "trident.json").read_text())
    for other in ({"format": FORMAT + 1}, {"format": FORMAT - 1}, {"format": None}):
        (folder / "trident.json").write_text(json.dumps(written | other))
        assert artefacts.read_manifest(tmp_path, "m") is None
    del written["format"]
    (folder / "trident.json").write_text(json.dumps(written))
    assert artefacts.read_manifest(tmp_path, "m") is None


def test_a_config_without_an_artefact_of_this_format_is_called_unexported(tmp_path: Path) -> None:
    for name in ("m", "m_int8", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(artefacts.CONFIG_HEADER if name != "other" else "")
    assert artefacts.unexported(tmp_path) == ["m"]
    (tmp_path / "m" / "1").mkdir()
    _manifest().write(tmp_path / "m" / "1")
    assert artefacts.unexported(tmp_path) == []


CONFIG = """\
name: "m"
max_batch_size: 4
input {
  name: "text_input"
  data_type: TYPE_STRING
  dims: 1
  reshape {
    shape: 2
  }
}
input {
  name: "mask"
  data_type: TYPE_INT64
  dims: -1
  dims: 3
  optional: true
}
output {
  name: "score"
  data_type: TYPE_FP32
  dims: -1
}
ensemble_scheduling {
  step {
    model_name: "m_tokenizer"
    input_map {
      key: "text_input"
      value: "text_input"
    }
  }
}
"""


def test_a_config_says_inputs_and_outputs(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text(CONFIG)
    expected = {
        "input": [
            {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
            {"name": "mask", "data_type": "TYPE_INT64", "dims": [-1, 3], "optional": True},
        ],
        "output": [{"name": "score", "data_type": "TYPE_FP32", "dims": [-1]}],
        "max_batch_size": 4,
        "model_transaction_policy": {"decoupled": False},
    }
    assert artefacts.signature(tmp_path, "m") == expected
    with (tmp_path / "m" / "config.pbtxt").open("a") as config:
        config.write("model_transaction_policy {\n  decoupled: true\n}\n")
    assert artefacts.signature(tmp_path, "m") == expected | {"model_transaction_policy": {"decoupled": True}}
    assert artefacts.signature(tmp_path, "other")["input"] == []


def test_models_that_a_foreign_ensemble_asks(tmp_path: Path) -> None:
    for name, header in (("m", artefacts.CONFIG_HEADER), ("mine", "")):
        (tmp_path / name / "1").mkdir(parents=True)
        step = f'ensemble_scheduling {{ step [ {{ model_name: "{name}_a" }}, {{model_name:"{name}_b"}} ] }}'
        (tmp_path / name / "config.pbtxt").write_text(header + step)
    assert artefacts.named_by_plain_models(tmp_path) == {"mine_a", "mine_b"}
