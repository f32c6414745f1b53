"""models.toml: what it may say, and how it complains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trident_export import add, models_file, pin
from trident_export.errors import ModelsFileError, SourceError
from trident_export.huggingface import sources
from trident_export.models_file import ModelSpec
from trident_serving.schema.limits import LIMITS, EmbeddingLimits, GenerationLimits

GOOD: dict[str, Any] = {
    "task": "text-generation",
    "source": {"hub": "openai-community/gpt2"},
    "variants": ["int8", "fp32"],
    "limits": {"context": 64},
}
PACKAGE: dict[str, Any] = {"package": "a==1", "path": "b", "sha256": "0" * 64}
EMBEDDING: dict[str, Any] = {
    "task": "feature-extraction",
    "source": {"path": "x"},
    "variants": ["fp32"],
    "limits": {"dimensions": 8, "max_tokens": 100, "buckets": [32, 64]},
}


def test_what_a_source_adds_counts_only_where_it_is_said() -> None:
    plain = models_file.parse("gpt2", GOOD | {"source": {"package": "a==1", "path": "b"}}).as_dict()["source"]
    assert set(plain) == {
        "hub",
        "revision",
        "package",
        "path",
        "adapter",
        "adapter_revision",
    }  # as before it could say more
    part = {"package": "b==1", "sha256": "1" * 64, "path": "c"}
    added = PACKAGE | {"parts": [part], "files": {"config.json": {"d_ff": 3}}}
    found = models_file.parse("gpt2", GOOD | {"source": added})
    assert found.as_dict()["source"] == plain | {
        "sha256": "0" * 64,
        "parts": (part,),
        "files": '{"config.json": {"d_ff": 3}}',
    }
    assert found.source.files.values == {"config.json": {"d_ff": 3}}


def test_a_good_table() -> None:
    spec = models_file.parse("gpt2", GOOD)
    assert spec.default_variant == "int8"
    assert spec.limits == GenerationLimits(context=64)
    assert [spec.public_name(variant) for variant in spec.variants] == ["gpt2", "gpt2_fp32"]
    embedding = models_file.parse("e", EMBEDDING)
    assert isinstance(embedding.limits, EmbeddingLimits)
    assert embedding.limits.all_buckets == (32, 64, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": ["fp32"]}, "unknown key variant; known are task, source, variants"),
        ({"task": "text-generator"}, "task 'text-generator' is not one of text-generation, translation, summarization"),
        ({"variants": []}, "variants must be different ones of fp32"),
        ({"variants": ["fp32", "fp32"]}, "variants must be different ones"),
        ({"variants": ["int3"]}, "found ('int3',)"),
        ({"default_variant": "int4"}, "default_variant 'int4' is not one of variants int8, fp32"),
        ({"explain": {"max_words": 5}}, "explain: unknown key max_words; known are max_runs, max_waiting, timeout"),
        ({"explain": {"max_runs": 0}}, "explain.max_runs must be a positive integer, found 0"),
        ({"explain": 1}, "explain must be a table, found 1"),
        ({"adapters": ["a"]}, "adapters must be a table of names and folders, found ['a']"),
        ({"adapters": {"a,b": "x"}}, "adapters: 'a,b' must have letters, digits"),
        ({"adapters": {"a": 5}}, "adapters.a must be str, found 5"),
        ({"adapters": {"a": ""}}, "adapters.a must be the folder of an adapter, found ''"),
        (
            {"adapters": {"a": "x"}, "source": {"path": "b", "adapter": "c"}},
            "a source has an adapter that is merged, or the table has adapters, not both",
        ),
        (
            {"adapters": {"a": "x"}, "task": "translation", "limits": {}},
            "adapters are for text-generation alone, the task is translation",
        ),
        ({"source": {}}, "source must be { hub, revision }, { path } or { package, path }"),
        ({"source": {"hub": "a", "path": "b"}}, "source must be"),
        ({"source": {"hub": 1}}, "source.hub must be str, found 1"),
        (
            {"source": {"url": "a"}},
            "unknown key url; known are hub, revision, package, path, adapter, adapter_revision",
        ),
        ({"source": {"package": "a>=1", "path": "b"}}, "must pin a version"),
        ({"source": {"path": "b", "sha256": "0" * 64}}, "a package also with sha256"),
        ({"source": {"package": "a==1", "path": "b", "parts": []}}, "a package also with sha256, and then with parts"),
        ({"source": {"package": "a==1", "path": "b", "sha256": "x"}}, "source.sha256 must be 64 digits"),
        ({"source": PACKAGE | {"parts": 5}}, "source.parts must be list, found 5"),
        ({"source": PACKAGE | {"parts": [{"package": "b==1"}]}}, "source.parts[0]: sha256, path is missing"),
        (
            {"source": PACKAGE | {"parts": [{"package": "b", "sha256": "0" * 64, "path": "c"}]}},
            "source.parts[0].package must pin a version",
        ),
        ({"source": {"hub": "a", "files": {}}}, "found ['files', 'hub']"),
        ({"source": PACKAGE | {"files": {"../config.json": {}}}}, "must be a JSON file inside of the folder"),
        ({"source": PACKAGE | {"files": {"weights.bin": {}}}}, "files: 'weights.bin' must be a JSON file"),
        ({"source": PACKAGE | {"files": {"config.json": 5}}}, "files.config.json must be a table or a list, found 5"),
        ({"limits": {"contxt": 3}}, "unknown key contxt; known are context, slots"),
        ({"trust_remote_code": 1}, "trust_remote_code must be bool"),
        ({"limits": {"slots": 0}}, "limits.slots must be a positive integer, found 0"),
        ({"limits": {"slots": True}}, "limits.slots must be a positive integer, found True"),
        ({"on_demand": "yes"}, "on_demand must be bool"),
        ({"gates": {"int4": {}}}, "unknown key int4; known are int8, fp32"),
        ({"gates": 5}, "gates must be a table, found 5"),
        ({"gates": {"int8": 5}}, "gates.int8 must be a table, found 5"),
        ({"gates": {"int8": {"kl": "low"}}}, "gates.int8.kl must be a number, found 'low'"),
        ({"task": []}, "task [] is not one of text-generation"),
        ({"variants": 5}, "variants must be a list of texts, found 5"),
        ({"more_variants": [[1]]}, "more_variants must be a list of texts, found [[1]]"),
        ({"calibration": "a\0"}, "calibration holds a null character"),
        ({"draft": 1}, "draft must be str, found 1"),
        ({"draft": "fp32"}, "draft 'fp32' drafts for larger variants, and none of int8, fp32 is"),
        ({"draft": "int4", "more_variants": ["int4"]}, "draft 'int4' is made on request: move it from more_variants"),
        (
            {"task": "fill-mask", "limits": {"max_tokens": 9}, "draft": "int8"},
            "draft is for text-generation, the task is fill-mask",
        ),
        ({"limits": {"slots": 2**40}}, "limits.slots must be at most 2147483647, found 1099511627776"),
    ],
)
def test_what_is_impossible(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelsFileError) as error:
        models_file.parse("gpt2", GOOD | change)
    assert "[gpt2]" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "dimensions is missing"),
        ({"dimensions": 8, "buckets": [64, 32]}, "buckets must rise"),
        ({"dimensions": 8, "max_tokens": 50, "buckets": [64]}, "buckets must rise to max_tokens (50)"),
        ({"dimensions": 8, "truncate": 1}, "truncate must be bool"),
    ],
)
def test_impossible_limits_of_embeddings(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelsFileError) as error:
        models_file.parse("e", EMBEDDING | {"limits": limits})
    assert message in str(error.value)


def test_explanations_change_what_is_made_and_nothing_without_them() -> None:
    plain = models_file.parse("gpt2", GOOD)
    assert plain == models_file.parse("gpt2", GOOD | {"explain": False})
    assert "explain" not in plain.as_dict()
    assert models_file.parse("gpt2", GOOD | {"explain": True}).as_dict()["explain"]["max_runs"] == 512
    with pytest.raises(ModelsFileError, match=r"\[e\]: explain is for text-classification, .* without another engine"):
        models_file.parse("e", EMBEDDING | {"explain": True})


@pytest.mark.parametrize("missing", ["task", "source", "variants", "limits"])
def test_missing_keys(missing: str) -> None:
    with pytest.raises(ModelsFileError, match=f"{missing} is missing"):
        models_file.parse("gpt2", {key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize("name", ["GPT2", "a_b", "a/b", "", ".", "..", ".trident", "-a", "a\n", "a\x00", "a" * 129])
def test_names(name: str) -> None:
    with pytest.raises(ModelsFileError, match="lower-case"):
        models_file.parse(name, GOOD)


def test_a_table_is_written_into_toml_alone(tmp_path: Path) -> None:
    path, proposal = tmp_path / "models.toml", add.Proposal("m", {"task": "fill-mask"}, ())
    for content in (b"[[[", b"\xff\xfe", b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000):
        path.write_bytes(content)
        with pytest.raises(ModelsFileError, match="models.toml is not TOML"):
            add.append(path, proposal)
        assert path.read_bytes() == content
    path.unlink()
    add.append(path, proposal)
    assert path.read_text() == '[m]\ntask = "fill-mask"\n'
    with pytest.raises(ModelsFileError, match="letters, digits"):
        add.propose(tmp_path, {"path": str(tmp_path)}, "x\n[y]")


@pytest.mark.parametrize("named", ["~nosuchuser/x", "a" * 5000])
def test_a_path_that_can_not_be_one(named: str) -> None:
    with pytest.raises(SourceError, match="source path .* can't be used: "):
        sources.path_of(named)


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ModelsFileError, match=r"'a\\udcff' is no text in UTF-8, which models.toml is: rename it"):
        add.propose(tmp_path, {"path": "a\udcff"}, "m")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    with pytest.raises(ModelsFileError, match="there is no models file"):
        models_file.load(path)
    path.write_text("[a")
    with pytest.raises(ModelsFileError, match="is not TOML"):
        models_file.load(path)
    path.write_text(
        '[gpt2]\ntask = "text-generation"\nsource = { hub = "a/b" }\nvariants = ["fp32"]\nlimits = {}\n'
        'on_demand = true\n[other]\ntask = "text-generation"\nsource = { path = "p" }\nvariants = ["fp32"]\n'
        "limits = {}\n"
    )
    specs = models_file.load(path)
    assert [spec.name for spec in models_file.select(specs, None)] == ["other"]
    assert [spec.name for spec in models_file.select(specs, "gpt2")] == ["gpt2"]
    with pytest.raises(ModelsFileError, match="there is no model 'nope'; known are gpt2, other"):
        models_file.select(specs, "nope")


PINNED = """# a comment that stays
[one]
task = "text-generation"
source = { hub = "a/one" }
variants = ["fp32"]
limits = {}

