"""The parts of the gateway that need no server: queues, keys, the choice of a server, items, errors."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from trident_client import (
    GenerationChunk,
    InvalidRequestError,
    Label,
    NotFoundError,
    OverloadedError,
    TridentError,
    UnavailableError,
)
from trident_gateway import app, classify, cli, keys
from trident_gateway.admission import Admission
from trident_gateway.catalog import Model, catalog
from trident_gateway.errors import ApiError, from_trident
from trident_gateway.exchange import Exchange
from trident_gateway.gateway import Gateway
from trident_gateway.logs import AccessLog
from trident_gateway.metrics import Metrics
from trident_gateway.openai.chat import conversation
from trident_gateway.openai.completions import LogProbs, written
from trident_gateway.openai.items import messages_of
from trident_gateway.routing import Server, Servers, beginning_of, resolved
from trident_gateway.settings import Settings


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def hold(admission: Admission, order: list[str], name: str, done: asyncio.Event, **more: Any) -> None:
    async with admission.slot("m", 2, **more):
        order.append(name)
        await done.wait()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served() -> None:
    async def work() -> None:
        admission, order = Admission(10, 60), list[str]()
        ends = {name: asyncio.Event() for name in "abcd"}
        tasks = [asyncio.create_task(hold(admission, order, name, ends[name])) for name in "abcd"]
        await settled()
        assert order == ["a", "b"]
        assert admission.depths() == {"m": (2, 2)}
        ends["b"].set()
        await settled()
        assert order == ["a", "b", "c"]
        for end in ends.values():
            end.set()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c", "d"]
        assert admission.depths() == {"m": (0, 0)}

    run(work())


def test_who_hangs_up_leaves_the_queue_and_no_slot_is_lost() -> None:
    async def work() -> None:
        admission, order, end = Admission(10, 60), list[str](), asyncio.Event()
        first = [asyncio.create_task(hold(admission, order, name, end)) for name in "ab"]
        await settled()
        large = asyncio.create_task(hold(admission, order, "large", end, answers=2))
        small = asyncio.create_task(hold(admission, order, "small", end))
        await settled()
        large.cancel()
        first[0].cancel()
        await settled()
        assert order == ["a", "b", "small"]
        end.set()
        await asyncio.gather(*first, large, small, return_exceptions=True)
        assert admission.depths() == {"m": (0, 0)}

    run(work())


def test_a_turn_that_comes_with_the_hangup_goes_to_the_next() -> None:
    async def work() -> None:
        admission, order = Admission(10, 60), list[str]()
        ends = {name: asyncio.Event() for name in "abcd"}
        tasks = {name: asyncio.create_task(hold(admission, order, name, ends[name])) for name in "abcd"}
        await settled()
        ends["a"].set()
        await asyncio.sleep(0)  # a's slot is c's now, which does not know it yet
        tasks["c"].cancel()
        await settled()
        assert order == ["a", "b", "d"]
        for end in ends.values():
            end.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert admission.depths() == {"m": (0, 0)}

    run(work())


def test_full_queues_and_keys_are_refused() -> None:
    async def work() -> None:
        admission, order, end = Admission(1, 0.05), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(hold(admission, order, name, end)) for name in "abc"]
        await settled()
        with pytest.raises(ApiError, match="1 requests wait already") as full:
            async with admission.slot("m", 2):
                pass
        assert (full.value.status, full.value.headers["retry-after"]) == (429, "1")
        await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match="no room within 0.05 s"):
            await tasks[2]
        async with admission.slot("other", 1, key="k", per_key=1):
            with pytest.raises(ApiError, match="this key has 1 requests"):
                async with admission.slot("other", 5, key="k", per_key=1):
                    pass
            async with admission.slot("other", 5, key="l", per_key=1):
                pass
        async with admission.slot("other", 1, key="k", per_key=1):
            end.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work())


def test_a_request_of_several_turns_is_one_of_its_key() -> None:
    async def work() -> None:
        admission, order, end, request = Admission(10, 60), list[str](), asyncio.Event(), object()
        its: dict[str, Any] = {"key": "k", "per_key": 1}
        tasks = [asyncio.create_task(hold(admission, order, name, end, request=request, **its)) for name in "abc"]
        await settled()
        assert admission.depths() == {"m": (2, 1)}
        tasks[0].cancel()
        await settled()
        assert order == ["a", "b", "c"]
        with pytest.raises(ApiError, match="this key has 1 requests"):
            async with admission.slot("m", 5, **its):
                pass
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with admission.slot("m", 5, **its):
            pass

    run(work())


def test_a_request_of_more_answers_than_slots_goes_in_alone() -> None:
    async def work() -> None:
        async with Admission(1, 1).slot("m", 2, answers=5):
            pass

    run(work())


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert cli.main(["key", "add", "web", "--keys", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    assert cli.main(["key", "add", "ops", "--scope", "admin", "--keys", str(file)]) == 0
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    assert cli.main(["key", "add", "web", "--keys", str(file)]) == 1
    assert "there is a key 'web' already" in capsys.readouterr().err
    ring = keys.KeyRing(file)
    found = ring.find(key)
    assert found is not None
    assert (found.name, found.scopes) == ("web", ("inference",))
    assert ring.find(key + "x") is None
    assert ring.find("") is None
    assert cli.main(["key", "remove", "web", "--keys", str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o640
    ring._next_look = 0.0
    assert ring.find(key) is None
    assert cli.main(["key", "list", "--keys", str(file)]) == 0
    assert capsys.readouterr().out.startswith("ops\tadmin\t")
    file.write_text("[]")
    assert cli.main(["key", "list", "--keys", str(file)]) == 1
    assert "is no file of keys" in capsys.readouterr().err


def test_a_file_of_keys_that_changes_while_it_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.json"
    key, other = keys.add(file, "web", ["inference"]), keys.add(file, "other", ["inference"])
    ring, right = keys.KeyRing(file), file.read_text()

    def found(given: str = key) -> keys.Key | None:
        ring._next_look = 0.0
        return ring.find(given)

    def changed(**fields: Any) -> str:
        entries = json.loads(right)["keys"]
        entries[0] |= fields
        return json.dumps({"keys": entries})

    bad = {
        "max_concurrent": ["4", -3, 1.5, True, None],
        "name": [5, "a\nb"],
        "scopes": ["inference", None],
        "extra": [1],
    }
    damaged = [changed(**{name: value}) for name, values in bad.items() for value in values]
    for content in ("", right[:100], "[" * 100_000, '{"keys": {}}', '{"keys": [1]}', changed(hash="x"), *damaged):
        file.write_text(content)
        caplog.clear()
        assert found() is not None
        assert found(other) is not None
        (told,) = caplog.messages  # once for each change
        assert told.startswith(f"the keys stay as they were: {file} is no file of keys: ")
    file.write_text(changed(hash=keys.hashed(key).upper(), scopes=["admin"]))
    its = found()
    assert its is not None
    assert its.scopes == ("admin",)
    file.unlink()
    assert found() is None
    assert caplog.messages[-1] == f"{file} is gone: there are no keys now"
    file.write_text(right)
    assert found() is not None
    with pytest.raises(ValueError, match="max_concurrent must be a whole number of at least 0, found -3"):
        keys.add(file, "less", ["inference"], -3)


def unconnected(address: str) -> Any:
    raise AssertionError(address)


def servers(**running: int) -> Servers:
    made = Servers([], unconnected, 1)
    model = Model("m", "text-generation", {})
    made.every = [
        Server(address, None, healthy=True, models={"m": model}, running=count)  # type: ignore[arg-type]
        for address, count in running.items()
    ]
    return made


def test_a_conversation_stays_where_it_began_unless_that_is_much_busier() -> None:
    conversations = [beginning_of(["system", f"question {index}"]) for index in range(200)]
    homes = [servers(a=0, b=0, c=0).order("m", each)[0].address for each in conversations]
    assert {name: 40 < homes.count(name) < 95 for name in "abc"} == dict.fromkeys("abc", True)
    slightly = [servers(a=4, b=0, c=0).order("m", each)[0].address for each in conversations]
    assert slightly == homes
    much = [servers(a=5, b=0, c=0).order("m", each)[0].address for each in conversations]
    assert "a" not in much
    assert [its for its, home in zip(much, homes, strict=True) if home != "a"] == [its for its in homes if its != "a"]
    two = [servers(a=0, b=0).order("m", each)[0].address for each in conversations]
    assert [its for its, home in zip(two, homes, strict=True) if home != "c"] == [its for its in homes if its != "c"]
    assert [server.address for server in servers(a=2, b=1, c=3).order("m", b"")] == ["b", "a", "c"]


@pytest.mark.parametrize("error", [NotFoundError, UnavailableError])
def test_a_model_that_goes_during_a_look_takes_no_other_with_it(error: type[TridentError]) -> None:
    class Client:
        gone, down = True, False

        async def served(self, timeout: float) -> list[str]:
            return ["a", "b"]

        async def parameters(self, model: str, timeout: float) -> dict[str, str]:
            if (model == "a" and self.gone) or self.down:
                raise error("Request for unknown model: 'a' has no available versions")
            return {"task": "text-generation"}

    async def work() -> None:
        client = Client()
        found = Servers(["here"], lambda address: client, 60)  # type: ignore[arg-type, return-value]
        await found.look_again()
        assert (found.ready, list(found.models())) == (True, ["b"])
        client.gone = False
        await found.look_again()  # the names are the same, the models were not
        assert list(found.models()) == ["a", "b"]
        client.down, found.every[0].looks = True, 15  # the configs are read again
        await found.look_again()
        assert not found.ready

    run(work())


@pytest.mark.parametrize("others", [0, 1])
def test_what_waits_for_a_silent_server_moves_on(others: int) -> None:
    """What has begun stays, and what has nowhere else to go."""

    class Client:
        def __init__(self, address: str) -> None:
            self.address = address
            self.silent = False
            self.closed = 0
            self.answers = asyncio.Event()

        async def served(self, timeout: float) -> list[str]:
            if self.silent:
                raise UnavailableError("it does not answer")
            return ["m"]

        async def parameters(self, model: str, timeout: float) -> dict[str, str]:
            return {"task": "text-generation"}

    async def ask(client: Any) -> AsyncGenerator[str, None]:
        try:
            if client.silent:
                await client.answers.wait()
            yield client.address
            await client.answers.wait()
            yield "end"
        finally:
            client.closed += 1

    async def once(client: Any) -> str:
        if client.silent:
            await client.answers.wait()
        return str(client.address)

    async def work() -> None:
        found = Servers([f"{number}:1" for number in range(1 + others)], Client, 60)  # type: ignore[arg-type]
        await found.look_again()
        for server in found.every[1:]:
            server.running = 1  # so that the first is asked first
        client: Any = found.every[0].client
        begun = found.stream("m", b"", ask)
        assert await anext(begun) == "0:1"
        client.silent, found.every[0].running = True, 0
        waiting = asyncio.create_task(found.call("m", b"", once))
        stream = found.stream("m", b"", ask)
        first = asyncio.ensure_future(anext(stream))
        await settled()
        assert (found.every[0].running, waiting.done()) == (2, False)
        for _ in range(3):
            await found._look(found.every[0])
        await settled()
        assert (waiting.done(), first.done()) == (bool(others), bool(others))
        client.answers.set()
        assert await waiting == await first == f"{others}:1"
        assert await anext(begun) == "end"
        assert (found.every[0].waiting, client.closed) == ({}, others)
        for each in (begun, stream):
            await each.aclose()
        assert client.closed == 2

    run(work())


def test_servers_of_a_name_come_and_go() -> None:
    closed: list[str] = []
    gone: list[str] = []

    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        async def served(self, timeout: float) -> list[str]:
            return ["a"]

        async def parameters(self, model: str, timeout: float) -> dict[str, str]:
            return {"task": "text-generation"}

        async def close(self) -> None:
            closed.append(self.address)

    addresses = ["10.0.0.1:8001", "10.0.0.2:8001"]

    async def resolve(name: str) -> list[str]:
        assert name == "pods:8001"
        if not addresses:
            raise socket.gaierror("no such name")
        return list(addresses)

    async def work() -> None:
        listed = ["fixed:8001", "dns:pods:8001"]
        found = Servers(listed, Client, 60, resolve=resolve, gone=gone.append)  # type: ignore[arg-type]
        await found.start()
        assert [server.address for server in found.having("a")] == ["fixed:8001", "10.0.0.1:8001", "10.0.0.2:8001"]
        found.every[1].running = 1  # an answer of it is being made
        addresses[:] = ["10.0.0.2:8001", "10.0.0.3:8001"]
        await found.look_again()
        assert [server.address for server in found.having("a")] == ["fixed:8001", "10.0.0.2:8001", "10.0.0.3:8001"]
        assert (closed, gone) == ([], ["10.0.0.1:8001"])
        found._leaving[0].running = 0
        addresses.clear()  # what it had is kept
        await found.look_again()
        assert closed == ["10.0.0.1:8001"]
        assert len(found.having("a")) == 3
        addresses[:] = ["10.0.0.1:8001"]  # and back again
        await found.look_again()
        assert [server.address for server in found.having("a")] == ["fixed:8001", "10.0.0.1:8001"]
        await found.stop()

    run(work())
    assert sorted(closed) == ["10.0.0.1:8001", "10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8001", "fixed:8001"]


def test_a_name_has_addresses() -> None:
    assert set(asyncio.run(resolved("localhost:8001"))) & {"127.0.0.1:8001", "[::1]:8001"}
    with pytest.raises(socket.gaierror):
        asyncio.run(resolved("no-such-name.invalid:8001"))
    with pytest.raises(ValueError, match="triton names 'pods': give host:port of a gRPC endpoint, or dns:name:port"):
        Settings(triton=("pods",))
    with pytest.raises(ValueError, match="triton names 'dns:pods'"):
        Settings(triton=("dns:pods",))


def test_what_the_metrics_say_of_models() -> None:
    metrics = Metrics()

    def values() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for family in metrics.registry.collect():
            for sample in family.samples:
                if "model_" in sample.name and not sample.name.endswith("_created"):
                    short = sample.name.removeprefix("trident_gateway_model_")
                    found.setdefault(short, {})[sample.labels["model"]] = sample.value
        return found

    def look(*, healthy: bool = True, **verified: bool) -> dict[str, dict[str, float]]:
        metrics.server("here", healthy=healthy, verified=verified)
        return values()

    assert look(a=True, b=False) == {
        "ready": {"a": 1, "b": 1},
        "unverified": {"a": 0, "b": 1},
        "losses_total": {"a": 0, "b": 0},
    }
    found = look(b=True)
    assert (found["ready"], found["losses_total"]) == ({"a": 0, "b": 1}, {"a": 1, "b": 0})
    assert found["unverified"]["b"] == 0
    assert look(b=True)["losses_total"] == {"a": 1, "b": 0}  # it is not lost again
    found = look(healthy=False, b=True)  # what the server had when it last answered
    assert (found["ready"], found["losses_total"]) == ({"a": 0, "b": 0}, {"a": 1, "b": 0})
    found = look(a=True)  # it came back with another model
    assert (found["ready"], found["losses_total"]) == ({"a": 1, "b": 0}, {"a": 1, "b": 1})
    metrics.forget("here")
    assert values() == {"losses_total": {"a": 1, "b": 1}}


def test_stages_are_no_models() -> None:
    embedding = {"task": "feature-extraction"}
    found = catalog(
        {
            "e": embedding,
            "e_int8": embedding,
            "e_texts": embedding,
            "e_tokenizer": embedding | {"max_tokens": "96"},
            "e_model": {},
            "e_model_int8": {},
            "e_postprocess": embedding | {"labels": "3"},
            "e_explain": embedding,
            "i": {"task": "image-classification"},
            "i_preprocess": {"task": "image-classification"},
            "i_model-image": {},
            "g": {"task": "text-generation", "slots": "8", "max_waiting": "6", "context": "512"},
        }
    )
    assert list(found) == ["e", "e_int8", "i", "g"]
    assert (found["e_int8"].context, found["e_int8"].labels, found["e_int8"].tokenizer) == (96, 3, "e_tokenizer")
    assert (found["g"].context, found["g"].at_once) == (512, 11)
    assert (found["e_int8"].explained, found["g"].explained) == (True, False)


def test_probabilities_are_in_the_order_of_the_classes() -> None:
    """Of the request's own labels in theirs; of a server that does not tell its classes' numbers there are none."""

    def probs(asked: list[str] | None, *classes: Label) -> Any:
        return classify._entry(0, classes, asked).get("probs")

    assert probs(None, Label("b", 0.5, 1), Label("c", 0.3, 2), Label("a", 0.2, 0)) == [0.2, 0.5, 0.3]
    assert probs(["a", "b"], Label("b", 0.9), Label("a", 0.1)) == [0.1, 0.9]
    assert probs(None, Label("b", 0.9), Label("a", 0.1)) is None


def test_errors_of_the_server() -> None:
    too_long = "messages has 3000 tokens, the model's context of 2048 allows 2047 and one generated token"
    error = from_trident(InvalidRequestError(too_long))
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert error.message == f"This model's maximum context length is 2048 tokens: {too_long}"
    error = from_trident(InvalidRequestError("stop_words holds 33 texts, the limit is 32"))
    assert (error.status, error.code, error.param) == (400, None, "stop")
    error = from_trident(InvalidRequestError("unexpected inference input 'dimensions' for model 'minilm'"))
    assert (error.status, error.param) == (400, "dimensions")
    assert error.message == "the model 'minilm' knows no dimensions: leave it out"
    assert from_trident(OverloadedError("the queue is full: 8 requests wait")).status == 429
    assert from_trident(UnavailableError("connection refused")).status == 503


@pytest.mark.parametrize(
    ("kind", "told", "message"),
    [
        (
            UnavailableError,
            "connection refused: 10.0.0.7:8001",
            "the server can't be reached, or ends: try again later",
        ),
        (
            UnavailableError,
            "in ensemble 'chat', the guard's rule people could not be checked: rampart_tokenizer is not ready",
            "the guard's rule people could not be checked, so the model does not answer: try again later, or tell "
            "whoever runs this gateway, whose log says why",
        ),
        (
            OverloadedError,
            "the guard's rule people could not be checked: rampart: the queue is full",
            "the guard's rule people could not be checked, so the model does not answer: try again later, or tell "
            "whoever runs this gateway, whose log says why",
        ),
        (
            UnavailableError,
            "smollm2, which answers for this model, is not ready: 10.0.0.7:8001",
            "another model, which answers for this one, is not ready: try again later",
        ),
        (
            UnavailableError,
            "the model is not loaded: try again later",
            "the model is not loaded now: try again later",
        ),
        (
            UnavailableError,
            "Request for unknown model: 'm_model' has no available versions",
            "the model is not loaded now: try again later",
        ),
    ],
)
def test_why_there_is_no_answer_now(kind: type[UnavailableError], told: str, message: str) -> None:
    """The caller reads what is true and no inner name; the log has the server's sentence."""
    error = from_trident(kind(told))
    assert (error.status, error.code, error.message, error.cause) == (503, "unavailable", message, told)
    assert error.headers == {"retry-after": "2"}


