"""The parts of `trident` that need no server, and its calls against the in-process one of test_client."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import trident_command
from tests.unit.test_client import Service, served  # noqa: F401 (a fixture)
from trident_client import (
    CancelledError,
    Client,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TridentError,
    UnavailableError,
    cli,
)
from trident_client._options import GENERATION
from trident_client.cli import (
    batch_output,
    bench,
    completion,
    connection,
    conversation,
    exits,
    generation,
    metrics,
    output,
    parser,
    texts,
    top,
    turns,
    verbs,
)
from trident_client.cli.batch_output import Output
from trident_client.cli.exits import Exit, InputError
from trident_client.cli.metrics import Sample
from trident_client.cli.verbs import Asked

Served = tuple[str, Service]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; gives its status, its output, and what it said on standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


def parsed(*arguments: str) -> argparse.Namespace:
    return parser.build().parse_args(arguments)


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [each for each in parser.build()._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(action.choices)


# Commands


def test_every_call_of_the_client_has_a_command() -> None:
    named = {"classify_zero_shot": "zero-shot", "classify_images_zero_shot": "zero-shot-images"}
    named |= {"parameters": "info", "unverified": "info"}
    named |= {"stream": "generate", "generate_many": "generate", "close": "", "infer": ""}
    named |= {"explain_page": "explain", "stream_transcription": "transcribe"}
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")}
    expected = {named.get(name, name.replace("_", "-")) for name in methods} - {""}
    assert expected <= set(commands())


def test_what_no_call_is_made_of() -> None:
    """Every command but these has --json and says where the server is."""
    for name, command in commands().items():
        flags = {flag for action in command._actions for flag in action.option_strings}
        assert ("--json" in flags) == (name != "completion"), name
        assert ("--url" in flags) == (name != "completion"), name


def test_an_import_brings_none_of_the_extra() -> None:
    code = "import sys, trident_client.cli.parser as parser; parser.build(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"rich", "prompt_toolkit", "shtab", "prometheus_client", "httpx2", "urllib.request"} & set(found)
    code = "import sys, trident_client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in found if name.startswith(("trident_client.cli", "argparse"))]


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("shtab", ["completion", "bash"]), ("rich", ["top", "--once"]), ("prometheus_client", ["top", "--json"])],
)
def test_a_package_of_the_extra_that_is_missing(
    missing: str, arguments: list[str], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, out, err = said(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"trident: trident {arguments[0]} needs {missing}")
    assert err.endswith(": pip install 'trident-serving[cli]'\n")


# How commands end


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InvalidRequestError("top_p is 2"), 1, "top_p is 2"),
        (NotFoundError("no model"), 1, "no model"),
        (ForbiddenError("key"), 1, "key"),
        (ServerError("a\n  b"), 1, "a b"),
        (CancelledError("gone"), 1, "gone"),
        (UnavailableError("away"), 3, "away"),
        (OverloadedError("full"), 3, "full"),
        (DeadlineExceededError("late"), 3, "late"),
        (InputError("wrong"), 2, "wrong"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "x.txt: No such file"),
        (ValueError("one"), 2, "one"),
        (KeyError("x"), 70, "this is a defect of Trident: KeyError: 'x' (TRIDENT_TRACEBACK=1 shows where)"),
        (KeyboardInterrupt(), 130, None),
        (BrokenPipeError(), 0, None),
    ],
)
def test_exit_statuses(
    error: BaseException, status: int, text: str | None, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Client, "served", fail)
    monkeypatch.setattr(exits, "_forget_output", lambda: None)
    assert said("served") == (status, "", "" if text is None else f"trident: {text}\n")


def test_every_error_of_the_client_has_a_status_of_its_own_kind() -> None:
    found = {kind.__name__: exits.status_of(kind("x")) for kind in (TridentError, *TridentError.__subclasses__())}
    assert set(found.values()) == {Exit.FAILED, Exit.UNAVAILABLE}
    page = Path(__file__).parents[2].joinpath("docs/reference/cli.md").read_text(encoding="utf-8")
    assert all(f"| {status.value} |" in page for status in Exit)


def test_no_server(said: Any) -> None:
    assert said("embed", "--url", "127.0.0.1:1", "x") == (
        3,
        "",
        "trident: no server answers at 127.0.0.1:1 (Connection refused): --url says where one is\n",
    )
    assert said("health", "--url", "127.0.0.1:1") == (3, "not reachable\n", "")


def test_a_reader_that_goes_away_and_a_full_disk(served: Served) -> None:  # noqa: F811
    command = [sys.executable, "-m", "trident_client.cli", "generate", "--url", served[0], "endless"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(5) == b"more "
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(20), process.stderr.read()) == (0, b"")
    assert served[1].cancelled.wait(5)
    process.stderr.close()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*command[:-1], "a"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"trident: No space left on device\n")


# Connections


def test_flags_of_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("secret\n")
    for name, content in {"TRIDENT_URL": "", "TRIDENT_API_KEY": ""}.items():
        monkeypatch.setenv(name, content)
    given = connection.arguments(parsed("health"))
    assert given["url"] == ["localhost:8001"]
    assert (given["timeout"], given["keepalive"], given["tls"], given["api_key"]) == (60.0, 20.0, False, None)
    assert (given["retries"], given["retry_silence"]) == (0, None)
    monkeypatch.setenv("TRIDENT_URL", "a:1, http://b:2")
    monkeypatch.setenv("TRIDENT_API_KEY", "of the environment")
    assert connection.arguments(parsed("health"))["url"] == ["a:1", "http://b:2"]
    flags = ["--url", "c:3", "--url", "d:4", "--timeout", "none", "--keepalive", "5", "--no-wait-if-full"]
    flags += ["--header", "x-team: search", "--api-key-file", str(tmp_path / "key"), "--server-name", "triton"]
    flags += ["--ca", "ca.pem", "--cert", "c.pem", "--key", "k.pem", "--max-message-bytes", "100"]
    flags += ["--retries", "2", "--retry-silence", "1.5"]
    before, after = (connection.arguments(parsed(*each)) for each in ([*flags, "health"], ["health", *flags]))
    assert before == after
    assert before["url"] == ["c:3", "d:4"]
    assert (before["timeout"], before["keepalive"], before["wait_if_full"]) == (None, 5.0, False)
    assert (before["api_key"], before["headers"]) == ("secret", {"x-team": "search"})
    assert (before["retries"], before["retry_silence"]) == (2, 1.5)
    assert (str(before["tls"].ca), before["tls"].server_name, before["max_message_bytes"]) == ("ca.pem", "triton", 100)
    assert connection.arguments(parsed("health"))["api_key"] == "of the environment"
    with pytest.raises(InputError, match="--api-key or --api-key-file, not both"):
        connection.arguments(parsed("health", "--api-key", "x", "--api-key-file", str(tmp_path / "key")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--timeout", "0", "health"],
        ["health", "--timeout", "nan"],
        ["health", "--header", "none"],
        ["rank", "--query", "x", "--top-k", "0"],
        ["generate", "--temprature", "1"],
        ["generate", "--json", "--jsonl", "x"],
        ["nothing"],
        [],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: trident" in capsys.readouterr().err


# Texts and results


def test_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Any) -> None:
    def stdin(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    stdin(b"one\r\n\ntwo\xe2\x80\xa8still two\n")
    assert texts.each(parsed("embed", "first", "-", "last")) == ["first", "one", "two\u2028still two", "last"]
    stdin(b"middle")
    assert texts.whole(parsed("generate", "a", "-", "b")) == "a middle b"
    stdin(b"all of it\n")
    assert texts.whole(parsed("generate", "--file", "-")) == "all of it\n"
    (tmp_path / "lines").write_text("x\ny\n")
    assert texts.each(parsed("embed", "--file", str(tmp_path / "lines"))) == ["x", "y"]
    (tmp_path / "latin").write_bytes(b"good\ncaf\xe9\n")
    latin = str(tmp_path / "latin")
    assert said("embed", "--file", latin)[::2] == (
        2,
        f"trident: {latin} is not UTF-8: byte 0xe9 at position 8, line 2\n",
    )
    assert said("embed", "--file", str(tmp_path))[::2] == (2, f"trident: {tmp_path}: Is a directory\n")
    for flags in ((), ("--stream",)):
        assert said("transcribe", "", *flags)[::2] == (2, "trident: the path of a file is empty: name one\n")
    stdin(b"\n\n")
    assert said("embed")[::2] == (2, "trident: there is no text\n")
    assert said("embed", "-", "-")[::2] == (2, "trident: standard input (-) can be read only once\n")


def test_options_by_name(tmp_path: Path) -> None:
    (tmp_path / "schema").write_text('{"type": "object"}')
    arguments = ["--option", f"guided_json=@{tmp_path / 'schema'}", "--option", "guided-regex=[0-9]+"]
    arguments += ["--option", "top_logprobs=3", "--option", 'guided_choice=["a", "b"]', "--stop", "x"]
    found = generation.chosen(parsed("generate", *arguments, "text"), GENERATION)
    assert {name: value for name, value in found.items() if value is not None} == {
        "guided_json": {"type": "object"},
        "guided_regex": "[0-9]+",
        "top_logprobs": 3,
        "guided_choice": ["a", "b"],
        "stop_words": ["x"],
    }
    for option, message in {
        "nothing=1": "unknown option 'nothing'; known are max_tokens",
        "temperature=warm": "temperature=warm is no number",
        "max_tokens=1.5": "max_tokens=1.5 is no whole number",
        "ignore_eos=1": "ignore_eos=1 is no true or false",
        "max_tokens": "'max_tokens' has no value: give NAME=VALUE",
    }.items():
        with pytest.raises(InputError, match=message):
            generation.chosen(parsed("generate", "--option", option, "text"), GENERATION)
    with pytest.raises(InputError, match="max_tokens is given twice"):
        generation.chosen(parsed("generate", "--max-tokens", "1", "--option", "max_tokens=2", "x"), GENERATION)


def test_control_characters_are_for_pipes_only() -> None:
    assert output.safe("a\x1b[2Jb\tc\nd\x07\x9b") == "a\ufffd[2Jb\tc\nd\ufffd\ufffd"


def test_json_lines(served: Served, said: Any) -> None:  # noqa: F811
    status, out, _ = said("embed", "--url", served[0], "--jsonl", "a", "bb")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": "a", "embedding": [1.0, 1.0]},
        {"text": "bb", "embedding": [2.0, 1.0]},
    ]
    status, out, _ = said("generate", "--url", served[0], "--jsonl", "one two")
    assert status == 0
    assert [(chunk["text"], chunk["index"]) for chunk in map(json.loads, out.splitlines())] == [
        ("one ", 0),
        ("two ", 0),
    ]
    told = json.loads(said("similarity", "--url", served[0], "--to", "abc", "--json", "abc", "x")[1])
    assert told == [
        {"text": "abc", "similarity": pytest.approx(1.0)},
        {"text": "x", "similarity": pytest.approx((3 + 1) / 10**0.5 / 2**0.5)},
    ]


def test_calls_of_tools_are_printed(served: Served, said: Any) -> None:  # noqa: F811
    arguments = ["chat", "--url", served[0], "--option", 'tools=[{"name": "weather"}]', "how is it?"]
    assert said(*arguments)[1] == 'weather {"city": "Zürich"}\nnow {}\n'
    told = json.loads(said(*arguments[:-1], "--json", "x")[1])
    assert [(call["name"], call["arguments"]) for call in told["tool_calls"]] == [
        ("weather", '{"city": "Zürich"}'),
        ("now", "{}"),
    ]


def test_messages_of_a_file(served: Served, said: Any, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert said("chat", "--url", served[0], "--messages", str(file), "--system", "s", "c")[0] == 0
    sent = json.loads(served[1].requests[-1]["messages"].item())
    assert [(message["role"], message["content"]) for message in sent] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    for content, message in {
        "[": "is no JSON",
        "[]": "holds no list of messages",
        "[3]": "message 0 is no object",
    }.items():
        file.write_text(content)
        status, _, err = said("chat", "--url", served[0], "--messages", str(file), "c")
        assert (status, message in err) == (2, True)


# Batches


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 7 is no JSON: Expecting property name"),
        (b"caf\xe9", "line 7 is not UTF-8: byte 0xe9"),
        (b"[" * 100_000, "line 7 is no JSON"),
        (b'{"text": NaN}', "line 7 is no JSON: NaN is no number"),
        (b"3", "line 7 is neither an object nor a text"),
        (b'{"verb": "sing"}', 'line 7 has the unknown verb "sing"; known are generate'),
        (b'{"text": "a", "texts": "b"}', "line 7 has both text and texts, which are the same"),
        (b'{"id": 1, "txt": "a"}', "line 7: embed has no 'txt'; it has texts, prompt_name"),
        (b'{"id": 1.5, "text": "a"}', "line 7: an id is a text or a whole number, found 1.5"),
        (b'{"verb": "rank", "query": "a"}', "line 7 has no passages"),
        (b'{"verb": "chat"}', r"line 7 has no messages \(or text\)"),
    ],
)
def test_lines_that_can_t_be_asked(line: bytes, message: str) -> None:
    asked = verbs.read(7, line, "embed", {})
    with pytest.raises(InputError, match=message):
        asked.answer(None)  # type: ignore[arg-type]


def test_lines_that_can_be_asked() -> None:
    plain = verbs.read(1, b'"a text"', "embed", {"dimensions": 3, "top_k": 2})
    assert (plain.verb, plain.arguments, plain.key) == ("embed", {"dimensions": 3, "texts": "a text"}, 1)
    named = verbs.read(
        2, '{"id": "ü", "text": "x", "dimensions": 4, "model": "m"}'.encode(), "embed", {"dimensions": 3}
    )
    assert (named.id, named.arguments, named.own_model) == ("ü", {"texts": "x", "dimensions": 4, "model": "m"}, True)
    assert verbs.read(3, b'{"not": json', "embed", {}, texts=True).arguments == {"texts": '{"not": json'}
    assert plain.digest != named.digest != verbs.read(1, b'"a text"', "classify", {}).digest
    assert verbs.read(9, b'{"text": "a text"}', "embed", {"dimensions": 3}).digest == plain.digest


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_half_written_last_line(tmp_path: Path) -> None:
    file = tmp_path / "out"
    results = Output(file)
    for number in range(3):
        results.write(Asked(number, f'i"d{number}, "result": '), result={"text": "é" * 10})
    results.close()
    whole = file.read_bytes()
    end = whole.rindex(b"\n", 0, -1) + 1
    for cut in (len(whole) - 3, end + 4, end + 1):
        file.write_bytes(whole[:cut])
        results = Output(file)
        assert (results.repaired, len(results.done)) == (True, 2)
        results.close()
        assert file.read_bytes() == whole[:end]
    file.write_bytes(whole[:-1])  # all of the line but its end
    results = Output(file)
    assert (results.repaired, len(results.done)) == (False, 3)
    results.close()
    assert file.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "out"
    for content in (b"precious\ntext\n", b'{"line": 1}\n', b'{"line": true, "request": "x", "result": 1}\n{"'):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"line 1 is no result of a batch"):
            Output(file)
        assert file.read_bytes() == content
    Output(file, overwrite=True).close()
    assert file.read_bytes() == b""


def test_two_batches_never_write_to_one_file(tmp_path: Path) -> None:
    results = Output(tmp_path / "out")
    with pytest.raises(InputError, match="another batch is writing to it"):
        Output(tmp_path / "out")
    results.close()
    Output(tmp_path / "out").close()


def batch_of(
    tmp_path: Path, said: Any, url: str, lines: list[Any], *flags: str
) -> tuple[int, list[dict[str, Any]], str]:
    source, found = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    status, _, err = said("batch", str(source), str(found), "--url", url, "--verb", "embed", *flags)
    return status, sorted(lines_of(found), key=lambda line: line["line"]), err


def test_a_batch(served: Served, said: Any, tmp_path: Path) -> None:  # noqa: F811
    url, service = served
    lines = [
        "{broken\n",
        {"id": "a", "text": "xx"},
        "\n",
        '"yyy"\n',
        {"id": "b", "text": "broken"},
        {"id": "a", "text": "z"},
    ]
    status, found, err = batch_of(tmp_path, said, url, lines)
    assert status == Exit.SOME_FAILED
    assert [line["line"] for line in found] == [1, 2, 4, 5, 6]
    assert found[0]["error"]["message"].startswith("line 1 is no JSON: ")
    assert (found[1]["id"], found[1]["result"], found[2]["result"]) == ("a", [2.0, 1.0], [3.0, 1.0])
    assert found[3]["error"] == {"type": "ServerError", "message": "broken"}
    assert found[4]["error"]["message"] == 'line 6 has the id of line 2: "a"'
    assert err.splitlines()[-1].startswith("trident: 2 lines answered, 3 failed in ")
    # Again: nothing is asked.
    service.requests.clear()
    status, again, err = batch_of(tmp_path, said, url, lines)
    assert (status, again, service.requests) == (Exit.SOME_FAILED, found, [])
    assert "0 lines answered, 0 failed" in err
    assert "5 were there before, 3 of them failed" in err
    # The failed ones again, mended.
    lines[0], lines[4], lines[5] = {"text": "1"}, {"id": "b", "text": "mended"}, {"id": "c", "text": "z"}
    _, _, err = batch_of(tmp_path, said, url, lines)
    assert "OUTPUT has the error of another request for line 1: --retry-failed asks it again" in err
    status, mended, err = batch_of(tmp_path, said, url, lines, "--retry-failed", "--json")
    assert status == Exit.DONE
    assert [line["result"][0] for line in mended] == [1.0, 2.0, 3.0, 6.0, 1.0]
    assert len(service.requests) == 3
    # Another input, or another option, for the same output.
    lines[1]["text"] = "changed"
    status, kept, err = batch_of(tmp_path, said, url, lines)
    assert (status, kept) == (Exit.BAD_INPUT, mended)
    assert "OUTPUT has the result of another request for line 2: give another OUTPUT, or --overwrite" in err
    status, kept, _ = batch_of(tmp_path, said, url, lines, "--overwrite", "--quiet")
    assert (status, kept[1]["result"]) == (Exit.DONE, [7.0, 1.0])


def test_a_batch_whose_server_has_no_room(served: Served, said: Any, tmp_path: Path) -> None:  # noqa: F811
    """A line that found none is asked again until the patience is over; it has no result then, and no error."""
    lines = [{"text": "ok"}, {"text": "full"}]
    flags = ("--concurrency", "1", "--patience", "0.3", "--quiet", "--timeout", "0.5")
    status, found, err = batch_of(tmp_path, said, served[0], lines, *flags)
    assert (status, [line["line"] for line in found]) == (Exit.UNAVAILABLE, [1])
    assert err == "trident: full\n"
    assert sum(request["text_input"].item() == b"full" for request in served[1].requests) > 1


def test_batches_that_don_t_begin(served: Served, said: Any, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "in"
    source.write_text('"a"\n')
    common = ("--verb", "embed", "--url", served[0])
    assert said("batch", str(source), str(source), *common)[::2] == (2, "trident: INPUT and OUTPUT are the same file\n")
    nothing = str(tmp_path / "nothing")
    assert said("batch", nothing, str(tmp_path / "out"), *common)[::2] == (
        2,
        f"trident: {nothing}: No such file or directory\n",
    )
    assert not (tmp_path / "out").exists()
    assert said("batch", str(source), "-", *common, "--json")[0] == 2
    assert said("batch", str(source), str(tmp_path / "out"), "--url", "127.0.0.1:1")[0] == 3
    status, _, err = said("batch", str(source), str(tmp_path / "out"), "--verb", "summarize", "--url", served[0])
    assert (status, "serves no model for summarization" in err) == (1, True)
    assert (tmp_path / "out").read_bytes() == b""  # every line would have failed
    status, _, err = said("batch", str(source), str(tmp_path / "out"), *common, "--option", "nothing=1")
    assert (status, "give NAME=VALUE, with one of the names" in err) == (2, True)


def test_a_batch_from_standard_input_to_standard_output(served: Served) -> None:  # noqa: F811
    command = [sys.executable, "-m", "trident_client.cli", "batch", "-", "-", "--verb", "embed", "--lines"]
    done = subprocess.run([*command, "--url", served[0]], input=b"a\nbb\n", capture_output=True, check=False)
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda line: line["line"])
    assert (done.returncode, [line["result"] for line in found]) == (0, [[1.0, 1.0], [2.0, 1.0]])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_waits_for_standard_input_is_interrupted(served: Served, number: int) -> None:  # noqa: F811
    command = [sys.executable, "-m", "trident_client.cli", "batch", "-", "-", "--verb", "embed", "--lines"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--url", served[0]], **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"a\nb")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["result"] == [1.0, 1.0]
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(20) == 130
    assert time.monotonic() - began < 5
    out, err = process.communicate()
    assert out == b""
    assert re.fullmatch(rb"trident: 1 lines answered, 0 failed in [0-9.]+ s; the same command goes on\n", err)


def test_an_interrupt_while_the_client_is_imported() -> None:
    """Ctrl-C in the first half second, as the installed program meets it: no traceback."""
    slow = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print("begun", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
import trident_command
sys.argv[1:] = ["models"]
raise SystemExit(trident_command.main())
"""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", slow], **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_the_program_is_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trident", "completion", "no shell"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        trident_command.main()
    assert (ended.value.code, signal.getsignal(signal.SIGINT)) == (2, before)
    assert "invalid choice: 'no shell'" in capsys.readouterr().err


