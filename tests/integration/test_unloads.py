"""Models are unloaded, and loaded in place, while something still uses the old processes: no answer is lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from tests.conftest import post
from tests.integration.test_launcher import children
from trident_client import Client
from trident_export import install, models_file
from trident_serving.launcher import installation, local
from trident_serving.launcher.leftovers import IDLE_SECONDS
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.slow
RUNS = IDLE_SECONDS + 4.0
# Models that this project did not write have no record of their requests.
STAGE = """
import time
import numpy as np
import triton_python_backend_utils as utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({seconds})
        return [utils.InferenceResponse([utils.Tensor("{output}", np.array({value}, np.{kind}))]) for _ in requests]
"""
PLAIN = """
backend: "python"
output [ {{ name: "B" data_type: TYPE_INT32 dims: [ 1 ] }} ]
input [ {{ name: "A" data_type: TYPE_INT32 dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU }} ]
"""
# The start of a process of version 2 takes long, twice: Triton starts one for the config and one for the model.
LATE = """#!/bin/sh
case "$1" in */gen/2/*) [ -e {flag} ] && sleep {seconds} ;; esac
exec {stub} "$@"
"""
POLICY = "version_policy {\n  specific {\n    versions: 1\n    versions: 2\n  }\n}\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unloads")
    tiny_models.make_reader(root / "cls", "bert", AutoModelForSequenceClassification, num_labels=3)
    tiny_models.make_causal(root / "gen", "llama")
    limits: dict[str, Any] = {"labels": 3, "max_tokens": 96, "threads": 1}
    tables: dict[str, dict[str, Any]] = {
        "cls": {"task": "text-classification", "limits": limits},
        "gen": {"task": "text-generation", "limits": {"context": 128, "slots": 4, "threads": 1}},
    }
    specs = [
        models_file.parse(name, table | {"source": {"path": str(root / name)}, "variants": ["fp32"]})
        for name, table in tables.items()
    ]
    install.export(specs, root / "repository", root, root / "cache", lambda message: None)
    return root / "repository"


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    """Models of its own for each test, which changes them."""
    return Path(shutil.copytree(exported, tmp_path / "repository"))


@pytest.fixture
def start(repository: Path, tmp_path: Path) -> Iterator[Callable[[], LocalServer]]:
    started: list[LocalServer] = []

    def begin() -> LocalServer:
        started.append(local.start(repository, tmp_path / "log"))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


def test_what_runs_without_a_record_is_waited_for(repository: Path, start: Callable[[], LocalServer]) -> None:
    """A stage of ours that another backend computes, as NVIDIA's ONNX Runtime does, and a plain model of a user."""
    stage, plain = repository / "cls_model", repository / "plain"
    config = (stage / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    (stage / "config.pbtxt").write_text(config.replace('backend: "onnxruntime"', 'backend: "python"'))
    (stage / "1" / "model.onnx").unlink()
    code = STAGE.format(seconds=RUNS, output="logits", value="[[9, 0, 0]]", kind="float32")
    (stage / "1" / "model.py").write_text(code)
    (plain / "1").mkdir(parents=True)
    (plain / "config.pbtxt").write_text(PLAIN.format())
    (plain / "1" / "model.py").write_text(STAGE.format(seconds=RUNS, output="B", value="[7]", kind="int32"))
    server = start()
    body = {"inputs": [{"name": "A", "shape": [1], "datatype": "INT32", "data": [1]}]}
    with ThreadPoolExecutor(2) as pool, Client(server.grpc_url, timeout=60) as client:
        asked = pool.submit(client.classify, "Hello", model="cls")
        called = pool.submit(post, f"{server.http_url}/v2/models/plain/infer", body)
        time.sleep(1)
        assert post(f"{server.http_url}/v2/repository/models/plain/unload", {}, server.admin_headers)[0] == 200
        began = time.monotonic()
        client.unload("cls")  # waits until it is unloaded
        assert time.monotonic() - began > IDLE_SECONDS
        assert (asked.result()[0].label_id, round(asked.result()[0].score, 3)) == (0, 1.0)
        assert '"data":[7]' in called.result()[1]
    assert "was ended" not in server.log.read_text()
    assert "still held a request" not in server.log.read_text()


def test_a_version_serves_until_the_other_one_is_loaded(
    repository: Path, start: Callable[[], LocalServer], tmp_path: Path
) -> None:
    model, flag, stub = repository / "gen", tmp_path / "late", installation.find().stub
    (model / "2").mkdir()
    for file in (model / "1").iterdir():
        (model / "2" / file.name).hardlink_to(file)
    with (model / "config.pbtxt").open("a") as config:
        config.write(POLICY)
    (model / "triton_python_backend_stub").write_text(LATE.format(flag=flag, seconds=IDLE_SECONDS, stub=stub))
    (model / "triton_python_backend_stub").chmod(0o755)
    server = start()

    def processes() -> set[int]:
        return {pid for pid, command in children(server.launcher.pid).items() if "backend_stub" in command}

    def ask() -> tuple[int, str]:
        body = {"text_input": "Hello", "max_tokens": 4}
        return post(f"{server.http_url}/v2/models/gen/versions/1/generate", body)

    before, old = ask(), {pid for pid in processes() if f"{model}/" in children(server.launcher.pid)[pid]}
    assert before[0] == 200
    flag.touch()
    for version in ("1", "2"):  # what has not changed is not loaded again
        (model / version / "config.json").touch()
    with Client(server.grpc_url, timeout=60) as client:
        load = threading.Thread(target=client.load, args=("gen",))
        began = time.monotonic()
        load.start()
        time.sleep(IDLE_SECONDS + 3)  # version 1 has been ready for longer than a process may be idle
        while load.is_alive():
            assert ask() == before
            time.sleep(0.2)
        load.join()
        assert time.monotonic() - began > 2 * IDLE_SECONDS
    assert ask() == before
    deadline = time.monotonic() + 10
    while old & processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "was ended" not in server.log.read_text()