[two]
task = "text-generation"
source = { hub = "a/two", revision = "old" }
variants = ["fp32"]
limits = {}

[local]
task = "text-generation"
source = { path = "p" }
variants = ["fp32"]
limits = {}
"""


def test_pin_writes_the_ids_that_the_hub_gives(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(PINNED)
    commits = {"a/one": "1" * 40, "a/two": "2" * 40}
    found = pin.pin(path, models_file.load(path), lambda hub, revision: commits[hub])
    assert found == {"one": "1" * 40, "two": "2" * 40}
    specs = {spec.name: spec.source for spec in models_file.load(path)}
    assert specs["one"].revision == "1" * 40
    assert specs["two"].revision == "2" * 40
    assert path.read_text() == PINNED.replace('"a/one" }', f'"a/one", revision = "{"1" * 40}" }}').replace(
        '"old"', f'"{"2" * 40}"'
    )


def test_pin_changes_nothing_where_an_id_can_not_be_had(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(PINNED)

    def resolver(hub: str, revision: str) -> str:
        if hub == "a/two":
            raise SourceError("no such model")
        return "1" * 40

    with pytest.raises(SourceError):
        pin.pin(path, models_file.load(path), resolver)
    assert path.read_text() == PINNED


def test_half_precision_is_for_a_gpu() -> None:
    table = {"task": "text-generation", "source": {"path": "x"}, "variants": ["fp16"], "limits": {"device": "cuda"}}
    assert models_file.parse("x", table).limits.device == "cuda"  # type: ignore[union-attr]
    with pytest.raises(ModelsFileError, match="it is for a GPU"):
        models_file.parse("x", table | {"limits": {}})
    with pytest.raises(ModelsFileError, match="device must be one of cpu, cuda, found 'tpu'"):
        models_file.parse("x", table | {"limits": {"device": "tpu"}})


def test_limits_of_the_engine() -> None:
    table = {"task": "text-generation", "source": {"path": "x"}, "variants": ["fp32"]}
    limits = models_file.parse("x", table | {"limits": {"kv_cache_mib": 0, "prompt_lookup": False}}).limits
    assert (limits.kv_cache_mib, limits.prompt_lookup, limits.prefix_reuse) == (0, False, True)  # type: ignore[union-attr]
    for bad, message in (
        ({"kv_cache_mib": -1}, "kv_cache_mib must be an integer, 0 or more, found -1"),
        ({"prefix_reuse": 1}, "prefix_reuse must be bool, found 1"),
        ({"slots": 0}, "slots must be a positive integer, found 0"),
        ({"context": 1}, "context must be at least 2"),
    ):
        with pytest.raises(ModelsFileError, match=message):
            models_file.parse("x", table | {"limits": bad})


def test_the_reference_names_every_task() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "models-toml.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| `task` |")]
    assert set(re.findall(r"`([\w-]+)`", row)) == {"task", *LIMITS}


def test_options_of_chat_templates() -> None:
    """Of a generator, and of a task in front of one."""
    options = {"enable_thinking": False}
    limits = {"limits": {"context": 64, "chat_template_kwargs": options, "chat_format": "hermes"}}
    generator = models_file.parse("g", GOOD | limits).generation
    assert generator is not None
    assert generator.chat_template_kwargs.values == options
    table = {"task": "summarization", "generator": "g", "template": "{{ text_input }}", "chat_template_kwargs": options}
    template = models_file.parse("t", table).template
    assert template is not None
    assert template.chat_template_kwargs.values == options
    for bad in (5, "x", {"messages": 1}, {"a b": 1}):
        for name, wrong in (
            ("g", GOOD | {"limits": {"chat_template_kwargs": bad}}),
            ("t", table | {"chat_template_kwargs": bad}),
        ):
            with pytest.raises(ModelsFileError, match="chat_template_kwargs"):
                models_file.parse(name, wrong)
    with pytest.raises(ModelsFileError, match="chat_format must be one of auto, hermes"):
        models_file.parse("g", GOOD | {"limits": {"chat_format": "qwen"}})


def _tables(tmp_path: Path, **drafts: str) -> dict[str, ModelSpec]:
    """Generators a, b and c with the drafts that are named; d is for a GPU."""
    tables = []
    for name in "abcd":
        draft = f'draft = "{drafts[name]}"\n' if name in drafts else ""
        variants, device = ('"fp32"', "cuda") if name == "d" else ('"int8", "fp32"', "cpu")
        tables.append(
            f'[{name}]\ntask = "text-generation"\nsource = {{ path = "p" }}\nvariants = [{variants}]\n'
            f'limits = {{ device = "{device}" }}\n{draft}'
        )
    (tmp_path / "models.toml").write_text("\n".join(tables) + TEMPLATE)
    return {spec.name: spec for spec in models_file.load(tmp_path / "models.toml")}


TEMPLATE = '[t]\ntask = "summarization"\ngenerator = "a"\ntemplate = "{{ text_input }}"\n'


def test_drafts_are_own_variants_or_other_generators(tmp_path: Path) -> None:
    found = _tables(tmp_path, a="int8", b="a_fp32", c="b")
    assert found["a"].draft_of("int8") is None
    own = found["a"].draft_of("fp32")
    assert own is not None
    assert (own[0].name, own[1]) == ("a", "int8")
    for name, variant, expected in (("b", "int8", ("a", "fp32")), ("c", "fp32", ("b", "int8"))):
        other = found[name].draft_of(variant)
        assert other is not None
        assert (other[0].name, other[1]) == expected
    assert found["d"].draft_of("fp32") is None


@pytest.mark.parametrize(
    ("drafts", "message"),
    [
        ({"a": "x"}, r"\[a\]: draft 'x' is not one of int8, fp32, b, b_fp32, c, c_fp32, d"),
        ({"a": "a"}, r"\[a\]: draft 'a' is not one of int8"),
        ({"a": "t"}, r"\[a\]: draft 't' is not one of"),
        ({"a": "d"}, r"\[a\]: draft 'd' is made for the device 'cuda', this model for 'cpu'"),
        ({"a": "b", "b": "a"}, r"draft 'a': a and b would draft for each other"),
        ({"a": "b", "b": "c", "c": "a"}, r"draft 'a': a and b and c would draft for each other"),
    ],
)
def test_drafts_that_are_none(tmp_path: Path, drafts: dict[str, str], message: str) -> None:
    with pytest.raises(ModelsFileError, match=message):
        _tables(tmp_path, **drafts)
