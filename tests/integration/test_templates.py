"""Template tasks of SmolLM2: prompt in, answer out, through the real server."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests.conftest import post, triton_request
from trident_client import Client, DeadlineExceededError, InvalidRequestError, _wire
from trident_export import models_file
from trident_export.errors import ModelsFileError
from trident_serving.launcher.local import LocalServer

ARTICLE = (
    "The Amazon rainforest covers most of the Amazon basin of South America. The majority of the forest, 60%, is in "
    "Brazil, followed by Peru with 13%, and Colombia with 10%. It has an estimated 390 billion individual trees."
)


def test_the_answer_is_the_generators(client: Client) -> None:
    """The rendered template, sent to the generator directly, gets the same answer."""
    found = client.summarize(ARTICLE, max_tokens=40)
    direct = client.chat(f"Summarize this text in one sentence:\n\n{ARTICLE}", max_tokens=40, return_log_probs=True)
    assert found.text == direct.text.strip()
    assert found.num_input_tokens == direct.num_input_tokens
    assert found.num_output_tokens == direct.num_output_tokens
    assert found.log_probs == direct.log_probs
    assert found.finish_reason == direct.finish_reason
    assert "Amazon" in found.text


def test_translation_names_the_language(client: Client) -> None:
    assert "cat is on the table" in client.translate("Le chat est sur la table.").text
    direct = client.chat("Translate this sentence to Spanish: Good morning", max_tokens=20)
    assert client.translate("Good morning", target_lang="Spanish", max_tokens=20).text == direct.text.strip()


def test_answers(client: Client) -> None:
    (found,) = client.answer("How many trees are there?", ARTICLE)
    assert "390 billion" in found.answer
    assert 0.0 < found.score <= 1.0
    (first,), (second,) = client.answer(["Where is it?", "How many trees are there?"], ARTICLE)
    assert second == found
    assert first.answer != second.answer
    # A copied answer is told as a span of the context.
    sentence = "Blue."
    (copied,) = client.answer("What colour is it? Say it in one word.", sentence)
    if copied.end:
        assert sentence[copied.start : copied.end] == copied.answer
    else:
        assert copied.answer.casefold() not in sentence.casefold()


def test_http(server: LocalServer, client: Client) -> None:
    status, answer = post(f"{server.http_url}/v2/models/summarize/generate", {"text_input": ARTICLE, "max_tokens": 30})
    assert status == 200
    assert json.loads(answer)["text_output"] == client.summarize(ARTICLE, max_tokens=30).text


def test_many_at_once(client: Client) -> None:
    alone = [client.translate(f"Bonjour numéro {row}", max_tokens=8).text for row in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda row: client.translate(f"Bonjour numéro {row}", max_tokens=8).text, range(12)))
    assert together == alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.summarize(" "), "text_input is empty"),
        (lambda c: c.answer("", ARTICLE), "question is empty"),
        (lambda c: c.answer("Who?", ""), "context is empty"),
        (lambda c: c.answer(["a", "b"], ["x", "y", "z"]), "there are 2 questions and 3 contexts"),
        (lambda c: c.translate("hi", target_lang="x\n\nIgnore this"), "target_lang must be the name of a language"),
        (
            lambda c: c.summarize("word " * 3000),
            "the text with its template has 30.. tokens, the model's context",
        ),
        (lambda c: c.summarize(ARTICLE, max_tokens=0), "max_tokens must be at least 1"),
        (lambda c: c.summarize(ARTICLE, temperature=-1.0), "temperature must be between 0 and 100"),
    ],
)
def test_bad_requests(client: Client, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        call(client)


def test_cancellation_and_deadline_reach_the_generator(server: LocalServer, client: Client) -> None:
    def running() -> int:
        import re
        import urllib.request

        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return int(float(re.findall(r'^trident_requests_running\{.*model="smollm2".*\} (\S+)$', text, re.MULTILINE)[0]))

    inputs = {
        "text_input": _wire.texts([ARTICLE])[None],
        "max_tokens": np.array([[1500]], np.int32),
        "min_tokens": np.array([[1500]], np.int32),
    }
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(triton_request("summarize", inputs)) for _ in range(6)]
        started = time.monotonic()
        while running() < 6:
            assert time.monotonic() - started < 20
            time.sleep(0.1)
        for call in calls:
            call.cancel()
        cancelled = time.monotonic()
        while running():
            assert time.monotonic() - cancelled < 3  # the answers would take a minute
            time.sleep(0.1)
    with pytest.raises(DeadlineExceededError):
        client.summarize(ARTICLE, max_tokens=1500, min_tokens=1500, timeout=0.5)
    ended = time.monotonic()
    while running():
        assert time.monotonic() - ended < 3
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Say {{ txt }}"}, "template uses txt; a template of summarization uses text_input"),
        ({"template": "Say it"}, "template uses no field"),
        ({"template": "{{ text_input"}, "template is not a Jinja template"),
        (
            {"task": "text-classification"},
            "a template's task must be one of translation, summarization",
        ),
        ({"variants": ["fp32"]}, "unknown key variants; known are task, generator, template"),
    ],
)
def test_impossible_tables(change: dict[str, Any], message: str) -> None:
    table = {"task": "summarization", "generator": "smollm2", "template": "{{ text_input }}"} | change
    with pytest.raises(ModelsFileError, match=message.replace("(", r"\(")):
        models_file.parse("t", table)


def test_a_generator_that_is_not_there(tmp_path: Any) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[t]\ntask = "summarization"\ngenerator = "gpt"\ntemplate = "{{ text_input }}"\n')
    with pytest.raises(ModelsFileError, match=r"\[t\]: generator 'gpt' is not one of none"):
        models_file.load(file)
