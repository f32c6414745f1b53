"""What the images rely on: the health check, the choice of an ONNX Runtime, the check of shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from trident_serving import onnx_runtime
from trident_serving.errors import StartError
from trident_serving.launcher import health, shared_memory

STATUS = {"/v2/health/ready": 200}


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(STATUS.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


def test_a_health_check(port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main([port]) == 0
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert health.main([port]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(STATUS, "/v2/health/ready", 400)  # what tritonserver says while a model is not loaded
    assert health.main([port]) == 1
    assert f"not ready on port {port}: HTTP Error 400" in capsys.readouterr().err
    assert health.main(["1"]) == 1
    assert "not ready on port 1" in capsys.readouterr().err
    assert health.main(["many"]) == 1


def test_a_health_check_loads_little() -> None:
    """It runs every ten seconds."""
    code = "import sys, trident_serving.launcher.health; print('numpy' in sys.modules, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(("device", "expected"), [("cuda", "for GPUs"), ("cpu", "for CPUs")])
def test_a_model_on_a_gpu_gets_the_runtime_for_gpus(tmp_path: Path, device: str, expected: str) -> None:
    for folder, text in (("own", "for CPUs"), ("cuda", "for GPUs")):
        (tmp_path / folder / "onnxruntime").mkdir(parents=True)
        (tmp_path / folder / "onnxruntime/__init__.py").write_text(f"kind = {text!r}\n")
    choose = f"from trident_serving import onnx_runtime; onnx_runtime.choose({device!r})"
    code = f"{choose}; import onnxruntime; print(onnxruntime.kind)"
    environment = {"PYTHONPATH": str(tmp_path / "own"), onnx_runtime.CUDA_RUNTIME: str(tmp_path / "cuda")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_a_runtime_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    before = list(sys.path)
    onnx_runtime.choose("cuda", {})
    onnx_runtime.choose("cuda", {onnx_runtime.CUDA_RUNTIME: ""})
    onnx_runtime.choose("cuda", {onnx_runtime.CUDA_RUNTIME: str(tmp_path)})
    assert sys.path == before


def test_a_runtime_is_chosen_before_one_is_imported(tmp_path: Path) -> None:
    import onnxruntime

    (tmp_path / "onnxruntime").mkdir()
    with pytest.raises(RuntimeError, match=f"imported already, from {onnxruntime.__file__}"):
        onnx_runtime.choose("cuda", {onnx_runtime.CUDA_RUNTIME: str(tmp_path)})


def test_shared_memory_is_checked(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize // 2**20
    shared_memory.check(8, tmp_path)
    with pytest.raises(
        StartError, match=rf"{tmp_path} has \d+ MiB free, and {free} models need {free + 32} MiB .*--shm-size=1g"
    ):
        shared_memory.check(free, tmp_path)
    with pytest.raises(StartError, match="can't be used .*: tritonserver needs it"):
        shared_memory.check(1, tmp_path / "missing")


def test_the_generators_adapter_chooses_before_it_imports() -> None:
    """Triton imports the adapter first, and hands it the config later."""
    adapter = Path(onnx_runtime.__file__).parent / "_backends/trident_generator/model.py"
    code = (
        "import runpy, sys, types; name = 'triton_python_backend_utils'; sys.modules[name] = types.ModuleType(name); "
        f"runpy.run_path({str(adapter)!r}); print('onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
