"""The launcher's sentences about models that could not be loaded, from indexes as Triton 2.51 gives them."""

from __future__ import annotations

from pathlib import Path

from trident_serving.artefacts import Manifest, read_failures, write_failures
from trident_serving.launcher import failures

STACK = "\n\nAt:\n  <unknown>(1): template\n  /x/jinja2/environment.py(942): handle_exception\n"
INDEX = [
    {"name": ".trident"},
    {
        "name": "chat",
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": f"Internal: SyntaxError: odd '}}'{STACK}",
    },
    {"name": "good", "version": "1", "state": "READY"},
    {"name": "mood"},
    {"name": "mood_int8", "version": "1", "state": "READY"},
    {
        "name": "mood_model",
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": f"Internal: LoadError: there is no model.onnx in /r/mood_model/1{STACK}",
    },
    {"name": "mood_model_int8", "version": "1", "state": "READY"},
    {"name": "mood_tokenizer", "version": "1", "state": "READY"},
    {"name": "plain", "version": "1", "state": "UNAVAILABLE", "reason": "Not found: unable to load shared library\n x"},
]
MOOD = ["mood", "mood_int8", "mood_model", "mood_model_int8", "mood_tokenizer"]
WANTED = ["chat", "good", *MOOD, "plain"]


def manifest(name: str, models: list[str], public: dict[str, str]) -> Manifest:
    return Manifest(name, "task", models, public, "fingerprint")


MANIFESTS = [
    manifest("chat", ["chat"], {"fp32": "chat"}),
    manifest("good", ["good"], {"fp32": "good"}),
    manifest("mood", MOOD, {"fp32": "mood", "int8": "mood_int8"}),
]


def found() -> list[failures.Failure]:
    return failures.find(failures.entries(INDEX), WANTED, MANIFESTS)


def test_each_failed_model_is_named_once_with_what_it_lacks() -> None:
    assert [(each.name, each.missing, each.cause) for each in found()] == [
        ("chat", ("chat",), "chat"),
        ("mood", ("mood",), "mood_model"),
        ("plain", ("plain",), "plain"),
    ]
    assert failures.anything_ready(failures.entries(INDEX), WANTED)


def test_the_sentences_say_why_and_what_to_do() -> None:
    chat, mood, plain = (each.sentence(Path("/r")) for each in found())
    assert chat == (
        "chat can't be loaded (SyntaxError: odd '}'): mend it, or remove /r/chat/1 and run make export MODEL=chat"
    )
    assert mood.startswith("mood can't be loaded (its stage mood_model: there is no model.onnx in /r/mood")
    assert "unable to load shared library x" in plain
    assert "\n" not in chat + mood + plain


def test_a_stage_that_all_variants_need_fails_them_all() -> None:
    index = [
        failures.IndexEntry(name, "UNAVAILABLE" if name == "mood_tokenizer" else "", "why" * (name == "mood_tokenizer"))
        for name in MOOD
    ]
    (failure,) = failures.find(index, MOOD, MANIFESTS)
    assert (failure.missing, failure.cause, failure.reason) == (("mood", "mood_int8"), "mood_tokenizer", "why")
    assert not failures.anything_ready(index, MOOD)


def test_a_model_that_triton_does_not_know_is_failed() -> None:
    (failure,) = failures.find([], ["good"], MANIFESTS)
    assert (failure.name, failure.reason) == ("good", "tritonserver gave no reason")


def test_nothing_failed() -> None:
    assert failures.find(failures.entries(INDEX), ["good"], MANIFESTS) == []


def test_long_reasons_are_cut() -> None:
    assert len(failures.one_line("Internal: " + "x" * 900)) == 300


def test_failed_exports_are_remembered(tmp_path: Path) -> None:
    assert read_failures(tmp_path) == {}
    write_failures(tmp_path, {"chat": "no room"})
    assert read_failures(tmp_path) == {"chat": "no room"}
    (tmp_path / ".trident/failures.json").write_text("[1")
    assert read_failures(tmp_path) == {}


def test_a_version_that_made_room_hides_no_other() -> None:
    ready = {"name": "m", "state": "READY"}
    gone = {"name": "m", "state": "UNAVAILABLE", "reason": "unloaded"}
    failed = {"name": "m", "state": "UNAVAILABLE", "reason": "Internal: too large"}
    for index in ([ready | {"version": "1"}, gone | {"version": "2"}], [gone | {"version": "2"}, ready]):
        assert failures.entries(index) == [failures.IndexEntry("m", "READY", "", served=True, version="1")]
    for index in ([ready, failed | {"version": "2"}], [failed | {"version": "2"}, ready]):
        (entry,) = failures.entries(index)
        assert (entry.failed, entry.served, entry.version) == (True, True, "2")
    (entry,) = failures.entries([failed, gone])
    assert (entry.failed, entry.served) == (True, False)
    assert failures.entries([gone]) == [failures.IndexEntry("m", "UNAVAILABLE", "unloaded")]


def test_versions_that_are_being_unloaded() -> None:
    ready, going = {"name": "m", "state": "READY", "version": "3"}, {"name": "m", "state": "UNLOADING"}
    for index in ([going, ready, going | {"version": "2"}], [ready, going, going | {"version": "2"}]):
        (entry,) = failures.entries(index)
        assert (entry.state, entry.version, entry.served, entry.unloading) == ("READY", "3", True, ("1", "2"))
    (entry,) = failures.entries([going, {"name": "m", "state": "UNAVAILABLE", "reason": "unloaded", "version": "2"}])
    assert (entry.state, entry.version, entry.served, entry.unloading) == ("UNLOADING", "1", False, ("1",))
