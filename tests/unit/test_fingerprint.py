"""A fingerprint changes when the artefact would, and for no other reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from trident_export import fingerprint, models_file
from trident_export.models_file import ModelSpec


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the exporter's source that may be changed."""
    copy = tmp_path / "trident_export"
    shutil.copytree(fingerprint._ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_ROOT", copy)
    _forget()
    yield copy
    _forget()


def _forget() -> None:
    for cached in (fingerprint.imports, fingerprint.code, fingerprint.corpus):
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    return weights


def _spec(folder: Path, task: str, *variants: str, **limits: object) -> ModelSpec:
    table = {"task": task, "source": {"path": str(folder)}, "variants": list(variants), "limits": limits}
    return models_file.parse("m", table)


def _digests(folder: Path) -> tuple[str, str]:
    """Of a generator in int8 and of an encoder in float32."""
    _forget()
    generator = _spec(folder, "text-generation", "fp32", "int8")
    encoder = _spec(folder, "feature-extraction", "fp32", dimensions=8)
    return fingerprint.fingerprint(generator, folder), fingerprint.fingerprint(encoder, folder)


def _module(source: Path, name: str) -> Path:
    (found,) = [path for path in source.rglob("*.py") if path.relative_to(source).as_posix() == name]
    return found


@pytest.mark.parametrize("name", ["graphs/causal.py", "passes/gptq.py", "measure/fidelity.py"])
def test_comments_and_docstrings_change_nothing(source: Path, folder: Path, name: str) -> None:
    before = _digests(folder)
    module = _module(source, name)
    text = module.read_text()
    assert text.startswith('"""')
    module.write_text(text.replace('"""', '"""Another sentence. ', 1).replace("\n\n\n", "\n\n\n# A remark.\n"))
    assert _digests(folder) == before


@pytest.mark.parametrize(
    ("name", "generator", "encoder"),
    [
        ("graphs/causal.py", True, False),
        ("graphs/encoder.py", False, True),
        ("graphs/attention.py", False, True),
        ("graphs/fused.py", False, True),
        ("passes/gptq.py", True, False),
        ("passes/static.py", False, False),
        ("recipes.py", True, True),
        ("measure/fidelity.py", True, True),
        ("cli.py", False, False),
        ("progress.py", False, False),
    ],
)
def test_code_changes_what_it_makes(source: Path, folder: Path, name: str, generator: bool, encoder: bool) -> None:
    before = _digests(folder)
    module = _module(source, name)
    module.write_text(module.read_text() + "\n\nANOTHER = 1\n")
    after = _digests(folder)
    assert tuple(one != other for one, other in zip(before, after, strict=True)) == (generator, encoder)


def test_the_table_the_source_the_texts_and_the_format_count(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {fingerprint.fingerprint(_spec(folder, "text-generation", "fp32"), folder)}
    seen.add(fingerprint.fingerprint(_spec(folder, "text-generation", "fp32", slots=3), folder))
    (folder / "config.json").write_text('{"a": 1}')
    seen.add(fingerprint.fingerprint(_spec(folder, "text-generation", "fp32"), folder))
    text = next((source / "corpus").rglob("*.txt"))
    text.write_text(text.read_text() + "more\n")
    _forget()
    seen.add(fingerprint.fingerprint(_spec(folder, "text-generation", "fp32"), folder))
    monkeypatch.setattr(fingerprint, "FORMAT", 99)
    seen.add(fingerprint.fingerprint(_spec(folder, "text-generation", "fp32"), folder))
    monkeypatch.setattr(fingerprint.importlib.metadata, "version", lambda package: "0")
    seen.add(fingerprint.fingerprint(_spec(folder, "text-generation", "fp32"), folder))
    assert len(seen) == 6


def test_custom_code_is_part_of_the_fingerprint(folder: Path) -> None:
    table = {"task": "text-generation", "source": {"path": str(folder)}, "variants": ["fp32"], "limits": {}}
    digests = [
        fingerprint.fingerprint(models_file.parse("m", table | more), folder)
        for more in ({}, {"trust_remote_code": False}, {"trust_remote_code": True})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_of_a_draft_counts_what_makes_its_graph(folder: Path, tmp_path: Path) -> None:
    def digest(draft: str = 'draft = "small"', small: str = "", limits: str = "") -> str:
        head = f'task = "text-generation"\nsource = {{ path = "{folder}" }}\n'
        text = f'[big]\n{head}variants = ["fp32"]\nlimits = {{}}\n{draft}\n\n'
        text += f'[small]\n{head}variants = ["int8", "fp32"]\nlimits = {{ context = 64{limits} }}\n{small}\n'
        (tmp_path / "models.toml").write_text(text)
        return fingerprint.fingerprint(models_file.load(tmp_path / "models.toml")[0], tmp_path)

    before = digest()
    assert before == digest(small="on_demand = true", limits=", slots = 3")
    seen = {before, digest(draft=""), digest('draft = "small_fp32"'), digest(limits=", prefill_chunk = 32")}
    (tmp_path / "recipes.toml").write_text('[int8]\ndecoder = [{ pass = "groups", bits = 8 }]\n')
    seen.add(digest())
    assert len(seen) == 5
