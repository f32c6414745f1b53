"""Every graph that a profile serves is loaded by the ONNX Runtime that the profile pins, and gives the same numbers.

The small image and `make serve`   onnxruntime of the `runtime` extra      everything
NVIDIA's container                 the same, and the native backend's      generators and seq2seq; encoders
with a GPU                         onnxruntime-gpu of docker-compose.yml   generators with device = "cuda"

What a version has is decided when a graph is loaded, by the operators' schemas, which a wheel for CPUs has too: it
stands in for the version's build for GPUs.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from deploy import validate
from tests import tiny_models
from tests.conftest import ROOT
from trident_export import install, models_file
from trident_serving import onnx_runtime

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVE = "1.27.0"  # of the native backend in the container that deploy/Dockerfile names
CUDA = validate.cuda_runtime(validate.compose_services()).partition("==")[2]
# Random weights are no measure of what rounding costs.
OPEN = {variant: {"kl": 50.0, "top1": 0.0} for variant in ("int8", "int4", "fp16", "int8_cache")}
READER = {variant: {"worst_cosine": -1.0} for variant in ("int8", "int8_static")}
GENERATORS = {"cpu": ["fp32", "int8", "int4", "int8_cache"], "cuda": ["fp32", "fp16", "int8", "int4"]}


def _tables(folder: Path) -> dict[str, dict[str, Any]]:
    limits = {"context": 128, "slots": 4, "prefill_chunk": 16, "default_max_tokens": 16, "threads": 1}
    made: dict[str, dict[str, Any]] = {}
    for architecture in ("llama", "gpt2"):
        path = tiny_models.make_causal(folder / architecture, architecture)
        model = AutoModelForCausalLM.from_pretrained(path)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms: a trained model has no two alike, and torch would make them one
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
        for device, variants in GENERATORS.items():
            chosen = variants if architecture == "llama" else variants[:1]
            made[f"{architecture}-{device}"] = {
                "task": "text-generation",
                "source": {"path": str(path)},
                "variants": chosen,
                "gates": {variant: OPEN[variant] for variant in chosen if variant in OPEN},
                "limits": limits | {"device": device},
            }
    tiny_models.make_seq2seq(folder / "marian", "marian", 0)
    made["marian"] = {
        "task": "translation",
        "source": {"path": str(folder / "marian")},
        "variants": ["fp32", "int8"],
        "gates": {"int8": OPEN["int8"]},
        "limits": {"max_source_tokens": 96, "max_target_tokens": 40, "slots": 8, "threads": 1},
    }
    readers = {"limits": {"max_tokens": 96, "buckets": [32], "threads": 1}}
    tiny_models.make_reader(folder / "mpnet", "mpnet", AutoModel, seed=1)
    made["mpnet"] = {
        "task": "feature-extraction",
        "source": {"path": str(folder / "mpnet")},
        "variants": ["fp32", "int8", "int8_static"],
        "gates": READER,
        "limits": readers["limits"] | {"dimensions": 32},
    }
    for family in ("bert", "deberta-v2", "modernbert"):
        tiny_models.make_reader(folder / family, family, AutoModelForSequenceClassification, seed=2, num_labels=3)
        made[family] = {
            "task": "text-classification",
            "source": {"path": str(folder / family)},
            "variants": ["fp32"],
            "limits": readers["limits"] | {"labels": 3},
        }
    return made


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    specs = [models_file.parse(name, table) for name, table in _tables(folder).items()]
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    return folder / "repository"


def graphs(repository: Path, pattern: str) -> list[str]:
    """The models that hold a graph and whose name fits."""
    found = {path.parts[-3] for path in repository.glob("*/1/*.onnx")}
    return sorted(name for name in found if re.fullmatch(pattern, name))


def run(repository: Path, names: list[str], output: Path, runtime: Path | None = None) -> dict[str, NDArray[Any]]:
    """What each graph gives with this environment's ONNX Runtime, or the one in a folder."""
    environment = os.environ | ({"PYTHONPATH": str(runtime)} if runtime else {})
    command = [sys.executable, str(ROOT / "tests/contract/run_graphs.py"), str(repository), str(output), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(output))


def runtime_folder(version: str) -> Path:
    """That version of onnxruntime in a folder of its own, kept for the next run."""
    folder = ROOT / ".cache" / "runtimes" / f"onnxruntime-{version}"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        command += ["--upgrade", f"onnxruntime=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        if done.returncode:
            pytest.skip(f"onnxruntime {version} can't be installed here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def expected(repository: Path) -> dict[str, NDArray[Any]]:
    """What the environment's own version gives, which the tests of every task compare with Hugging Face."""
    names = graphs(repository, ".*")
    found = run(repository, names, repository.parent / "expected.npz")
    assert found["version"] == importlib.metadata.version("onnxruntime")
    assert {key.split("/")[0] for key in found} - {"version"} == set(names)
    return found


def test_the_small_image_and_nvidias_pin_the_version_that_is_tested(expected: dict[str, NDArray[Any]]) -> None:
    extras = importlib.metadata.requires("trident-serving") or []
    wanted = {line.split(";")[0].strip() for line in extras if line.startswith("onnxruntime")}
    pinned = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("onnxruntime==")]
    assert pinned == [f"onnxruntime=={expected['version']}"]
    assert wanted
    assert f"onnxruntime=={CUDA}" not in pinned


@pytest.mark.parametrize(
    ("version", "pattern", "kinds", "tolerance"),
    [
        # The same kernels: not a bit differs.
        (CUDA, r"(llama|gpt2)-cuda(_.*)?", 5, 0.0),
        # Other kernels: sums go another way in places, measured up to 2e-6 of 10.
        (NATIVE, r"(mpnet|bert|deberta-v2|modernbert)_model(_.*)?", 6, 1e-4),
    ],
)
def test_a_pinned_version_gives_the_same_numbers(
    repository: Path,
    expected: dict[str, NDArray[Any]],
    tmp_path: Path,
    version: str,
    pattern: str,
    kinds: int,
    tolerance: float,
) -> None:
    names = graphs(repository, pattern)
    assert len(names) == kinds
    found = run(repository, names, tmp_path / "found.npz", runtime_folder(version))
    assert found.pop("version") == version
    assert found
    for key, value in found.items():
        assert np.abs(expected[key]).max() > 0.1
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=tolerance, err_msg=key)


def test_a_generator_on_a_gpu_gets_the_other_runtime_of_the_image() -> None:
    code = "from trident_serving import onnx_runtime; onnx_runtime.choose('cuda')"
    environment = os.environ | {onnx_runtime.CUDA_RUNTIME: str(runtime_folder(CUDA))}
    command = [
        sys.executable,
        "-c",
        f"{code}; from trident_serving.runtime import session; print(session.ort.__version__)",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{CUDA}\n"


def test_a_graph_for_cpus_needs_the_newest_version(repository: Path, tmp_path: Path) -> None:
    """Why graphs differ by device: what this test finds is what the test above would find without that."""
    with pytest.raises(AssertionError, match=r"llama-cpu: .*(17|exceeds|max=16)"):
        run(repository, ["llama-cpu"], tmp_path / "found.npz", runtime_folder(CUDA))
