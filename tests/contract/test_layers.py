"""Packages import downward only: what is lower can be read and changed without what is above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Of trident_serving, from the bottom; a layer imports from its own and from lower ones, packages of one layer not from
# each other. Modules of the root that are not named here are free of this.
SERVING: tuple[tuple[str, ...], ...] = (
    ("errors", "artefacts"),
    ("text",),
    ("chat",),
    ("schema",),
    ("runtime",),
    ("generation", "seq2seq", "encoders"),
    ("guard", "vllm"),
    ("triton",),
)
CLIENT: tuple[tuple[str, ...], ...] = (
    ("_errors", "_types", "_options", "_task_options", "_admin_key", "_protocol"),
    ("_settings", "_wire", "_watch"),
    ("_steps", "_choice", "_sending"),
    ("_control", "_generation", "_tasks"),  # what calls send: no input, no output
    ("_grpc", "_http"),
    ("_grpc_channel", "_grpc_aio", "_http_client", "_http_async"),
    ("_connection", "_async_connection"),
    ("_client", "_async_client"),
    ("cli",),
)
EXPORT: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("progress", "quiet", "corpora"),
    ("passes",),
    ("recipes",),
    ("models_file",),
    ("configs",),
    ("tasks",),
    ("compression",),
    ("cli",),
)


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports at its top, with the names that may be modules too."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(folder: Path, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports of a package's modules from a layer above, or from beside."""
    rank = {name: level for level, names in enumerate(layers) for name in names}
    found = []
    for file in sorted(folder.rglob("*.py")):
        own = file.relative_to(folder).with_suffix("").parts[0]
        for module in set(imports(file)):
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package != folder.name or own not in rank or other not in rank or other == own:
                continue
            if rank[other] >= rank[own]:
                found.append(f"{file.relative_to(folder)} imports {module}")
    return found


@pytest.mark.parametrize(
    ("folder", "layers"),
    [
        ("client/trident_client", CLIENT),
        ("serving/trident_serving", SERVING),
        ("export/trident_export", EXPORT),
    ],
)
def test_nothing_imports_upward(folder: str, layers: tuple[tuple[str, ...], ...]) -> None:
    assert upward(ROOT / folder, layers) == []


def test_an_import_upward_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "trident_serving"
    (folder / "runtime").mkdir(parents=True)
    (folder / "seq2seq").mkdir()
    (folder / "runtime" / "loop.py").write_text("from trident_serving.generation import engine\n")
    (folder / "seq2seq" / "engine.py").write_text("from trident_serving.generation.engine import Engine\n")
    (folder / "seq2seq" / "search.py").write_text("from trident_serving.runtime.loop import EngineLoop\n")
    assert {line.split(" ")[0] for line in upward(folder, SERVING)} == {"runtime/loop.py", "seq2seq/engine.py"}


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [
        ("client/trident_client", ("trident_serving", "trident_export", "trident_gateway")),
        ("gateway/trident_gateway", ("trident_serving", "trident_export", "tokenizers", "onnxruntime")),
        ("serving/trident_serving", ("trident_export", "trident_gateway", "torch", "transformers", "onnx")),
    ],
)
def test_packages_stand_on_lower_ones(folder: str, foreign: tuple[str, ...]) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        assert not {module.partition(".")[0] for module in imports(file)} & set(foreign), file


def test_the_exporters_commands_start_without_torch() -> None:
    """`make serve` runs one each time, mostly to find that nothing is to be exported."""
    code = "import sys, trident_export.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
