"""A guard around a service: what reaches the engine, what reaches the client, and what happens without its models."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_models
from tests.unit.test_guard_tables import install_labels
from trident_serving.chat.template import Joint
from trident_serving.errors import InvalidRequest, Overloaded
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.request import GenerationRequest, RequestParser
from trident_serving.generation.stream import Chunk, ResponseChannel
from trident_serving.guard import prompts
from trident_serving.guard.asking import Models
from trident_serving.guard.filtering import Findings, Passed, filter_all
from trident_serving.guard.rules import Guard, Stage
from trident_serving.guard.service import GuardedService
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import Inputs
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

TOKENIZER = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)
EMAIL = {"name": "email", "action": "redact", "pattern": r"\b[\w.]+@\w+\.\w+", "longest": 40}
SECRET = {"name": "secret", "action": "block", "pattern": "xyzzy"}
NAMES = {"name": "names", "action": "redact", "entities": "tagger", "labels": ["PER"]}
JUDGE = {"name": "judge", "action": "block", "judge": "guardian", "template": "granite-guardian"}


class Engine:
    """A service whose engine says what a test wants, in chunks of three characters."""

    memory, draft_name, tokenizer, joint = "", "", TOKENIZER, Joint()

    def __init__(self, answers: Sequence[Mapping[str, str]]) -> None:
        self.recorder = Recorder()
        self.asked: list[GenerationRequest] = []
        self.channel: ResponseChannel | None = None
        self._answers = answers
        self._parser = RequestParser(TOKENIZER, None, GenerationLimits())

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        if "messages" in inputs:  # there is no chat template: their JSON is the prompt
            inputs = {"text_input" if name == "messages" else name: tensor for name, tensor in inputs.items()}
        return replace(self._parser.parse(inputs, timeout), return_reasoning="reasoning" in self._answers[0])

    def submit(self, request: GenerationRequest, channel: ResponseChannel) -> None:
        self.asked.append(request)
        self.channel = channel
        chunks = [list(self._chunks(index, request)) for index in range(request.answers)]
        if not request.stream:
            first, *others = [each[-1] for each in chunks]
            first.others = others
            channel.send(first)
            return
        while any(chunks):
            for each in chunks:
                if each and not channel.is_cancelled():
                    chunk = each.pop(0)
                    chunk.final = not any(chunks)
                    channel.send(chunk)
                elif each:
                    del each[:]
                    channel.send(Chunk("", FinishReason.CANCELLED))

    def _chunks(self, index: int, request: GenerationRequest) -> Iterator[Chunk]:
        answer = self._answers[index]
        size = 3 if request.stream else 10_000
        for name, text in answer.items():
            for start in range(0, len(text), size) if request.stream else ():
                yield self._chunk(index, {name: text[start : start + size]}, answer)
        whole = {} if request.stream else answer
        yield replace(self._chunk(index, whole, answer), finish_reason=FinishReason.STOP)

    @staticmethod
    def _chunk(index: int, given: Mapping[str, str], answer: Mapping[str, str]) -> Chunk:
        chunk = Chunk(given.get("text", ""), index=index, num_output_tokens=1)
        if "reasoning" in answer:
            chunk.reasoning = given.get("reasoning", "")
        if "arguments" in answer:
            call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
            call["function"] = {"name": "f", "arguments": given.get("arguments", "")}
            chunk.tool_calls = json.dumps([call] if "arguments" in given else [])
        return chunk

    def steps(self) -> int:
        return 0

    def busy(self) -> bool:
        return False

    def stop(self) -> None:
        pass


class Client:
    """A channel that keeps what comes."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.gone = False
        self.done = threading.Event()

    def send(self, chunk: Chunk) -> None:
        assert not self.done.is_set()
        self.chunks += [chunk, *chunk.others]
        if chunk.final:
            self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        return self.gone

    def text(self, name: str = "text", index: int = 0) -> str:
        return "".join(getattr(chunk, name) or "" for chunk in self.chunks if chunk.index == index)

    def ended(self, index: int = 0) -> tuple[str, list[dict[str, Any]]]:
        """The finish reason, and what the guard told."""
        last = [chunk for chunk in self.chunks if chunk.index == index][-1]
        assert last.finish_reason is not None
        return last.finish_reason.value, json.loads(last.findings or "null")


