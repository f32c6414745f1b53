"""Guards before real generators: through the gateway and past it, with rules that ask other models of the server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.conftest import post, run_export_cold
from tests.gateways import LABELS, Gateway, install_guarded
from tests.integration.test_messages import TOOL
from trident_client import Client, Finding, InvalidRequestError, UnavailableError
from trident_serving.guard.rules import Guard
from trident_serving.launcher.local import LocalServer
from trident_serving.runtime.sampling.watermark import Watermark, detect

MESSAGES = [{"role": "user", "content": "Tell me about rain in Bonn"}]
REDACTED = [{"role": "user", "content": "Tell me about [weather] in Bonn"}]
BLOCKED = [{"role": "user", "content": "open sesame"}]
WEATHER = {"name": "weather", "action": "redact", "pattern": r"\b(?:rain|snow)\b"}
SESAME = {"name": "sesame", "action": "block", "pattern": r"(?i)open\s{1,3}sesame"}
NOTE = Finding("weather", "redact", "input", 1)
CITY = {"name": "city", "action": "redact", "stages": ["output"], "pattern": "Zürich", "replacement": 'a "place"'}
PIN = {"name": "pin", "action": "redact", "stages": ["input"], "pattern": r"pin\s\d\d\s?\d\d"}
DIGIT = {"name": "digit", "action": "redact", "stages": ["output"], "pattern": "[0-9]", "replacement": '"'}


MOOD = {"action": "block", "stages": ["input"], "classifier": "classify", "labels": ["LABEL_0"], "window": 4000}
MOOD |= {"classes": 3, "threshold": 1.0}  # never met
AGE = {"type": "integer", "minimum": 100, "maximum": 999}


@pytest.fixture(scope="module")
def said(gateway_server: LocalServer) -> str:
    """What `talk` answers to the redacted question."""
    with Client(gateway_server.grpc_url, timeout=60) as client:
        return client.chat(REDACTED, model="talk", max_tokens=24).text


@pytest.fixture(scope="module")
def forbidden(said: str) -> str:
    """Characters of that answer which a rule forbids."""
    return said[len(said) // 2 :][:3]


@pytest.fixture(scope="module", autouse=True)
def guarded(gateway_server: LocalServer, gateway_folder: Path, forbidden: str) -> Iterator[None]:
    """The graph of `talk` behind patterns and, as `asking`, behind models too; as `calling` that of `chain`."""
    word = {"name": "word", "action": "block", "stages": ["output"], "pattern": re.escape(forbidden)}
    tag = {"name": "tag", "action": "annotate", "stages": ["input"], "entities": "tag", "threshold": 0.1}
    judge = {"name": "judge", "action": "annotate", "judge": "talk", "template": "llama-guard", "policy": "S1: Rain."}
    guards = {"guarded": [WEATHER, SESAME, word], "asking": [WEATHER, SESAME, word, tag, judge]}
    guards |= {"calling": [CITY], "spelling": [DIGIT, PIN]}
    guards["open"] = [{**tag, "action": "redact", "window": 4000}, {"name": "mood", **MOOD}]
    guards["misnamed"] = [{**tag, "labels": [LABELS[1].split("-")[-1], "NAME"]}]
    repository = gateway_folder / "repository"
    with Client(gateway_server.grpc_url, timeout=60) as client:
        for name, rules in guards.items():
            graph = "chain" if name == "calling" else "talk"
            install_guarded(
                repository,
                name,
                graph,
                Guard.from_table(name, {"rules": rules, "on_failure": "open" if name == "open" else "closed"}),
            )
            client.load(name)
        yield
        for name in guards:
            client.unload(name)


def test_a_label_that_no_entity_has_fails_closed(direct: Client, gateway: Gateway) -> None:
    with pytest.raises(UnavailableError) as raised:
        direct.chat(MESSAGES, model="misnamed", max_tokens=1)
    known = ", ".join(dict.fromkeys(label.split("-")[-1] for label in LABELS if label != "O"))
    told = f"the guard's rule tag could not be checked: tag has no label 'NAME', its labels are {known}"
    assert str(raised.value).endswith(told)
    status, _, answer = gateway.ask("/v1/chat/completions", {"model": "misnamed", "messages": MESSAGES})
    assert (status, answer["error"]["code"]) == (503, "unavailable")
    assert answer["error"]["message"].startswith("the guard's rule tag could not be checked, so the model does not")
    deadline = time.monotonic() + 10
    while not (said := [entry.get("error") for entry in gateway.entries() if entry.get("model") == "misnamed"]):
        assert time.monotonic() < deadline, "the log has no line of the request"
        time.sleep(0.05)
    assert said == [str(raised.value)]


@pytest.mark.parametrize("model", ["guarded", "asking"])
def test_answers_are_those_without_a_guard_up_to_what_it_blocks(
    direct: Client, said: str, forbidden: str, model: str
) -> None:
    expected = said[: said.index(forbidden)]
    whole = direct.chat(MESSAGES, model=model, max_tokens=24)
    chunks = list(direct.stream(MESSAGES, model=model, max_tokens=24))
    assert (whole.text, whole.finish_reason) == (expected, "content_filter")
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (expected, "content_filter")
    word = Finding("word", "block", "output", 1)
    for guard in (whole.guard, chunks[-1].guard):
        assert {NOTE, word} <= {*guard}
    short = direct.chat(MESSAGES, model=model, max_tokens=4)
    assert short.text == direct.chat(REDACTED, model="talk", max_tokens=4).text
    assert short.finish_reason == "length"


def test_no_door_goes_around_the_guard(gateway_server: LocalServer, direct: Client) -> None:
    """Texts, messages and tokens, over gRPC and Triton's own HTTP endpoint."""
    ids = direct.generate("open sesame", model="talk", max_tokens=0, return_prompt_token_ids=True).prompt_token_ids
    for prompt in ("open sesame", BLOCKED, list(ids)):
        found = direct.generate(prompt, model="guarded", max_tokens=4)
        assert (found.text, found.finish_reason) == ("", "content_filter")
        assert found.guard == (Finding("sesame", "block", "input", 1),)
    parts = [{"role": "user", "content": [{"type": "text", "text": "open"}, {"type": "text", "text": "sesame"}]}]
    assert direct.generate(parts, model="guarded", max_tokens=4).finish_reason == "content_filter"
    url = f"{gateway_server.http_url}/v2/models/guarded/generate"
    status, text = post(url, {"text_input": "open sesame", "max_tokens": 4})
    assert (status, json.loads(text)["text_output"]) == (200, "")
    assert json.loads(text)["finish_reason"] == "content_filter"
    with pytest.raises(InvalidRequestError, match="top_logprobs is not known to this model: its guard guarded may"):
        direct.generate("hello", model="guarded", top_logprobs=2)


