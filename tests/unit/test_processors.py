"""Processors by their flags, and what a model is made by on each of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trident_export import doctor, install, models_file, processors, recipes
from trident_export.fingerprint import fingerprint
from trident_export.passes.gptq import GptqGroups
from trident_export.passes.rotate import Rotate
from trident_export.passes.spread import Spread
from trident_export.processors import Processor
from trident_export.recipes import Kind
from trident_serving.artefacts import VERSION, Manifest

TABLE: dict[str, Any] = {
    "task": "text-generation",
    "source": {"hub": "some/where", "revision": "0"},
    "variants": ["int8", "fp32"],
    "more_variants": ["int8_cache"],
    "limits": {"context": 64},
}


def parse(table: dict[str, Any]) -> models_file.ModelSpec:
    """A model whose int8 is made by another recipe on processors with AMX."""
    known = recipes.load()
    chosen = dataclasses.replace(known["int8"], processors={Processor.AMX: "int8_channels"})
    return models_file.parse("m", table, {**known, "int8": chosen})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8", Processor.AMX),
        ("fpu avx2 avx512f avx512_vnni amx_tile amx_bf16", Processor.VNNI),  # tiles without integers
        ("fpu avx2 avx512f avx512_vnni", Processor.VNNI),
        ("fpu avx2 avx_vnni", Processor.VNNI),
        ("fpu avx2 avx512f", Processor.AVX2),
        ("fpu avx2", Processor.AVX2),
        ("fpu avx", Processor.OTHER),
        ("", Processor.OTHER),
    ],
)
def test_a_processor_is_told_by_its_flags(tmp_path: Path, flags: str, expected: Processor) -> None:
    assert processors.of(flags.split()) == expected
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: amx_int8 amx_tile\nflags\t\t: {flags}\n\nflags\t\t: none\n")
    assert processors.this_machine(file) == expected


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert processors.this_machine(tmp_path / "none") == Processor.OTHER
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd\n")
    assert processors.this_machine(tmp_path / "cpuinfo") == Processor.OTHER


@pytest.mark.parametrize("here", Processor)
def test_a_variant_is_made_by_what_the_processor_has(monkeypatch: pytest.MonkeyPatch, here: Processor) -> None:
    monkeypatch.setattr(processors, "this_machine", lambda: here)
    spec = parse(TABLE)
    channels = here == Processor.AMX
    steps = spec.recipes["int8"].passes[Kind.DECODER]
    assert spec.recipes["int8"].name == ("int8_channels" if channels else "int8")
    assert any(isinstance(step, GptqGroups) for step in steps) != channels
    assert (Rotate(heads=True) in steps, any(isinstance(step, Spread) for step in steps)) == (channels, channels)
    assert spec.recipes["int8"].precision == "int8"
    assert spec.recipes["fp32"].passes[Kind.DECODER] == ()
    assert spec.more["int8_cache"].name == "int8_cache"
    # What the table says goes before what the machine has.
    assert parse(TABLE | {"processor": "avx2"}).recipes["int8"].name == "int8"
    assert parse(TABLE | {"processor": "amx"}).recipes["int8"].name == "int8_channels"
    # Encoders and GPUs have one int8.
    for task, limits, expected in (
        ("feature-extraction", {"dimensions": 8}, "int8"),
        ("translation", {}, "int8_channels" if channels else "int8"),
        ("text-generation", {"device": "cuda"}, "int8"),
    ):
        other = parse(TABLE | {"task": task, "limits": limits, "more_variants": []})
        assert other.recipes["int8"].name == expected


def test_of_the_built_in_recipes_none_asks_for_the_processor() -> None:
    assert not any(recipe.processors for recipe in recipes.load().values())


def test_a_model_is_current_for_the_processor_that_it_was_exported_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine serves it and does not export it again, unless its table says so."""
    monkeypatch.setattr(processors, "this_machine", lambda: Processor.AMX)
    spec = parse(TABLE)
    made = Manifest("m", spec.task, [], {}, fingerprint(spec, Path()), processor=Processor.AMX)
    monkeypatch.setattr(processors, "this_machine", lambda: Processor.AVX2)
    here = parse(TABLE)
    assert fingerprint(here, Path()) != made.fingerprint
    assert fingerprint(install.as_made(here, made), Path()) == made.fingerprint
    assert install.as_made(here, made).recipes["int8"].name == "int8_channels"
    pinned = parse(TABLE | {"processor": "avx2"})
    assert install.as_made(pinned, made) == pinned
    older = Manifest("m", spec.task, [], {}, "")
    assert install.as_made(here, older) == here


def test_the_doctor_says_that_a_model_was_made_for_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = parse(TABLE)
    folder = tmp_path / "m" / VERSION
    folder.mkdir(parents=True)

    def warnings(made: str, here: Processor) -> list[str]:
        Manifest("m", spec.task, [], {}, "", processor=made).write(folder)
        monkeypatch.setattr(processors, "this_machine", lambda: here)
        found = doctor.examine([spec], tmp_path, tmp_path)
        return [finding.text for finding in found if "processor" in finding.text and not finding.problem]

    assert warnings("amx", Processor.AVX2) == [
        "[m] was exported for a processor with amx, this one has avx2: its answers are right, int8 may be slow here; "
        'processor = "avx2" in its table and an export make it for this one'
    ]
    assert len(warnings("avx2", Processor.AMX)) == 1
    assert warnings("vnni", Processor.AVX2) == []  # their recipes are the same
    assert warnings("amx", Processor.AMX) == []
    assert warnings("", Processor.AMX) == []


def test_impossible_processors(tmp_path: Path) -> None:
    for value in ("sse", 5, ["amx"]):
        with pytest.raises(models_file.ModelsFileError, match="processor must be one of amx, vnni, avx2, other"):
            parse(TABLE | {"processor": value})
    for text, message in (
        ('processors = { sse = "int8" }', "processors must be a table of amx, vnni, avx2, other"),
        ("processors = { amx = 5 }", "processors must name recipes"),
        ('processors = { amx = "none" }', r"\[x\] processors: 'none' must be another recipe"),
        ('processors = { amx = "x" }', "'x' must be another recipe, one without processors"),
    ):
        (tmp_path / "recipes.toml").write_text(f"[x]\ndecoder = []\n{text}\n")
        with pytest.raises(models_file.ModelsFileError, match=message):
            recipes.load(tmp_path)
