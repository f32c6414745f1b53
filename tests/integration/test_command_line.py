"""`trident` against the real server: its commands, a batch that is interrupted, and a conversation on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trident_client import Client, cli
from trident_serving.launcher.local import LocalServer

COMMAND = [sys.executable, "-m", "trident_client.cli"]
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def metric(server: LocalServer, name: str, model: str = "talk") -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return float(re.findall(rf'^{name}{{model="{model}",version="1"}} (\S+)$', text, re.MULTILINE)[0])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def told(gateway_server: LocalServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The JSON, or the objects of JSON Lines, that a command prints."""

    def run(name: str, *arguments: str, flag: str = "--json") -> Any:
        assert cli.main([name, "--url", gateway_server.grpc_url, flag, *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[0]) if flag == "--json" else [json.loads(line) for line in lines]

    return run


def test_commands(told: Callable[..., Any], direct: Client) -> None:
    assert {row["name"]: row["task"] for row in told("served")}.items() >= {
        "talk": "text-generation",
        "embed": "feature-extraction",
        "rank": "text-ranking",
    }.items()
    info = told("info", "talk")
    assert (info["task"], info["adapters"], info["parameters"]["slots"]) == ("text-generation", ["other"], "4")
    assert told("adapters", "talk") == ["other"]
    passages = ["a cat", "the mat", "a dog"]
    ranked = direct.rank("a cat", passages, model="rank")
    assert [row["text"] for row in told("rank", "--query", "a cat", "--top-k", "2", *passages, flag="--jsonl")] == [
        passages[each.index] for each in ranked[:2]
    ]
    scores = {row["text"]: row["score"] for row in told("score", "--query", "a cat", *passages)}
    assert list(scores) == passages
    assert scores == {passages[each.index]: pytest.approx(each.score, abs=1e-5) for each in ranked}
    vectors = direct.embed(passages, model="embed")
    similar = [row["similarity"] for row in told("similarity", "--to", passages[0], *passages)]
    assert similar == pytest.approx([float(vectors[0] @ vector) for vector in vectors], abs=1e-5)
    assert told("tokenize", "--model", "embed", "a cat")[0]["tokens"] == direct.tokenize(["a cat"], model="embed")[0]
    expected = direct.generate("a cat", model="talk", max_tokens=0, return_prompt_token_ids=True).prompt_token_ids
    assert told("tokenize", "--model", "talk", "a cat")[0]["tokens"] == list(expected)
    (row,) = told("classify", "--top-k", "2", "a cat", flag="--jsonl")
    assert [label["label"] for label in row["labels"]] == [each.label for each in direct.classify("a cat", top_k=2)]
    asked: dict[str, Any] = {"model": "talk", "max_tokens": 6, "temperature": 1.0, "random_seed": 3}
    flags = ["--model", "talk", "--max-tokens", "6", "--temperature", "1", "--random-seed", "3", "--n", "2", "a cat"]
    answers = direct.generate_many("a cat", 2, **asked)
    assert [answer["text"] for answer in told("generate", *flags)] == [answer.text for answer in answers]
    chunks = told("generate", *flags, flag="--jsonl")
    assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == 1) == answers[1].text
    asked = {"model": "talk", "max_tokens": 3, "return_log_probs": True, "lora_name": "other"}
    told_probs = told(
        "generate",
        "--model",
        "talk",
        "--max-tokens",
        "3",
        "--lora-name",
        "other",
        "--option",
        "return_log_probs=true",
        "a cat",
    )["log_probs"]
    assert told_probs == pytest.approx(list(direct.generate("a cat", **asked).log_probs), abs=1e-5)
    texts = told("translate", "--lines", "--target-lang", "German", "--max-tokens", "4", "a cat", "a dog")
    assert [each["text"] for each in texts] == [
        each.text for each in direct.translate(["a cat", "a dog"], target_lang="German", max_tokens=4)
    ]