def test_lines_of_an_input_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"a\n\n  \nb\r\nc")
    assert batch_output.count(tmp_path / "in") == 3
    assert list(batch_output.lines(tmp_path / "in")) == [(1, b"a"), (4, b"b"), (5, b"c")]


# The conversation


def test_a_conversation_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "prompt_toolkit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a conversation needs prompt_toolkit.*trident-serving\[cli\]"):
        conversation.run(Client("127.0.0.1:1"), parsed("chat"))


def test_commands_of_a_conversation(tmp_path: Path, served: Served) -> None:  # noqa: F811
    with Client(served[0]) as client:
        talk = turns.Turns(client)
        assert turns.run(talk, "/system be kind") == "system: be kind"
        talk.ask("one")
        talk.answered("1")
        talk.ask("two")
        talk.answered("")  # cancelled before anything came
        assert [message["content"] for message in talk.prompt()] == ["be kind", "one", "1"]
        assert turns.run(talk, "/set temperature 0.7") == "temperature = 0.7"
        assert turns.run(talk, "/set stop_words END") == 'stop_words = ["END"]\ntemperature = 0.7'
        assert turns.run(talk, "/set stop_words") == "temperature = 0.7"
        file = tmp_path / "talk.json"
        turns.run(talk, f"/save {file}")
        turns.run(talk, f"/save {file}")  # its own file
        other = turns.Turns(client)
        with pytest.raises(InputError, match="exists: take another name"):
            turns.run(other, f"/save '{file}'")
        assert turns.run(other, f"/load {file}") == f"loaded 2 messages from {file}"
        assert (other.prompt(), other.options) == (talk.prompt(), {"temperature": 0.7})
        assert turns.run(other, "/retry") == ""
        assert (other.asked, other.messages) == ("one", [])
        assert turns.run(talk, "/undo") == "took back: one"
        with pytest.raises(InputError, match="there is nothing to undo"):
            turns.run(talk, "/undo")
        assert turns.run(talk, "/model") == "* smollm2"
        assert turns.run(talk, "/model smollm2") == "model: smollm2"
        for line, message in {
            "/model minilm": "minilm does not generate: its task is feature-extraction",
            "/nothing": "there is no /nothing; /help lists the commands",
            "/set warmth 1": "unknown option 'warmth'",
            "/set temperature hot": "temperature=hot is no number",
            "/load": "give the name of one file",
            "/save 'x": "can't be read: No closing quotation",
        }.items():
            with pytest.raises(InputError, match=message):
                turns.run(talk, line)
        assert all(f"/{name}" in turns.run(talk, "/help") for name in turns.COMMANDS)
        with pytest.raises(turns.Ended):
            turns.run(talk, "/exit")


