"""What becomes of an export where something is wrong: with one model, the folder, the disk or with us."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, RwkvConfig

from tests import tiny_models
from tests.conftest import ROOT, run_export
from trident_export import cli, install, models_file, quiet, tasks
from trident_export.errors import ExportsFailed, NoMemory, NoSpace
from trident_export.graphs import decoder_passes
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving import artefacts

NOBODY = 65534


def write_models(root: Path, names: dict[str, Path], more: str = "") -> Path:
    path = root / "models.toml"
    entries = {name: tiny_models.causal_entry(folder) for name, folder in names.items()}
    path.write_text(tiny_models.models_toml(entries) + more)
    return path


def export(path: Path, repository: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_export("export", *more, "--models-file", str(path), "--repository", str(repository))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_causal(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def damaged(llama: Path, folder: Path, name: str) -> Path:
    """A copy of a model with one thing wrong."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    if name == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    elif name == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    elif name == "shard":
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "config":
        (folder / "config.json").write_text('{"model_type": "llama", ')
    elif name == "type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))
    elif name == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    elif name == "architecture":
        shutil.rmtree(folder)
        model = AutoModelForCausalLM.from_config(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=512))
        model.save_pretrained(folder)
        tiny_models.byte_level_tokenizer().save_pretrained(folder)
    return folder


REASONS = {
    "template": "template: the chat template can't be used (unexpected '}', line 2): mend it in",
    "weights": "model.safetensors is cut off: copy the model again",
    "shard": "model-00002-of-00002.safetensors): copy the model again",
    "config": "config: config.json can't be read (Expecting property name",
    "type": "a model of type 'llama9', which transformers 5.24.0 does not know",
    "tokenizer": "tokenizer: tokenizer.json can't be used, its model is no object",
    "architecture": "a RwkvForCausalLM is not supported",
}


def test_the_others_are_exported_and_the_failed_ones_named_at_the_end(llama: Path, tmp_path: Path) -> None:
    sources = {name: damaged(llama, tmp_path / name, name) for name in REASONS}
    template = '[sum]\ntask = "summarization"\ngenerator = "architecture"\ntemplate = "Sum {{ text_input }}"\n'
    path, repository = write_models(tmp_path, {**sources, "last": llama}, template), tmp_path / "repository"
    done = export(path, repository)
    assert done.returncode == 1
    assert artefacts.loadable(repository) == ["last"]
    head, _, end = done.stderr.partition("8 of 9 models failed; what else is in the repository is whole:\n")
    assert "last [" in head
    lines = dict(line.strip().split(": ", 1) for line in end.splitlines())
    assert list(lines) == [*REASONS, "sum"]
    for name, reason in REASONS.items():
        assert reason in lines[name], lines[name]
    assert lines["sum"] == "its generator architecture is not exported: see there"
    assert "Traceback" not in done.stderr
    assert artefacts.read_failures(repository) == lines
    assert not list((repository / ".trident").glob("staging-*"))

    # `make serve` goes on; what has been mended is no failure any more.
    shutil.rmtree(tmp_path / "weights")
    shutil.copytree(llama, tmp_path / "weights")
    done = export(path, repository, "--keep-going")
    assert done.returncode == 0
    assert "7 of 9 models failed" in done.stderr
    assert artefacts.loadable(repository) == ["last", "weights"]
    assert set(artefacts.read_failures(repository)) == {*REASONS, "sum"} - {"weights"}


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs `trident-export` in this process: status, and what it prints on standard error."""
    monkeypatch.setattr(quiet, "hush", lambda: None)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        return cli.main(arguments), capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_other_commands_speak_the_same_way(llama: Path, tmp_path: Path, command: Command) -> None:
    broken = damaged(llama, tmp_path / "config", "config")
    common = ("--models-file", str(write_models(tmp_path, {"m": broken})))
    repository = ("--repository", str(tmp_path / "repository"))
    for arguments in (
        ("export", *repository),  # of a single model
        ("add", str(broken)),
        ("sensitivity", "m"),
        ("prune", "m", "--method", "heads", "--sparsity", "0.5"),
    ):
        status, said = command(*arguments, *common)
        assert (status, "Traceback" in said) == (1, False), said
        assert said.splitlines()[-1].startswith(f"trident-export: {broken}: config.json can't be read (")
    text = tmp_path / "none.txt"
    for arguments, message in (
        (("evaluate", "m", *repository), "m is not exported: run make export MODEL=m"),
        (("export", "--source", str(broken), *repository), "--source is for one model: name it"),
        (("evaluate", "m", "--text", str(text), *repository), f"{text} can't be read: No such file or directory"),
        (("export", "--repository", common[1]), f"{common[1]} is no folder: choose another with REPOSITORY=..."),
    ):
        status, said = command(*arguments, *common)
        assert (status, said.count("\n")) == (1, 1), said
        assert message in said


def test_a_defect_of_ours_is_a_traceback_that_says_so(
    llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError of a library, deep in our own work, is not the user's mistake."""

    def broken(*_: object, **__: object) -> None:
        raise ValueError("cannot reshape array")

    monkeypatch.setattr(decoder_passes, "optimize", broken)
    common = ("--models-file", str(write_models(tmp_path, {"a": llama, "b": llama})))
    common += ("--repository", str(tmp_path / "repository"))
    for model, expected in ((("a",), 70), ((), 1)):
        status, said = command("export", *model, *common)
        assert status == expected
        assert "ValueError: cannot reshape array" in said
        assert "this is a defect of trident-export" in said
    assert "  b: a defect of trident-export (ValueError; the traceback is above)" in said


