"""A variant that the gate refuses is installed only by force, and everything that shows it then says so."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from tests.conftest import run_export
from trident_client import Client, cli
from trident_export import configs, models_file
from trident_serving import artefacts
from trident_serving.launcher import local
from trident_serving.launcher.cli import welcome
from trident_serving.launcher.server import ServerOptions

# A mixed recipe of the models file's own, and gates that no rounding passes.
RECIPES = '[mixed]\nprecision = "int8"\ndecoder = [{ pass = "keep", nodes = "attn" }, { pass = "groups", bits = 8 }]\n'


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tiny_models.make_causal(tmp_path / "llama-source", "llama")
    tiny_models.make_reader(tmp_path / "mood-source", "bert", AutoModelForSequenceClassification, num_labels=3)
    (tmp_path / "recipes.toml").write_text(RECIPES)
    (tmp_path / "models.toml").write_text(
        '[llama]\ntask = "text-generation"\nsource = { path = "llama-source" }\nvariants = ["fp32", "mixed"]\n'
        "limits = { context = 96, slots = 2, threads = 1 }\ngates = { mixed = { kl = 1e-12 } }\n\n"
        '[mood]\ntask = "text-classification"\nsource = { path = "mood-source" }\nvariants = ["fp32", "int8"]\n'
        "limits = { labels = 3, max_tokens = 96, threads = 1 }\ngates = { int8 = { score_error = 1e-12 } }\n"
    )
    return tmp_path / "models.toml"


def test_an_unverified_variant_is_called_so_everywhere(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    options = ("--models-file", str(models), "--repository", str(repository))
    done = run_export("export", *options)
    assert done.returncode == 1
    assert "mixed does not compute what Hugging Face computes: kl is" in done.stderr
    assert artefacts.loadable(repository) == []

    done = run_export("export", "--force", *options)
    assert done.returncode == 0, done.stderr
    assert "mixed: UNVERIFIED: mixed does not compute what Hugging Face computes: kl is" in done.stderr
    assert "fp32: passed" in done.stderr
    reason = artefacts.read_manifests(repository)[0].unverified["mixed"]
    assert "must be at most 1e-12" in reason
    specs = models_file.load(models)
    assert configs.drift(specs, repository) == []
    # `make serve` exports without force what is missing, and leaves what a person forced.
    again = run_export("export", *options)
    assert (again.returncode, again.stderr) == (0, "")
    doctor = run_export("doctor", *options)
    assert "warning: [llama] mixed was installed by force: mixed does not compute" in doctor.stdout

    with local.running(repository, tmp_path / "log") as server, Client(server.grpc_url) as client:
        refused = {status.name: client.unverified(status.name) for status in client.models()}
        assert {name for name, text in refused.items() if text} == {"llama_mixed", "mood_int8"}
        assert refused["llama_mixed"] == reason
        with urllib.request.urlopen(f"{server.http_url}/v2/models/llama_mixed/config", timeout=10) as response:
            assert json.load(response)["parameters"]["unverified"]["string_value"] == reason
        assert client.generate("the", model="llama_mixed", max_tokens=3).num_output_tokens > 0
        assert cli.main(["models", "--url", server.grpc_url]) == 0
        shown = capsys.readouterr().out
        assert f"READY unverified: {reason}" in shown
        assert shown.count("unverified") == 2
    banner = welcome(ServerOptions(repository), [])
    assert f"UNVERIFIED           llama_mixed: {reason}" in banner

    # With another gate the variant passes, and the mark goes.
    models.write_text(models.read_text().replace("gates = { mixed = { kl = 1e-12 } }\n", ""))
    done = run_export("export", "llama", *options)
    assert done.returncode == 0, done.stderr
    assert "unverified" not in (repository / "llama_mixed" / "config.pbtxt").read_text()