# Metrics


PAGE = """
# TYPE nv_inference_request_success counter
nv_inference_request_success{{model="emb",version="1"}} {requests}
# TYPE nv_inference_count counter
nv_inference_count{{model="emb",version="1"}} {texts}
nv_inference_count{{model="emb_model",version="1"}} {texts}
nv_inference_exec_count{{model="emb",version="1"}} {requests}
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{{model="emb",version="1"}} {micros}
# TYPE trident_request_duration_seconds histogram
trident_request_duration_seconds_bucket{{model="gen",version="1",le="1"}} {fast}
trident_request_duration_seconds_bucket{{model="gen",version="1",le="5"}} {all}
trident_request_duration_seconds_bucket{{model="gen",version="1",le="+Inf"}} {all}
trident_request_duration_seconds_count{{model="gen",version="1"}} {all}
trident_request_duration_seconds_sum{{model="gen",version="1"}} 1
# TYPE trident_generated_tokens_total counter
trident_generated_tokens_total{{model="gen",version="1"}} {tokens}
# TYPE trident_requests_running gauge
trident_requests_running{{model="gen",version="1"}} 3
# TYPE trident_prompt_tokens_total counter
trident_prompt_tokens_total{{model="gen",version="1"}} 200
# TYPE trident_prefix_hit_tokens_total counter
trident_prefix_hit_tokens_total{{model="gen",version="1"}} 50
# TYPE trident_requests_failed_total counter
trident_requests_failed_total{{model="gen",version="1"}} 4
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


def sample(at: float, **values: int) -> Sample:
    return metrics.read(PAGE.format(**values), at)


def test_what_happened_between_two_samples() -> None:
    old = sample(10.0, requests=5, texts=10, micros=1000, fast=1, all=2, tokens=100)
    new = sample(12.0, requests=9, texts=50, micros=9000, fast=2, all=12, tokens=400)
    found = metrics.compare(new, old, {"gen": 8}, latencies=Sample(0.0))
    (generator,), (reader,) = found.generators, found.readers
    assert (generator.model, generator.requests_running, generator.slots, generator.failed) == ("gen", 3, 8, 4)
    assert (generator.tokens_per_second, generator.requests_per_second) == (150.0, 5.0)
    assert generator.prefix_reused == 0.25
    assert generator.first_token.p50 is None
    # Of 12 requests 2 took up to 1 s and 10 between 1 and 5 s: the sixth is at 4 tenths of the latter.
    assert generator.request.p50 == pytest.approx(1 + 4 * 0.4)
    assert (reader.model, reader.texts_per_second, reader.requests_per_second) == ("emb", 20.0, 2.0)
    assert reader.mean_request == pytest.approx(1e-3)
    assert found.cpu == 0.5
    assert [row.model for row in metrics.compare(new, old, {}, stages=True).readers] == ["emb", "emb_model"]
    # Since the older sample: one of 10 was fast.
    recent = metrics.compare(new, old, {}).generators[0]
    assert recent.request.p50 == pytest.approx(1 + 4 * 4 / 9)
    # A server that was started again counts from 0.
    restarted = metrics.compare(sample(14.0, requests=1, texts=2, micros=1, fast=1, all=1, tokens=30), new, {})
    assert restarted.generators[0].tokens_per_second == 15.0


@pytest.mark.parametrize("page", ["", "<html></html>", '{"a": 1}'])
def test_a_page_that_is_none_of_metrics(page: str) -> None:
    with pytest.raises(InputError, match="that is no page of metrics"):
        metrics.read(page, 0.0)


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ([], "http://localhost:8002/metrics"),
        (["--url", "gpu-1:9001"], "http://gpu-1:8002/metrics"),
        (["--url", "https://gpu-1/v"], "http://gpu-1:8002/metrics"),
        (["--url", "dns:///gpu-1:9001"], "http://gpu-1:8002/metrics"),
        (["--url", "grpcs://[::1]:9001"], "http://[::1]:8002/metrics"),
        (["--metrics-url", "other:1"], "http://other:1/metrics"),
        (["--metrics-url", "https://other/page"], "https://other/page"),
    ],
)
def test_where_the_metrics_are(flags: list[str], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIDENT_URL", "TRIDENT_METRICS_URL"):
        monkeypatch.delenv(name, raising=False)
    assert top.metrics_url(parsed("top", *flags)) == url


def test_no_metrics(said: Any) -> None:
    assert said("top", "--once", "--metrics-url", "127.0.0.1:1") == (
        3,
        "",
        "trident: there are no metrics at http://127.0.0.1:1/metrics: Connection refused\n",
    )


def test_answers_are_compared() -> None:
    assert bench.same({"a": [1.0, 2.0]}, {"a": [1.0004, 2.0]})
    assert not bench.same({"a": [1.0, 2.0]}, {"a": [1.01, 2.0]})
    assert not bench.same([1.0], [1.0, 1.0])
    assert not bench.same("a", "b")


# Completion


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_scripts(shell: str) -> None:
    script = completion.script(shell)
    assert all(name in script for name in commands())
    assert "metrics-url" in script


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion.script("bash"))
    asks = f"""
    source {tmp_path / "script"}
    complete_of() {{
      COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
      _shtab_trident; echo "${{COMPREPLY[@]}}"
    }}
    complete_of trident cla
    complete_of trident completion z
    complete_of trident classify --top
    """
    done = subprocess.run(["bash", "--norc", "-c", asks], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["classify", "classify-images", "zsh", "--top-k"], done.stderr