def test_a_part_that_was_removed_is_exported_again(llama: Path, tmp_path: Path, command: Command) -> None:
    path, repository = write_models(tmp_path, {"llama": llama}), tmp_path / "repository"
    common = ("--models-file", str(path), "--repository", str(repository))
    assert command("export", *common)[0] == 0
    (repository / "llama/1/model.onnx").unlink()
    status, said = command("export", *common)
    assert (status, "writing fp32" in said) == (0, True)
    assert (repository / "llama/1/model.onnx").exists()


def test_an_export_that_memory_is_too_short_for_is_refused_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trident_export import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    (spec,) = models_file.load(write_models(tmp_path, {"llama": llama}))
    said: list[str] = []
    with pytest.raises(NoMemory, match=r"the export of llama \(0 M parameters\) needs about 2.0 GB of memory, and 1.0"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path, said.append)
    assert said == []
    install.export([spec], tmp_path / "repository", tmp_path, tmp_path, said.append, force=True)
    assert artefacts.loadable(tmp_path / "repository") == ["llama"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 80 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user can't mount a disk")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path) -> None:
    """Take every byte that is left."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"x" * size) == size:
                    pass
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("step", ["tracing", "writing", "comparing", "installing"])
def test_a_disk_that_fills_up_leaves_what_was_there(
    llama: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    repository = small_disk / "repository"
    (spec,) = models_file.load(write_models(tmp_path, {"llama": llama}))
    install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
    files = [repository / name for name in ("llama/1/model.onnx", "llama/1/trident.json", "llama/config.pbtxt")]
    before = [file.read_bytes() for file in files]

    changed = models_file.parse("llama", {**table(llama), "limits": {"context": 48, "slots": 2}})
    if step == "installing":  # everything is built, and the disk fills while it is moved

        def filled(*arguments: object) -> None:
            fill(small_disk)
            (staging,) = (repository / ".trident").glob("staging-*")
            (staging / "more").write_bytes(b"x")

        monkeypatch.setattr(install.Manifest, "write", filled)
    with pytest.raises(NoSpace, match=f"the disk of {small_disk}.* is full, 0 MiB are free: make room"):
        install.export(
            [changed], repository, tmp_path, tmp_path, lambda message: fill(small_disk) if step in message else None
        )
    assert [file.read_bytes() for file in files] == before
    assert artefacts.loadable(repository) == ["llama"]
    assert not list((repository / ".trident").glob("staging-*"))
    if step != "installing":
        return
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    install.export([changed], repository, tmp_path, tmp_path, lambda message: None)
    assert files[0].read_bytes() != before[0]


def test_a_move_that_fails_is_taken_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename of an installation fails once, one after the other."""
    repository = tmp_path / "repository"
    (spec,) = models_file.load(write_models(tmp_path, {"llama": llama}))
    install.export([spec], repository, tmp_path, tmp_path, lambda message: None)
    files = sorted(path for path in (repository / "llama").rglob("*") if path.is_file())
    before = [file.read_bytes() for file in files]
    changed = models_file.parse("llama", {**table(llama), "limits": {"context": 48, "slots": 2}})
    original = install._move
    made = tasks.build
    kept: dict[str, object] = {}

    def once(job: tasks.Job, **options: bool) -> tasks.Checked:
        """The graph is built once, and copied for the later tries."""
        if "checked" not in kept:
            kept["checked"] = made(job, **options)
            shutil.copytree(job.staging, tmp_path / "built")
        else:
            shutil.copytree(tmp_path / "built", job.staging, dirs_exist_ok=True)
        return kept["checked"]  # type: ignore[return-value]

    monkeypatch.setattr(tasks, "build", once)
    failed = 0
    for turn in range(20):
        count = iter(range(100))

        def failing(*arguments: object, turn: int = turn, count: Iterator[int] = count) -> None:
            if next(count) == turn:
                raise OSError(28, "No space left on device")
            original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(install, "_move", failing)
        try:
            install.export([changed], repository, tmp_path, tmp_path, lambda message: None)
        except NoSpace:
            failed += 1
        else:
            break
        assert [file.read_bytes() for file in files] == before
        assert artefacts.loadable(repository) == ["llama"]
    assert failed == 6  # manifest, two configs, two folders, manifest
    assert (repository / "llama/1/trident.json").read_bytes() != before[
        files.index(repository / "llama/1/trident.json")
    ]


def table(folder: Path) -> dict[str, object]:
    import tomllib

    return tomllib.loads(tiny_models.causal_entry(folder))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that another user reaches; pytest's own belong to the user who runs it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    if os.geteuid():
        pytest.skip("only root can be two users")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_repository_of_another_user(llama: Path, open_folder: Path, command: Command) -> None:
    shutil.copytree(llama, open_folder / "llama")
    (open_folder / "llama/model.safetensors").chmod(0o644)
    path, repository = write_models(open_folder, {"llama": open_folder / "llama"}), open_folder / "repository"
    common = ("--models-file", str(path), "--repository", str(repository))
    assert command("export", *common)[0] == 0
    before = (repository / "llama/1/trident.json").read_bytes()
    with another_user():
        assert command("export", *common) == (0, "")  # whole as it is
    write_models(open_folder, {"llama": open_folder / "llama", "new": open_folder / "llama"})
    with another_user():
        status, said = command("export", *common)
    assert (status, "Traceback" in said) == (1, False)
    reason = f"{repository} can't be written by user nobody (permission denied; it belongs to root): run as its owner"
    assert f"  new: {reason}" in said

    (repository / "llama/1/model.onnx").unlink()  # to be exported again: its folder is looked at before the work
    for file in (repository, repository / ".trident", *(repository / ".trident").iterdir()):
        os.chown(file, NOBODY, NOBODY)
    with another_user():
        status, said = command("export", *common)
    assert f"  llama: {repository / 'llama'} can't be written by user nobody (permission denied; it belongs" in said
    assert "] loading the model" in said.partition("new [")[2]
    assert "llama [  0.0 s] loading" not in said
    assert artefacts.loadable(repository) == ["llama", "new"]
    assert (repository / "llama/1/trident.json").read_bytes() == before


def test_a_read_only_repository(llama: Path, tmp_path: Path, small_disk: Path, command: Command) -> None:
    path, repository = write_models(tmp_path, {"llama": llama}), small_disk / "repository"
    repository.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, said = command("export", "--models-file", str(path), "--repository", str(repository))
    message = f"trident-export: {repository} can't be written by user root (read-only; it belongs to root): run as"
    assert (status, said[: len(message)], said.count("\n")) == (1, message, 1)


def test_failures_of_several_are_one_error(llama: Path, tmp_path: Path) -> None:
    entry = {**table(llama), "source": {"path": "nowhere"}}
    specs = [models_file.parse(name, entry) for name in ("one", "two")]
    with pytest.raises(ExportsFailed) as failed:
        install.export(specs, tmp_path / "repository", tmp_path, tmp_path, lambda message: None)
    assert list(failed.value.failures) == ["one", "two"]
    assert "nowhere does not exist" in failed.value.failures["two"]


@pytest.mark.slow
def test_long_steps_have_a_bar_on_a_terminal_and_lines_elsewhere(
    llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference run is slowed down so that it is a long step."""
    load = HuggingFaceFolder.load_whole

    def slow(*arguments: object) -> torch.nn.Module:
        model: torch.nn.Module = load(*arguments)  # type: ignore[arg-type]
        model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        return model

    monkeypatch.setattr(HuggingFaceFolder, "load_whole", slow)
    common = ("--models-file", str(write_models(tmp_path, {"llama": llama})))
    status, said = command("export", *common, "--repository", str(tmp_path / "one"))
    assert status == 0
    assert "\r" not in said
    assert all(line.startswith("trident-export: llama [") for line in said.splitlines()), said

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        reading = threading.Thread(target=lambda: shown.extend(iter(lambda: read(main), b"")))
        shown: list[bytes] = []
        reading.start()
        assert cli.main(["export", *common, "--repository", str(tmp_path / "two")]) == 0
    reading.join(10)
    os.close(main)
    text = b"".join(shown).decode()
    assert re.search(r"Hugging Face: +\d+%\|.*\d+/12 \[", text), text
    assert re.search(r"\r  00:0\d", text), text
    assert "comparing with Hugging Face\r\n" in text
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
    assert lines[-1] == ""  # bars are gone at the end


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's end of a terminal
        return b""


def test_onnxruntime_sends_no_telemetry(tmp_path: Path) -> None:
    """Its telemetry writes a device id into the cache folder as soon as a graph is loaded, unless it is off."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(body, opset_imports=opset, ir_version=8), str(tmp_path / "model.onnx"))
    program = (
        "import sys, {}, onnxruntime\nonnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    )
    # It is off by itself where CI is set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "CI"))}
    written, graph = {}, str(tmp_path / "model.onnx")
    for first in ("os", "trident_serving", "trident_export"):
        (tmp_path / first).mkdir()
        environment["HOME"] = str(tmp_path / first)
        subprocess.run(
            [sys.executable, "-c", program.format(first), graph],
            cwd=ROOT,
            env=environment,
            check=True,
        )
        written[first] = [file.name for file in (tmp_path / first).rglob("*") if file.is_file()]
    assert "deviceid" in written["os"]
    assert written["trident_serving"] == written["trident_export"] == []


def test_make_serve_goes_on_past_failed_exports() -> None:
    done = subprocess.run(["make", "-n", "serve", "FORCE=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "trident_export export" in line)
    assert "export --keep-going --force --models-file 'models.toml'" in line
    done = subprocess.run(["make", "-n", "export"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--keep-going" not in done.stdout