def test_a_defect_has_the_form_of_other_errors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway(Settings(access_log=False))
    monkeypatch.setattr(gateway.servers, "models", lambda: 1 // 0)
    headers = [(b"host", b"127.0.0.1"), (b"x-request-id", b"mine")]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": headers}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    run(app.create(gateway)(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500
    answer = json.loads(b"".join(message.get("body", b"") for message in sent))
    assert (answer["error"]["type"], answer["error"]["code"]) == ("server_error", "server_error")
    assert caplog.messages[-1].startswith("mine: a request failed by ZeroDivisionError:")


def test_an_error_in_the_caller_s_words() -> None:
    too_long = "text_input has 101 tokens, the model takes 96"
    for told in (f"in ensemble 'embed', {too_long}", too_long):  # by the whole model, and by its tokenizer alone
        error = from_trident(InvalidRequestError(told)).renamed({"prompt": "input"})
        assert (error.param, error.code) == ("input", "context_length_exceeded")
    error = ApiError(400, "guided_json is refused: x", param="guided_json", retry_after=3)
    named = error.renamed({"guided_json": "format"})
    assert (named.message, named.param, named.headers) == ("format is refused: x", "format", {"retry-after": "3"})
    assert error.renamed({"seed": "s"}) is error


def test_items_become_messages() -> None:
    items: list[dict[str, Any]] = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]

    def call(name: str, function: str) -> dict[str, Any]:
        return {"id": name, "type": "function", "function": {"name": function, "arguments": "{}"}}

    assert messages_of(items, "be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [call("a", "f"), call("b", "g")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]


def test_files_of_the_gateways_machine_are_never_read(tmp_path: Path) -> None:
    """A part of type "image" may name a path, which our client would open."""
    (tmp_path / "secret").write_text("root:x:0:0:")
    for image in ({"image": str(tmp_path / "secret")}, {"image": 5}, {}):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", **image}]}]
        with pytest.raises(ApiError, match=r"messages\[0\]\.content\[1\]\.type is 'image'.*image_url"):
            conversation(messages)
        with pytest.raises(ApiError, match="a part of type 'image': only texts are read here"):
            messages_of(messages, None)


def test_tokens_that_are_no_text() -> None:
    first, second = bytes([0xF0, 0x9F]), bytes([0x98, 0x80])
    assert written(first) == "bytes:\\xf0\\x9f"
    chunk = GenerationChunk("a😀b", "", 1, 4, (-1.0,) * 4, tokens=(b"a", first, second, b"b"))
    assert LogProbs(False).of(chunk)["text_offset"] == [0, 1, 1, 2]


def test_what_the_log_says_of_a_request() -> None:
    def of(**headers: str) -> Exchange:
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        return Exchange.of({"headers": raw, "method": "POST", "client": ("1.2.3.4", 5)})

    assert of(x_request_id="abc-1").request_id == "abc-1"
    for bad in ("", "a b", "x" * 129, 'a"b', "a\x1b[0m"):
        assert of(x_request_id=bad).request_id.startswith("req-")
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert of(traceparent=trace).trace_id == "a" * 32
    assert of(traceparent=trace + "x").trace_id is None


def test_a_log_that_nobody_reads_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        log = AccessLog(stream)
        os.close(reader)
        for _ in range(3):
            log.write(Exchange("id", "GET", None), 1.0)
        assert caplog.messages == ["the access log can't be written: [Errno 32] Broken pipe"]
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it still holds has somewhere to go


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines"),
        ({"triton": ()}, "names no server"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"timeout": float("nan")}, "timeout must be above 0, and finite, found nan"),
        ({"write_seconds": 0.0}, "write_seconds must be above 0"),
        ({"max_per_key": -1}, "max_per_key must be at least 0"),
        ({"port": 65536}, "port must be at most 65535"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_gateway_for_others_needs_keys_or_says_that_it_needs_none(tmp_path: Path) -> None:
    assert Settings(host="0.0.0.0", public=True).keys is None
    assert json.dumps(str(Settings(host="0.0.0.0", keys=tmp_path / "k").keys))