def test_what_is_in_two_parts_of_a_message_is_redacted(direct: Client) -> None:
    """This template puts parts together by lines."""

    def said(*texts: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]

    found = direct.chat(said("my pin 12", "34 is secret", "ok"), model="spelling", max_tokens=1)
    assert found.guard[0] == Finding("pin", "redact", "input", 1)
    plain = direct.chat(said("my [pin]", " is secret", "ok"), model="talk", max_tokens=1)
    assert found.num_input_tokens == plain.num_input_tokens
    apart = direct.chat(said("my pin 12", "or 34"), model="spelling", max_tokens=1)
    assert [each.rule for each in apart.guard if each.stage == "input"] == []


def test_rules_ask_other_models(direct: Client) -> None:
    """Notes say what the models themselves answer."""
    found = direct.chat(MESSAGES, model="asking", max_tokens=4)
    told = {(each.rule, each.stage): each.count for each in found.guard}
    tags = [each for each in direct.entities(REDACTED[0]["content"], model="tag") if each.score >= 0.1]
    assert told.get(("tag", "input"), 0) == len(tags) > 0
    rule = Guard.from_table("g", {"rules": [{"name": "j", "judge": "talk", "template": "llama-guard"}]}).rules[0]
    for stage, assistant in (("input", ""), ("output", found.text)):
        asked: Mapping[str, Any] = {"user": REDACTED[0]["content"], "assistant": assistant, "policy": "S1: Rain."}
        verdict = direct.chat(
            rule.prompt_template.render(asked), model="talk", guided_choice=["safe", "unsafe"], max_tokens=16
        )
        assert told.get(("judge", stage), 0) == (verdict.text == "unsafe")


