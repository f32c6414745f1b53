"""What `--check` finds before a server starts: each is one sentence that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trident_serving.errors import StartError
from trident_serving.launcher import backend_folder, installation, preflight
from trident_serving.launcher.installation import Installation


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python_without(folder: Path, *missing: str, numpy: str = "1.26.4", version: str = "{0}.{1}") -> dict[str, str]:
    """An environment whose first python3 is this interpreter, with packages made invisible to it."""
    named = version.format(*sys.version_info)
    program(
        folder / "python3",
        f"""#!{sys.executable}
import importlib.metadata, importlib.util, sys
find, number = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name: None if name in {missing!r} else find(name)
importlib.metadata.version = lambda name: {numpy!r} if name == "numpy" else number(name)
sys.version_info = tuple(map(int, {named!r}.split(".")))
text, sys.argv = sys.argv[2], sys.argv[2:]
exec(text)
""",
    )
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(StartError) as error:
        preflight.check_packages(environment)
    return str(error.value)


def test_the_interpreter_of_the_backends(tmp_path: Path) -> None:
    preflight.check_packages(python_without(tmp_path / "whole"))
    for name in ("onnxruntime", "tokenizers", "jinja2", "numpy", "trident_serving"):
        python = tmp_path / name / "python3"
        assert refusal(python_without(tmp_path / name, name)) == (
            f"{python}, in which the backends run, has no {name}: "
            f"install it with {python} -m pip install 'trident-serving[runtime]'"
        )
    assert "has no onnxruntime, no jinja2: install" in refusal(
        python_without(tmp_path / "two", "jinja2", "onnxruntime")
    )
    assert refusal(python_without(tmp_path / "numpy2", numpy="2.3.0")) == (
        "numpy 2.3.0 makes tritonserver send empty tensors without an error: install 'numpy<2'"
    )
    assert "python3, which is Python 3.99, and this is 3." in refusal(
        python_without(tmp_path / "other", version="3.99")
    )
    broken = program(tmp_path / "broken/python3", "#!/bin/sh\necho libpython is gone >&2; exit 1\n")
    assert "does not work (libpython is gone): install it again" in refusal({"PATH": str(broken.parent)})
    assert "there is no python3 in" in refusal({"PATH": str(tmp_path / "nothing")})


def test_packages_of_the_working_directory_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare interpreter has none of the packages, whatever lies in the folder that the launcher is started in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    for name in preflight.BACKEND_PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    message = refusal({"PATH": str(tmp_path / "bare/bin")})
    assert f"has no {', no '.join(preflight.BACKEND_PACKAGES)}: install" in message


def test_no_tritonserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError) as error:
        installation.find(tmp_path)
    assert str(error.value) == (
        f"there is no tritonserver: neither {tmp_path}/bin/tritonserver nor the Python package nvidia-pytriton: "
        "install it with pip install 'trident-serving[serve]'"
    )


def test_an_unsupported_python_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra `serve` installs no server, its absence is not what is wrong."""

    def refuse() -> None:
        raise StartError("Python 3.13 is not supported")

    monkeypatch.setattr(preflight, "check_python", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"^Python 3\.13 is not supported$"):
        installation.find(tmp_path)


def test_a_tritonserver_that_does_not_run(tmp_path: Path) -> None:
    program(tmp_path / "backends/python/triton_python_backend_stub", "")
    says = "tritonserver: error while loading shared libraries: libb64.so.0d: cannot open shared object file"
    binary = program(tmp_path / "bin/tritonserver", f"#!/bin/sh\necho '{says}' >&2; exit 127\n")
    with pytest.raises(StartError) as error:
        installation.find(tmp_path)
    assert str(error.value) == f"{binary} does not run here ({says}): install what it names"
    binary.chmod(0o644)
    with pytest.raises(StartError, match=r"does not run here \(Permission denied\)"):
        installation.find(tmp_path)


@pytest.fixture
def container(tmp_path: Path) -> Installation:
    """A server with a native backend, as NVIDIA's image has it."""
    for name in ("python", "onnxruntime"):
        (tmp_path / "backends" / name).mkdir(parents=True)
    (tmp_path / "backends/onnxruntime/libtriton_onnxruntime.so").touch()
    return Installation(tmp_path / "tritonserver", tmp_path / "backends", tmp_path / "stub", None)


def test_missing_backends(container: Installation, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(backend_folder.OUR_BACKENDS, ours)
    with pytest.raises(StartError) as error:
        backend_folder.check(container, ours)
    names = (
        "trident_explain, trident_generator, trident_postprocess, trident_seq2seq, trident_speech, trident_template, "
        "trident_tokenizer, trident_vllm"
    )
    assert str(error.value) == (
        f"{container.backends} lacks {names}: copy them there from {ours}, as deploy/Dockerfile does"
    )
    for name in names.split(", "):
        shutil.copytree(ours / name, container.backends / name)
    backend_folder.check(container, ours)
    (ours / "trident_seq2seq/model.py").unlink()
    with pytest.raises(StartError) as error:
        backend_folder.check(container, ours)
    assert str(error.value) == (
        f"{ours} lacks the backends trident_seq2seq: the package is not whole, install it again with "
        "pip install --force-reinstall --no-deps trident-serving"
    )


def test_every_backend_is_known() -> None:
    assert sorted(path.parent.name for path in backend_folder.OUR_BACKENDS.glob("*/model.py")) == sorted(
        backend_folder.NAMES
    )


def test_the_exporter_without_its_packages(tmp_path: Path) -> None:
    """An installation of only the client has the command; a missing package of our own is a bug."""
    for lost, mendable in (("tritonclient", True), ("trident_export.recipes", False)):
        code = f"""
import sys
class Lost:
    def find_spec(self, name, path=None, target=None):
        if name == {lost!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lost())
from trident_export.__main__ import main
sys.exit(main())
"""
        done = subprocess.run([sys.executable, "-c", code, "configs"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is not mendable
        if mendable:
            assert done.stderr == (
                "trident-export: the package tritonclient is missing: "
                f"install it with {sys.executable} -m pip install 'trident-serving[export]'\n"
            )


@pytest.mark.parametrize("package", ["trident_serving", "trident_export", "benchmarks"])
def test_telemetry_is_off_before_onnxruntime_is_imported(package: str) -> None:
    code = f"import os, sys, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("1 False\n", "")