class Model:
    """A served model whose answer is a function."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self._answer = answer
        self.asked: list[str] = []

    async def infer(self, tensors: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        await asyncio.sleep(0)
        field = "messages" if "messages" in tensors else "text_input"
        self.asked.append("|".join(text.decode() for text in tensors[field].reshape(-1)))
        return self._answer(tensors)

    async def close(self) -> None:
        pass


def tagger(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Anna is a person, Bonn a place."""
    texts = [text.decode() for text in tensors["text_input"][:, 0]]
    labels = {"Anna": "PER", "Bonn": "LOC"}
    rows = [[(each.start(), each[0], labels[each[0]]) for each in re.finditer("Anna|Bonn", text)] for text in texts]
    most = max(map(len, rows)) + 1
    found = [row + [(0, "", "")] * (most - len(row)) for row in rows]
    return {
        "entity": np.stack([encode_texts([label for *_, label in row]) for row in found]),
        "score": np.array([[0.9 * bool(word) for _, word, _ in row] for row in found], np.float32),
        "start": np.array([[start for start, *_ in row] for row in found], np.int32),
        "end": np.array([[start + len(word) for start, word, _ in row] for row in found], np.int32),
    }


def guardian(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bombs are harmful."""
    assert tensors["guided_choice"].tolist() == [[b"No", b"Yes"]]
    harmful = "bomb" in json.loads(tensors["messages"].item())[0]["content"]
    return {"text_output": encode_texts(["Yes" if harmful else "No"])}


def absent(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    raise Overloaded("tagger is not ready")


@contextmanager
def guarded(
    rules: Sequence[Mapping[str, Any]],
    *answers: Mapping[str, str] | str,
    models: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] | None = None,
    repository: Path | None = None,
    **settings: Any,
) -> Iterator[tuple[GuardedService, Engine, dict[str, Model]]]:
    engine = Engine([{"text": each} if isinstance(each, str) else each for each in answers])
    guard = Guard.from_table("g", {"rules": [dict(rule) for rule in rules], **settings})
    served = {name: Model(answer) for name, answer in (models or {}).items()}
    service = GuardedService(engine, guard, Models(guard, served.__getitem__, repository), 4)
    try:
        yield service, engine, served
    finally:
        service.stop()


def ask(service: GuardedService, text: str = "Hi", *, stream: bool = False, **fields: Any) -> Client:
    client = Client()
    inputs = {"text_input": encode_texts([text])[None], "stream": np.array([[stream]]), **fields}
    service.submit(service.parse(inputs), client)
    assert client.done.wait(20)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_a_rule_blocks_never_reaches_the_engine(stream: bool) -> None:
    with guarded([SECRET, EMAIL], "", "") as (service, engine, _):
        client = ask(service, "a@b.de says xyzzy", stream=stream, n=np.array([[2]], np.int32))
        assert engine.asked == []
        told = [
            {"rule": "email", "action": "redact", "stage": "input", "count": 1},
            {"rule": "secret", "action": "block", "stage": "input", "count": 1},
        ]
        assert [client.ended(index) for index in (0, 1)] == [("content_filter", told)] * 2
        assert client.chunks[0].num_input_tokens == len(TOKENIZER.encode("a@b.de says xyzzy"))
        assert engine.recorder.drain().counters == {"guard_blocks": 1}


def test_what_is_redacted_never_reaches_the_engine() -> None:
    with guarded([EMAIL], "fine") as (service, engine, _):
        client = ask(service, "to a@b.de, c@d.de")
        assert engine.asked[0].prompt == "to [email], [email]"
        assert engine.asked[0].prompt_ids == tuple(TOKENIZER.encode("to [email], [email]"))
        assert client.ended() == ("stop", [{"rule": "email", "action": "redact", "stage": "input", "count": 2}])
        ids = np.array([TOKENIZER.encode("I am e@f.de")], np.int32)
        by_ids = Client()
        service.submit(service.parse({"input_ids": ids}), by_ids)
        assert engine.asked[1].prompt == "I am [email]"
        ask(service, "nothing to find")
        assert engine.asked[2].prompt == "nothing to find"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asking", [False, True])
def test_an_answer_ends_where_a_rule_blocks_it(stream: bool, asking: bool) -> None:
    rules = [SECRET, EMAIL, *([NAMES] if asking else [])]
    with guarded(rules, "Write a@b.de. Say xyzzy. More.", models={"tagger": tagger}) as (service, engine, _):
        client = ask(service, stream=stream)
        assert client.text() == "Write [email]. Say "
        reason, told = client.ended()
        assert reason == "content_filter"
        assert [(each["rule"], each["count"]) for each in told] == [("email", 1), ("secret", 1)]
        assert engine.channel is not None
        assert engine.channel.is_cancelled()  # so the engine stops


TEXT = st.lists(
    st.sampled_from(["Anna ", "xyzzy", "a@b.de", "Bonn. ", "the bomb ", "\n", "x", "a@b"]), min_size=1, max_size=6
).map("".join)


@settings(max_examples=40, deadline=None)
@given(answer=st.fixed_dictionaries({"reasoning": TEXT, "text": TEXT, "arguments": TEXT}))
def test_streamed_or_not_an_answer_is_the_same(answer: dict[str, str]) -> None:
    """Reasoning and the arguments of calls are filtered as the text is."""
    rules = [SECRET, EMAIL, NAMES, {**JUDGE, "stages": ["output"]}]
    models = {"tagger": tagger, "guardian": guardian}
    answer = {name: answer[name] for name in ("reasoning", "text", "arguments")}  # as a model writes them
    with guarded(rules, answer, models=models) as (service, _, _):
        whole, parts = ask(service), ask(service, stream=True)
        for name in ("reasoning", "text"):
            assert parts.text(name) == whole.text(name)
        assert parts.ended()[0] == whole.ended()[0]
        if whole.ended()[0] == "stop":
            assert _arguments(parts) == _arguments(whole)
    for client in (whole, parts):
        for text in (client.text("reasoning"), client.text(), _arguments(client)):
            assert not re.search("xyzzy|a@b.de|bomb|Anna", text)


def _arguments(client: Client) -> str:
    calls = [call for chunk in client.chunks for call in json.loads(chunk.tool_calls or "[]")]
    return "".join(call["function"]["arguments"] for call in calls)


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_two_answers_is_blocked(stream: bool) -> None:
    with guarded([SECRET], "now xyzzy and more", "all is well here") as (service, engine, _):
        client = ask(service, stream=stream, n=np.array([[2]], np.int32))
        assert (client.text(index=0), client.ended(0)[0]) == ("now ", "content_filter")
        assert (client.text(index=1), client.ended(1)) == ("all is well here", ("stop", []))
        assert engine.recorder.drain().counters == {"guard_blocks": 1}


def test_only_what_may_still_match_is_held_back() -> None:
    with guarded([EMAIL], "one two a@b.d three") as (service, _, _):
        shown = [chunk.text for chunk in ask(service, stream=True).chunks]
        assert shown == ["one ", "two ", "[email] ", "three"]


def test_models_are_asked_about_windows() -> None:
    with guarded([NAMES], "Anna is here. In Bonn, Anna said.", models={"tagger": tagger}) as (service, engine, models):
        client = ask(service, "I am Anna.", stream=True)
        assert client.text() == "[PER] is here. In Bonn, [PER] said."
        assert engine.asked[0].prompt == "I am [PER]."
        assert models["tagger"].asked == ["I am Anna.", "Anna is here. ", "In Bonn, Anna said."]


def test_a_judge_reads_both_sides() -> None:
    with guarded([JUDGE], "take a bomb", models={"guardian": guardian}) as (service, engine, models):
        assert ask(service, "a bomb, please").ended()[0] == "content_filter"
        assert engine.asked == []
        client = ask(service, "what next?", stream=True)
        assert (client.text(), client.ended()[0]) == ("", "content_filter")
        assert "User Message: what next?" in models["guardian"].asked[-1]
        assert "Assistant Message: take a bomb" in models["guardian"].asked[-1]


@pytest.mark.parametrize("stage", ["input", "output"])
def test_a_guard_that_fails_is_closed_unless_its_table_opens_it(stage: str) -> None:
    rule = {**NAMES, "stages": [stage]}
    with guarded([rule], "Anna", models={"tagger": absent}) as (service, _, _):
        client = ask(service)
        assert client.chunks == []
        assert isinstance(client.error, Overloaded)
        assert str(client.error) == "the guard's rule names could not be checked: tagger is not ready"
    with guarded([rule], "Anna", models={"tagger": absent}, on_failure="open") as (service, _, _):
        client = ask(service)
        assert client.text() == "Anna"
        assert client.ended() == ("stop", [{"rule": "names", "action": "failed", "stage": stage, "count": 1}])


def moody(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every text is calm."""
    rows = len(tensors["text_input"])
    labels = np.stack([encode_texts(["calm", "angry"])] * rows)
    return {"label": labels, "score": np.array([[0.9, 0.1]] * rows, np.float32)}


def test_a_class_that_the_classifier_does_not_have_fails_closed() -> None:
    rule = {"name": "mood", "stages": ["input"], "classifier": "moods", "labels": ["calm", "Angry"], "threshold": 0.95}
    with guarded([rule], "Anna", models={"moods": moody}) as (service, engine, _):
        client = ask(service)
        assert isinstance(client.error, Overloaded)
        assert (
            str(client.error)
            == "the guard's rule mood could not be checked: moods has no label 'Angry', its labels are angry, calm"
        )
        assert engine.asked == []
    with guarded([{**rule, "labels": ["calm", "angry"]}], "Anna", models={"moods": moody}) as (service, _, _):
        assert ask(service).text() == "Anna"


def test_a_label_that_the_model_of_entities_does_not_have_fails_closed(tmp_path: Path) -> None:
    """It found nothing, silently."""
    rule = {**NAMES, "labels": ["LOC", "PERSON"]}
    with guarded([rule], "fine", models={"tagger": tagger}, repository=tmp_path) as (service, engine, served):
        assert ask(service, "Anna").text() == "fine"  # its labels are not known
        install_labels(tmp_path, "tagger", "token-classification", ["O", "B-PER", "I-PER", "B-LOC"])
        for _ in range(2):
            client = ask(service, "Anna")
            assert isinstance(client.error, Overloaded)
            assert str(client.error) == (
                "the guard's rule names could not be checked: tagger has no label 'PERSON', its labels are PER, LOC"
            )
        assert (len(engine.asked), served["tagger"].asked) == (1, ["Anna", "fine"])
    with guarded([NAMES], "fine", models={"tagger": tagger}, repository=tmp_path) as (service, engine, _):
        assert ask(service, "Anna and Bonn").text() == "fine"
        assert engine.asked[0].prompt == "[PER] and Bonn"
    with guarded([rule], "fine", models={"tagger": tagger}, repository=tmp_path, on_failure="open") as (service, _, _):
        client = ask(service, "Anna")
        assert client.text() == "fine"
        assert {"rule": "names", "stage": "input"}.items() <= client.ended()[1][0].items()


def test_the_likeliest_next_tokens_would_tell_what_is_hidden() -> None:
    ahead = {"max_tokens": np.array([[0]], np.int32)}
    with guarded([EMAIL], "fine") as (service, _, _):
        asked = {"text_input": encode_texts(["Hi"])[None], **ahead}
        with pytest.raises(InvalidRequest, match="prompt_logprobs must be 0, since this model's guard g may hide text"):
            service.parse({**asked, "prompt_logprobs": np.array([[1]], np.int32)})
        assert service.parse({**asked, "prompt_logprobs": np.array([[0]], np.int32)}).request.prompt_log_probs == 0


def test_tokens_would_tell_what_is_hidden() -> None:
    with guarded([EMAIL], "fine") as (service, _, _):
        for name, value in (("return_tokens", [[True]]), ("top_logprobs", np.array([[2]], np.int32))):
            with pytest.raises(InvalidRequest, match=f"{name} is not known to this model: its guard g may hide text"):
                ask(service, **{name: np.array(value)})
        assert ask(service, return_log_probs=np.array([[True]])).text() == "fine"
    with guarded([{**EMAIL, "stages": ["input"]}], "fine") as (service, engine, _):
        ask(service, return_tokens=np.array([[True]]))
        assert engine.asked[0].return_tokens


def test_a_client_that_has_gone_costs_the_engine_nothing() -> None:
    with guarded([NAMES], "x", models={"tagger": tagger}) as (service, engine, _):
        client = Client()
        client.gone = True
        service.submit(service.parse({"text_input": encode_texts(["Hi"])[None]}), client)
        assert client.done.wait(20)
        assert client.ended()[0] == "cancelled"
        assert engine.asked == []


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_a_text_that_a_rule_s_model_refuses(on_failure: str) -> None:
    """One without a word that it knows has nothing to find; one that it can't read is refused, never let through."""

    def without_words(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        raise InvalidRequest("text_input holds no token that the model's vocabulary knows")

    with guarded([NAMES], "x", models={"tagger": without_words}, on_failure=on_failure) as (service, engine, _):
        assert ask(service, "\U0001f600").error is None
        assert len(engine.asked) == 1

    def too_long(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        raise InvalidRequest("text_input has 600 tokens, the model takes 512")

    with guarded([NAMES], "x", models={"tagger": too_long}, on_failure=on_failure) as (service, engine, _):
        error = ask(service, ", " * 300).error
        assert isinstance(error, InvalidRequest)
        assert "can't read this text: text_input has 600 tokens, the model takes 512" in str(error)
        assert engine.asked == []


@pytest.mark.parametrize(
    ("field", "sent", "passed"),
    [
        ("messages", [{"role": "a@b.c", "content": "x"}], [{"role": "[email]", "content": "x"}]),
        (
            "messages",
            [{"role": "user", "content": "a@b.c", "type": "user"}],
            [{"role": "user", "content": "[email]", "type": "user"}],
        ),
        ("tools", {"properties": {"a@b.c": {"type": "string"}}}, {"properties": {"[email]": {"type": "string"}}}),
        ("tools", {"type": "a@b.c"}, {"type": "[email]"}),
        ("tools", {"type": {"description": "a@b.c"}}, {"type": {"description": "[email]"}}),
        ("documents", [{"text": 12345678, "a@b.c": True}], [{"text": "[number]", "[email]": True}]),
        ("messages", {"arguments": '{"q": "\\u0061@b.c", "n": 1}'}, {"arguments": '{"q": "[email]", "n": 1}'}),
        ("messages", {"arguments": {"a@b.c": 12345678}}, {"arguments": {"[email]": "[number]"}}),
        ("messages", {"arguments": "not JSON a@b.c"}, {"arguments": "not JSON [email]"}),
        ("messages", {"role": "user", "type": "text", "content": "x", "n": 5, "arguments": '{"q":1}'}, None),
    ],
)
def test_whatever_may_stand_in_a_prompt_is_filtered(field: str, sent: Any, passed: Any) -> None:
    """Keys, numbers, escapes, and what stands where the format has words of its own."""

    async def every(texts: Sequence[str]) -> list[Passed]:
        return [Passed(re.sub(r"[0-9]{8}", "[number]", text.replace("a@b.c", "[email]"))) for text in texts]

    inputs: Inputs = {field: encode_texts([json.dumps(sent)])[None]}
    found = asyncio.run(prompts.filtered(inputs, [], TOKENIZER, every))
    assert (None if found is None else json.loads(found[field].item())) == passed


def test_arguments_whose_text_says_more_than_their_object() -> None:
    """Of two members of one name, only the last is read, and a template writes both."""

    async def every(texts: Sequence[str]) -> list[Passed]:
        assert all("a@b.c" not in text for text in texts)
        return [Passed(text) for text in texts]

    sent = {"arguments": '{"q": "\\u0061@b.c", "q": 1}'}
    found = asyncio.run(prompts.filtered({"messages": encode_texts([json.dumps(sent)])[None]}, [], TOKENIZER, every))
    assert found is not None
    assert json.loads(found["messages"].item()) == {"arguments": '{"q": 1}'}


def test_two_keys_that_a_rule_makes_one() -> None:
    async def every(texts: Sequence[str]) -> list[Passed]:
        return [Passed(re.sub(r"\w@b", "[email]", text)) for text in texts]

    sent = {"documents": encode_texts([json.dumps([{"c@b": 1, "d@b": 2, "[email] 2": 3}])])[None]}
    found = asyncio.run(prompts.filtered(sent, [], TOKENIZER, every))
    assert found is not None
    assert json.loads(found["documents"].item()) == [{"[email]": 1, "[email] 3": 2, "[email] 2": 3}]


@pytest.mark.parametrize("stream", [False, True])
def test_escapes_in_a_call_hide_nothing(stream: bool) -> None:
    sent = '{"to": "\\u0061@b.de", "c@d.de": ["x", "\\ud83d\\ude00"]}'
    with guarded([EMAIL, SECRET], {"text": "fine", "arguments": sent}) as (service, _, _):
        client = ask(service, stream=stream)
        assert json.loads(_arguments(client)) == {"to": "[email]", "[email]": ["x", "😀"]}
        assert client.ended() == ("stop", [{"rule": "email", "action": "redact", "stage": "output", "count": 2}])
    with guarded([EMAIL, SECRET], {"text": "", "arguments": '{"a": "\\u0078yzzy"}'}) as (service, _, _):
        client = ask(service, stream=stream)
        assert (_arguments(client), client.ended()[0]) == ('{"a": "', "content_filter")


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_that_no_tool_has_is_a_text(stream: bool) -> None:
    with guarded([EMAIL, {**SECRET, "pattern": "f"}], {"text": "", "arguments": "{}"}) as (service, _, _):
        client = ask(service, stream=stream)
        calls = [call for chunk in client.chunks for call in json.loads(chunk.tool_calls or "[]")]
        assert [call["function"] for call in calls] == [{"name": "", "arguments": ""}]
        assert client.ended()[0] == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["guided_json", "guided_decoding_guide_type"])
def test_an_answer_under_a_schema_stays_json(stream: bool, field: str) -> None:
    sent = '{"to": "\\u0061@b.de", "n": 12345678}'
    number = {"name": "number", "action": "redact", "pattern": "[0-9]{8}"}
    asked = {field: encode_texts(["{}" if field == "guided_json" else "json"])[None]}
    with guarded([EMAIL, number], sent) as (service, _, _):
        client = ask(service, stream=stream, **asked)
        assert json.loads(client.text()) == {"to": "[email]", "n": "[number]"}
    with guarded([EMAIL, number], "Hi a@b.de" + sent) as (service, engine, _):  # with the prompt before it
        client = ask(service, "Hi a@b.de", stream=stream, **asked, exclude_input_in_output=np.array([[False]]))
        assert engine.asked[0].prompt == "Hi [email]"
        assert client.text().startswith("Hi [email]")
        assert "1234" not in client.text()


def test_tokens_that_no_rule_changes_stay_what_they_are() -> None:
    """Special tokens of a prompt of tokens are kept, and what lies on both sides of one is found."""
    special = next(iter(TOKENIZER.special_tokens.values()))
    tokens = TOKENIZER.encode
    with guarded([EMAIL, SECRET], "fine") as (service, engine, _):

        def sent(*ids: int, **fields: Any) -> Client:
            client = Client()
            service.submit(service.parse({"input_ids": np.array([ids], np.int32), **fields}), client)
            assert client.done.wait(20)
            return client

        sent(special, *tokens("I am"), special, *tokens(" a@b.de"), special)
        redacted = tokens(" [email]")
        assert engine.asked[-1].prompt_ids == (special, *tokens("I am"), special, *redacted, special)
        assert sent(*tokens("xyz"), special, *tokens("zy")).ended()[0] == "content_filter"
        shown = {"skip_special_tokens": np.array([[False]])}
        assert sent(*tokens("xyz"), special, *tokens("zy"), **shown).ended()[0] == "content_filter"
        sent(*tokens("to a@b"), special, *tokens(".de"))
        assert engine.asked[-1].prompt == "to [email]"
        assert len(engine.asked) == 2


BLANK = {"name": "blank", "action": "redact", "pattern": "b{1,9}", "replacement": " "}
TWO_WORDS = {"name": "two", "action": "block", "pattern": r"open sesame"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_redaction_makes_is_read_again(stream: bool) -> None:
    with guarded([BLANK, TWO_WORDS], "say openbbsesame now") as (service, engine, _):
        client = ask(service, stream=stream)
        assert (client.text(), client.ended()[0]) == ("say ", "content_filter")
        assert ask(service, "openbsesame").ended()[0] == "content_filter"
        assert len(engine.asked) == 1
    named = {"name": "n", "action": "redact", "entities": "tagger", "labels": ["PER"], "replacement": " "}
    with guarded([named, TWO_WORDS], "openAnnasesame", models={"tagger": tagger}) as (service, _, _):
        assert ask(service, stream=stream).ended()[0] == "content_filter"
    # Behind the last reading, what would be redacted is blocked.
    first = {"name": "first", "action": "redact", "pattern": "ab", "replacement": "-"}
    chain = [first, {"name": "second", "action": "redact", "pattern": "x-x", "replacement": "y"}]
    with guarded(chain, "xabx.") as (service, _, _):
        assert ask(service, stream=stream).text() == "y."
    chain += [{"name": "third", "action": "redact", "pattern": "wyw", "replacement": "v"}]
    with guarded(chain, "so wxabxw.") as (service, _, _):
        client = ask(service, stream=stream)
        assert (client.text(), client.ended()[0]) == ("so ", "content_filter")


JOINED = Joint()
CARD = {"name": "card", "action": "redact", "pattern": r"\b\d{4}(?: ?\d{4}){3}\b", "longest": 19}


def _filtered_parts(
    parts: Sequence[Mapping[str, Any]], rules: Sequence[Mapping[str, Any]], joint: Joint = JOINED, **models: Any
) -> tuple[list[str], list[dict[str, Any]]]:
    """The texts of a message's parts behind a guard, and what it told."""
    guard = Guard.from_table("g", {"rules": [dict(rule) for rule in rules]})
    findings = Findings()

    async def asked() -> Inputs | None:
        question = Models(guard, {name: Model(each) for name, each in models.items()}.__getitem__)

        async def every(texts: Sequence[str]) -> list[Passed]:
            return await filter_all(texts, guard.rules, Stage.INPUT, findings, question.about(time.monotonic() + 20))

        messages = [{"role": "user", "content": list(parts)}]
        return await prompts.filtered(
            {"messages": encode_texts([json.dumps(messages)])[None]}, [], TOKENIZER, every, joint
        )

    found = asyncio.run(asked())
    content = parts if found is None else json.loads(found["messages"].item())[0]["content"]
    assert [set(part) for part in content] == [set(part) for part in parts]
    return [part["text"] for part in content if "text" in part], findings.told()


def _texts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("joint", "sent", "left"),
    [
        (Joint(), ["my card is 4111 1111", " 1111 1111, ok?"], ["my card is [card]", ", ok?"]),
        (Joint(), ["4111 ", "1111", " 11", "11 1111", " a@b.de"], ["[card]", "", "", "", " [email]"]),
        (Joint(), ["to a@", "b.de and c@", "d.de"], ["to [email]", " and [email]", ""]),
        (Joint(), ["a@b.de ", "4111 1111 1111 1111"], ["[email] ", "[card]"]),
        (Joint("\n"), ["4111 1111", " 1111 1111"], ["4111 1111", " 1111 1111"]),
        (Joint(" "), ["4111 1111", "1111 1111 ", "x"], ["[card]", " ", "x"]),
        (Joint("", trims=True), ["4111 1111 ", "\n1111 1111\n"], ["[card]", ""]),
        (Joint("", trims=True), ["Hello ", "\nyou\n"], ["Hello ", "\nyou\n"]),
    ],
)
def test_parts_of_a_message_are_one_text(joint: Joint, sent: list[str], left: list[str]) -> None:
    assert _filtered_parts(_texts(*sent), [CARD, EMAIL], joint)[0] == left


@pytest.mark.parametrize(
    ("joint", "parts"),
    [
        (Joint("\n"), ("Anna, open ", "sesameAnna")),  # together without anything between
        (Joint(" - "), ("open", "sesameAnna")),
        (Joint(), ("x", "open sesameAnna")),  # in one part, where together no word begins
    ],
)
def test_a_model_that_redacts_hides_nothing_that_a_pattern_blocks(joint: Joint, parts: tuple[str, str]) -> None:
    """Patterns come first, whatever join of the parts they match."""
    blocked = {"name": "words", "action": "block", "pattern": r"\bopen ?sesameAnna"}
    messages = [{"role": "user", "content": _texts(*parts)}]
    client = Client()
    with guarded([{**NAMES, "stages": ["input"]}, blocked], "well", models={"tagger": tagger}) as (service, engine, _):
        engine.joint = joint
        service.submit(service.parse({"messages": encode_texts([json.dumps(messages)])[None]}), client)
        assert client.done.wait(20)
        assert client.ended() == (
            "content_filter",
            [{"action": "block", "count": 1, "rule": "words", "stage": "input"}],
        )
        assert engine.asked == []


def test_what_lies_in_two_parts_is_told_once_and_found_by_models_too() -> None:
    parts = [*_texts("I am An"), {"type": "image"}, *_texts("na of Bonn. Xyz", "zy")]
    left, told = _filtered_parts(parts, [NAMES, {**SECRET, "action": "annotate"}], tagger=tagger)
    assert left == ["I am [PER]", " of Bonn. Xyz", "zy"]
    assert told == [{"rule": "names", "action": "redact", "stage": "input", "count": 1}]
    with pytest.raises(prompts.Blocked):
        _filtered_parts(_texts("say xy", "zzy"), [SECRET, CARD])


@settings(max_examples=100, deadline=None)
@given(st.text("ab@.x1 ", max_size=40), st.lists(st.integers(0, 40), max_size=4), st.sampled_from(["", "\n", "ab"]))
def test_parts_hold_together_what_their_text_becomes(text: str, places: list[int], between: str) -> None:
    cuts = sorted({min(place, len(text)) for place in places})
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    rules = [
        {**EMAIL, "pattern": r"[ab]@[ab]"},
        {"name": "one", "action": "redact", "pattern": "1x?", "replacement": "-"},
    ]
    left, told = _filtered_parts(_texts(*parts), rules, Joint(between))
    whole, told_of_whole = _filtered_parts(_texts(between.join(parts)), rules)
    assert told == told_of_whole
    assert len(left) == len(parts)
    if between in ("", "\n"):  # no rule reads a line's end, so none redacts it
        assert between.join(left) == whole[0]


def test_models_read_again_what_patterns_redact_behind_them() -> None:
    """A pattern that its own replacement makes match; nothing is asked twice where patterns redact nothing more."""
    inner = {"name": "inner", "action": "redact", "pattern": "-", "replacement": "."}
    outer = {"name": "outer", "action": "redact", "pattern": r"\(\.\)", "replacement": "a"}
    rules = [inner, outer, {**NAMES, "batch": 8}, {**JUDGE, "stages": ["input"]}]

    async def asked(*texts: str) -> tuple[list[str], list[str], list[str]]:
        guard = Guard.from_table("g", {"rules": rules})
        served = {"tagger": Model(tagger), "guardian": Model(guardian)}
        question = Models(guard, served.__getitem__).about(time.monotonic() + 20)
        passed = await filter_all(texts, guard.rules, Stage.INPUT, Findings(), question)
        return [each.text for each in passed], served["tagger"].asked, served["guardian"].asked

    # "(-)" becomes "(.)" and that "a", behind the models: "Ann(-)" is a name only then.
    found, tags, verdicts = asyncio.run(asked("hello", "I am Ann(-)"))
    assert (found, tags, len(verdicts)) == (["hello", "I am [PER]"], ["hello|I am Ann(.)", "I am Anna"], 2)
    found, tags, verdicts = asyncio.run(asked("hello", "I am Anna-"))
    assert (found, tags, len(verdicts)) == (["hello", "I am [PER]."], ["hello|I am Anna."], 1)


def test_models_are_asked_about_many_texts_at_once() -> None:
    """Keys and numbers of a structured request, and the sentences of a text."""
    documents = json.dumps([{"name": "Anna", "year": 2000 + at, "place": "Bonn"} for at in range(10)])
    inputs = {"documents": encode_texts([documents])[None], "text_input": encode_texts(["Anna. Bonn. Is it?"])[None]}
    rules = [{**NAMES, "batch": 8}, {**JUDGE, "stages": ["input"]}]

    async def asked() -> tuple[str, list[str], list[str]]:
        guard = Guard.from_table("g", {"rules": rules})
        served = {"tagger": Model(tagger), "guardian": Model(guardian)}
        question = Models(guard, served.__getitem__).about(time.monotonic() + 20)

        async def every(texts: Sequence[str]) -> list[Passed]:
            return await filter_all(texts, guard.rules, Stage.INPUT, Findings(), question)

        found = await prompts.filtered(inputs, [], TOKENIZER, every)
        assert found is not None
        return found["documents"].item().decode(), served["tagger"].asked, served["guardian"].asked

    found, tags, verdicts = asyncio.run(asked())
    assert json.loads(found)[9] == {"name": "[PER]", "year": 2009, "place": "Bonn"}
    # 3 sentences, 10 numbers and 4 other texts, each once.
    assert [len(each.split("|")) for each in tags] == [8, 8, 1]
    assert tags[0].startswith("Anna. |Bonn. |Is it?|Anna|year|2000|place|Bonn")
    assert len(verdicts) == 1
    assert "[PER]. Bonn. Is it?\\n[PER]\\nyear\\n2000\\n" in verdicts[0]


def test_a_text_of_a_batch_that_a_model_refuses_is_asked_about_alone() -> None:
    def picky(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        if any(text == b"?" for text in tensors["text_input"][:, 0]):
            raise InvalidRequest("text_input[0] holds no token that the model's vocabulary knows")
        return tagger(tensors)

    guard = Guard.from_table("g", {"rules": [{**NAMES, "batch": 8}]})
    served = Model(picky)
    question = Models(guard, lambda name: served).about(time.monotonic() + 20)
    found = asyncio.run(question.spans(guard.rules[0], ["Anna", "?", "x", "Anna"]))
    assert found is not None
    assert [len(each) for each in found] == [1, 0, 0, 1]
    assert served.asked == ["Anna|?|x|Anna", "Anna|?", "Anna", "?", "x|Anna"]


@pytest.mark.parametrize("told", ["by Triton", "at the end"])
def test_what_waits_when_the_model_is_unloaded_fails(told: str) -> None:
    unloading = threading.Event()

    class Stuck(Model):
        async def infer(self, tensors: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
            await asyncio.sleep(3600)
            raise AssertionError

    guard = Guard.from_table("g", {"rules": [NAMES]})
    service = GuardedService(
        Engine([{"text": "x"}]), guard, Models(guard, lambda name: Stuck(tagger)), 2, unloading.is_set
    )
    clients = [Client(), Client()]
    for client in clients:
        service.submit(service.parse({"text_input": encode_texts(["Hi"])[None]}), client)
    while len(service._open) < 2:
        pass
    with pytest.raises(Overloaded, match="2 requests are open already"):
        service.submit(service.parse({"text_input": encode_texts(["Hi"])[None]}), Client())
    if told == "by Triton":  # which calls the end only once they are answered
        unloading.set()
        deadline = time.monotonic() + 10
        while service._open:
            assert time.monotonic() < deadline
    service.stop()
    assert ["unloaded" in str(client.error) for client in clients] == [True, True]