def test_the_model_is_named_where_there_are_several(
    gateway_server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--url", gateway_server.grpc_url, "x"]) == 1
    assert "serves chain and talk for text-generation" in capsys.readouterr().err


def test_top_and_bench(told: Callable[..., Any], gateway_server: LocalServer, direct: Client) -> None:
    before = told("top", "--metrics-url", gateway_server.metrics_url, "--interval", "0.2")
    rows = {row["model"]: row for row in (*before["generators"], *before["readers"])}
    assert rows["talk"]["slots"] == 4
    assert {"embed", "rank", "classify"} <= set(rows)
    assert not [name for name in rows if "_" in name]
    report = told("bench", "--model", "talk", "--seconds", "1.5", "--streams", "2", "--max-tokens", "8")
    assert [each["name"] for each in report["rounds"]] == ["1 stream", "2 streams", "the first again"]
    assert report["compared"] >= 1
    assert report["equal"] == report["compared"]
    assert report["rounds"][0]["tokens_per_second"] > 0
    assert 0 < report["rounds"][0]["first_token_p50"] <= report["rounds"][0]["request_p50"]
    report = told("bench", "--model", "embed", "--seconds", "0.9", "--streams", "2", "--prompt-words", "10")
    assert report["equal"] == report["compared"] > 0
    assert report["rounds"][0]["texts_per_second"] > 0


def test_a_batch_that_is_interrupted(gateway_server: LocalServer, direct: Client, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"number {number}" for number in range(24)]
    asked: dict[str, Any] = {"min_tokens": 400, "max_tokens": 400}
    lines: list[dict[str, Any]] = [{"id": text, "prompt": text, **asked} for text in prompts]
    lines.insert(5, {"id": "wrong", "prompt": "x", "top_p": 7})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*COMMAND, "batch", str(source), str(target), "--verb", "generate", "--model", "talk"]
    command += ["--url", gateway_server.grpc_url, "--concurrency", "20"]  # more than slots and queue hold: 4 and 8

    def found() -> list[str]:
        return target.read_text().splitlines() if target.exists() else []

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: len(found()) >= 6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith("; the same command goes on; --retry-failed asks the failed ones again")
    until(lambda: metric(gateway_server, "trident_requests_running") == 0)
    first = found()
    assert 6 <= len(first) < len(lines)
    with target.open("a") as file:
        file.write('{"line": 3, "id": "nu')
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 4
    assert "its last line was half-written" in done.stderr
    assert found()[: len(first)] == first
    results = {line["id"]: line for line in map(json.loads, found())}
    assert len(results) == len(found()) == len(lines)
    assert results["wrong"]["error"]["type"] == "InvalidRequestError"
    assert "top_p" in results["wrong"]["error"]["message"]
    for text in prompts[::6]:
        assert results[text]["result"]["text"] == direct.generate(text, model="talk", **asked).text
    assert {results[text]["line"] for text in prompts} == {*range(1, 6), *range(7, 26)}


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *arguments], {**os.environ, "TERM": "xterm", **environment})
        self.shown = b""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def until(self, pattern: str, seconds: float = 30) -> str:
        """What is shown from the last match to the end of this one, without escapes."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern.encode(), self.shown[self._seen :], re.DOTALL)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown[self._seen :]!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the command has ended
                    self.shown += os.read(self.file, 65536)
        begin, self._seen = self._seen, self._seen + found.end()
        return ESCAPES.sub(b"", self.shown[begin : self._seen]).decode(errors="replace")

    def ended(self, seconds: float = 60) -> int:
        """The exit status."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                if select.select([self.file], [], [], 0.1)[0]:
                    self.shown += os.read(self.file, 65536)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)


@pytest.fixture
def terminal(gateway_server: LocalServer, tmp_path: Path) -> Iterator[Terminal]:
    arguments = ["chat", "--url", gateway_server.grpc_url, "--model", "talk", "--max-tokens", "8"]
    opened = Terminal(*arguments, XDG_STATE_HOME=str(tmp_path), PROMPT_TOOLKIT_NO_CPR="1")
    yield opened
    opened.close()


def test_a_conversation(gateway_server: LocalServer, terminal: Terminal, direct: Client, tmp_path: Path) -> None:
    prompt, stats = r">>>", r": \d+ tokens"
    terminal.until("Ctrl-D ends")
    terminal.until(prompt)
    terminal.type("a cat\\\rand a dog\r")
    terminal.until(stats)
    terminal.until(prompt)
    # An answer that would take long: Ctrl-C ends it, here and on the server.
    for command in ("max_tokens 1900", "min_tokens 1900", "prompt_lookup false"):
        terminal.type(f"/set {command}\r")
        terminal.until(command.replace(" ", " = "))
    cancelled = metric(gateway_server, "trident_requests_cancelled_total")
    interrupted = False
    for _ in range(8):  # a busy machine may press the keys too late
        terminal.type("go on\r")
        terminal.until(r"go on.*2004l.")  # the line is sent, and something of the answer is there
        terminal.type("\x03")
        interrupted = "interrupted: " in terminal.until(r"(interrupted|length)" + stats)
        terminal.until(prompt)
        if interrupted:
            break
        terminal.type("/undo\r")
        terminal.until("took back: go on")
        terminal.until(prompt)
    if interrupted:
        until(lambda: metric(gateway_server, "trident_requests_cancelled_total") > cancelled)
        until(lambda: metric(gateway_server, "trident_requests_running") == 0)
        terminal.type("/undo\r")
        terminal.until("took back: go on")
    # The conversation goes on.
    for command in ("min_tokens", "max_tokens 8"):
        terminal.type(f"/set {command}\r")
        terminal.until("max_tokens = ")
    terminal.type("/nothing\r")
    terminal.until("trident: there is no /nothing; /help lists the commands")
    terminal.until(prompt)
    terminal.type("forget this\x03")
    terminal.until(prompt)
    terminal.type("\x1b[Athen\r")  # the arrow recalls the last line, which "then" is added to
    terminal.until("there is no /nothingthen")
    terminal.until(prompt)
    file = tmp_path / "talk.json"
    terminal.type(f"/save {file}\r")
    terminal.until(r"saved 2 messages")
    terminal.until(prompt)
    terminal.type("\x04")
    assert terminal.ended() == 0
    saved = json.loads(file.read_text())
    assert (saved["model"], saved["options"]) == ("talk", {"max_tokens": 8, "prompt_lookup": False})
    first, answer = saved["messages"][:2]
    assert first == {"role": "user", "content": "a cat\nand a dog"}
    expected = direct.chat([first], model="talk", max_tokens=8).text
    assert answer == {"role": "assistant", "content": expected}
    history = tmp_path / "trident" / "history"
    assert "+a cat\n+and a dog" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    if not interrupted:
        pytest.skip("this machine is too busy to press Ctrl-C before an answer ends; all else was right")
