"""The exporter's errors: one tree, drawn as it is; what the system's errors mean; how a command ends."""

from __future__ import annotations

import ast
import builtins
import errno
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trident_export
from trident_export import disk, errors, report
from trident_export.errors import ExportError, NoMemory, NoSpace, NotWritable, SourceError, UnreadableSource
from trident_export.huggingface import folder
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.errors import StartError

PACKAGE = Path(trident_export.__file__).parent


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_every_error_of_the_package_is_in_the_tree() -> None:
    """An exception class anywhere else would not be printed as a sentence."""
    known = {name for name, value in vars(builtins).items() if inspect.isclass(value) and issubclass(value, Exception)}
    known |= set(vars(errors))
    strays = [
        f"{file.relative_to(PACKAGE)}: {node.name}"
        for file, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and file.name != "errors.py"
        if known & {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
    ]
    assert strays == []


def test_the_tree_is_drawn_as_it_is() -> None:
    defined = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, ExportError)]
    depths = {
        value.__name__: len([base for base in value.__mro__ if issubclass(base, ExportError)]) for value in defined
    }
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()
        if words and words[0] in depths:
            drawn[words[0]] = (line.index(words[0])) // 4
    assert drawn == depths


def test_no_bare_value_error_is_raised() -> None:
    """A message for the user has a class of the tree; a ValueError would be shown as our defect."""
    bare = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") in ("ValueError", "KeyError", "TypeError", "Exception")
    ]
    assert bare == []


def os_error(number: int, file: Path | None = None) -> OSError:
    return OSError(number, "reason", str(file)) if file else OSError(number, "reason")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, NoSpace, "the disk of {file} is full"),
        (errno.EDQUOT, NoSpace, "the disk of {file} is full"),
        (errno.EFBIG, NoSpace, "{file} can't hold a file as large as this one"),
        (errno.EACCES, NotWritable, "{file} can't be written by user"),
        (errno.EROFS, NotWritable, "{file} can't be written by user"),
    ],
)
def test_errors_of_the_system_name_the_path(tmp_path: Path, number: int, kind: type[ExportError], message: str) -> None:
    file = tmp_path / "some" / "file"
    meaning = disk.explain(os_error(number, file), Path("/"))
    assert type(meaning) is kind
    assert str(meaning).startswith(message.format(file=file))
    assert str(disk.explain(os_error(number), tmp_path)).startswith(message.format(file=tmp_path))
    # Libraries raise errors of their own from it.
    outer = RuntimeError("can't save")
    outer.__cause__ = os_error(number, file)
    assert type(disk.explain(outer)) is kind


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    for wanted in (taken, taken / "deeper" / "still"):
        with pytest.raises(OSError, match="Errno") as raised:
            wanted.mkdir(parents=True, exist_ok=True)
        meaning = disk.explain(raised.value)
        assert str(meaning) == f"{taken} is a file, and a folder is needed there: name another one"
        assert type(meaning) is NotWritable
    with pytest.raises(IsADirectoryError) as opened:
        tmp_path.write_text("")
    assert str(disk.explain(opened.value)) == f"{tmp_path} is a folder, and a file is needed there: name another one"
    disk.require_folder(tmp_path / "new" / "one")


def test_other_errors_mean_nothing(tmp_path: Path) -> None:
    assert disk.explain(ValueError("x"), tmp_path) is None
    assert disk.explain(os_error(errno.ENOENT, tmp_path), tmp_path) is None
    assert disk.explain(SourceError("x"), tmp_path) is None
    assert isinstance(disk.explain(MemoryError(), tmp_path), NoMemory)


def test_a_full_disk_explains_an_error_that_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_free", lambda path: 4096)
    with pytest.raises(NoSpace, match=f"the disk of {tmp_path} is full"), disk.writing(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 0")
    with pytest.raises(UnreadableSource, match="mine"), disk.writing(tmp_path):
        raise UnreadableSource("mine")


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (SourceError("no such model"), 1, "trident-export: no such model\n"),
        (StartError("the server ended with status 1"), 1, "trident-export: the server ended with status 1\n"),
        (KeyboardInterrupt(), 130, "trident-export: interrupted; what was installed before is untouched\n"),
        (os_error(errno.EROFS, Path("/x")), 1, "trident-export: /x can't be written by user"),
        (ValueError("odd"), 70, "Traceback (most recent call last):\n"),
        (FileNotFoundError(2, "No such file", "/x"), 70, "Traceback (most recent call last):\n"),
    ],
)
def test_how_a_command_ends(raised: BaseException, status: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise raised

    assert report.guarded(command) == status
    said = capsys.readouterr().err
    assert said.startswith(shown)
    assert ("this is a defect of trident-export" in said) == (status == 70)


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(())}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(tensors, tmp_path / "consolidated.safetensors")  # the same once more
    assert HuggingFaceFolder(tmp_path).parameters == 15 + 7 + 1
    cut = tmp_path / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:12])
    with pytest.raises(UnreadableSource, match=f"{cut} is cut off: copy the model again"):
        str(HuggingFaceFolder(tmp_path).parameters)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_older_weight_files_are_counted_by_their_size(tmp_path: Path, dtype: str, width: int) -> None:
    (tmp_path / "config.json").write_text(f'{{"torch_dtype": "{dtype}"}}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 800)
    assert HuggingFaceFolder(tmp_path).parameters == 800 // width


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("pad"), "KeyError: 'pad'"),
        (RuntimeError("first line:\n second"), "first line"),
        (RuntimeError(""), "RuntimeError"),
        (ValueError("x" * 999), "x" * 297 + "..."),
    ],
)
def test_what_a_library_says_fits_into_a_sentence(error: Exception, said: str) -> None:
    assert folder.reason(error) == said