def test_a_text_that_a_rule_s_model_can_not_read_is_never_let_through(direct: Client) -> None:
    """Of a guard that is open: its models were asked, and said why not. One without a word that they know is empty."""
    with pytest.raises(
        InvalidRequestError, match=r"rule mood can't read this text: text_input has \d+ tokens, the model"
    ):
        direct.generate("Anna goes to Bonn " * 60, model="open", max_tokens=4)
    many = [{"role": "user", "content": text} for text in ("Anna", "\U0001f600", "Bonn " * 200, "Anna in Bonn")]
    with pytest.raises(InvalidRequestError, match="rule mood can't read this text: text_input has"):
        direct.chat(many, model="open", max_tokens=4)
    found = direct.chat([many[0], many[1], many[3]], model="open", max_tokens=4)
    alone = {
        text: sum(each.score >= 0.1 for each in direct.entities(text, model="tag")) for text in ("Anna", "Anna in Bonn")
    }
    told = {each.rule: (each.action, each.count) for each in found.guard}
    assert told == {"tag": ("redact", sum(alone.values()))} if sum(alone.values()) else not told


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_redacted_in_a_call_leaves_its_json(gateway: Gateway, stream: bool) -> None:
    asked = {
        "model": "calling",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [TOOL],
        "max_tokens": 24,
        "stream": stream,
    }
    _, _, answer = gateway.ask("/v1/chat/completions", asked)
    choices = _events(answer) if stream else [each | {"delta": each["message"]} for each in answer["choices"]]
    functions = [call["function"] for each in choices for call in each["delta"].get("tool_calls") or ()]
    assert "".join(each.get("name") or "" for each in functions) == "weather"
    assert json.loads("".join(each["arguments"] for each in functions)) == {"city": 'a "place"'}
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_redacted_in_an_answer_under_a_schema_leaves_json(direct: Client, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "ages": {"type": "array", "items": AGE, "minItems": 1, "maxItems": 4},
        },
        "required": ["name", "ages"],
    }
    asked: dict[str, Any] = {"guided_json": json.dumps(schema), "max_tokens": 200, "random_seed": 3, "temperature": 1.0}
    right = json.loads(direct.chat(MESSAGES, model="talk", **asked).text)
    if stream:
        text = "".join(chunk.text for chunk in direct.stream(MESSAGES, model="spelling", **asked))
    else:
        text = direct.chat(MESSAGES, model="spelling", **asked).text
    assert json.loads(text) == {
        "name": re.sub("[0-9]", '"', right["name"]),
        "ages": [re.sub("[0-9]", '"', str(age)) for age in right["ages"]],
    }
    assert right["ages"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_gateway_says_content_filter(gateway: Gateway, said: str, forbidden: str, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "guarded", "max_tokens": 24, "stream": stream}
    _, _, answer = gateway.ask("/v1/chat/completions", asked | {"messages": MESSAGES})
    choices = _events(answer) if stream else [each | {"delta": each["message"]} for each in answer["choices"]]
    text = "".join(each["delta"].get("content") or "" for each in choices)
    assert (text, choices[-1]["finish_reason"]) == (said[: said.index(forbidden)], "content_filter")
    assert {"rule": "word", "action": "block", "stage": "output", "count": 1} in choices[-1]["guard"]
    _, _, answer = gateway.ask("/v1/completions", asked | {"prompt": "open sesame"})
    (choice,) = _events(answer) if stream else answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
    body = {"model": "guarded", "input": "open sesame", "max_output_tokens": 24}
    _, _, answer = gateway.ask("/v1/responses", body)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})


def _events(text: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [choice for each in data for choice in json.loads(each)["choices"]]


def test_a_watermark_through_the_gateway(
    gateway: Gateway, direct: Client, gateway_folder: Path, tmp_path: Path
) -> None:
    """The tokens of a marked answer are on their green lists, and nobody else's answer changes."""
    asked: dict[str, Any] = {"model": "talk", "max_tokens": 24}
    plain = direct.chat(REDACTED, return_tokens=True, **asked)
    config = {"bias": 100, "hashing_key": 5}
    marked = direct.chat(REDACTED, watermarking_config=config, return_tokens=True, **asked)
    _, _, answer = gateway.ask("/v1/chat/completions", asked | {"messages": REDACTED, "watermarking_config": config})
    assert answer["choices"][0]["message"]["content"] == marked.text != plain.text
    assert direct.chat(REDACTED, return_tokens=True, **asked).token_ids == plain.token_ids
    watermark = Watermark(tiny_models.VOCABULARY, hashing_key=5)
    ids = [token for token in marked.token_ids if token]
    assert detect(ids, watermark).green == len(ids) - 1 > 10
    assert detect(list(plain.token_ids), watermark).z_score < 3
    # The command reads the text again, as anybody could have it.
    (tmp_path / "answer.txt").write_text(marked.text, newline="")
    found = direct.generate(marked.text, model="talk", max_tokens=0, return_prompt_token_ids=True).prompt_token_ids
    told = detect(list(found), watermark)
    arguments = ("--hashing-key", "5", "--repository", str(gateway_folder / "repository"))
    done = run_export_cold("detect", "talk", str(tmp_path / "answer.txt"), *arguments)
    assert f"marked: {told.green} of {told.scored} tokens are on their lists" in done.stdout, done.stderr
