"""The gateway's endpoints through OpenAI's own library and plain HTTP, against our client's direct answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

from tests.conftest import post
from tests.gateways import Gateway
from tests.integration.test_messages import CALL, TOOL
from trident_client import Client, InvalidRequestError
from trident_serving.launcher.local import LocalServer

PROMPT = "the cat sat on"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}]
ASK: list[Any] = [{"role": "user", "content": "hi"}]
TEXTS = ["a cat", "The dog lay under the tree.", "rain"]
THOUGHTS, SPEECH = "He asks.", "I look."
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def words(gateway_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(gateway_folder / "talk")


def test_a_chat(sdk: openai.OpenAI, direct: Client) -> None:
    answer = sdk.chat.completions.create(model="talk", messages=MESSAGES, max_completion_tokens=12)
    right = direct.chat(MESSAGES, model="talk", max_tokens=12)
    assert answer.choices[0].message.content == right.text != ""
    assert answer.choices[0].finish_reason == right.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (right.num_input_tokens, 12)
    assert answer.usage.total_tokens == right.num_input_tokens + 12
    assert (answer.model, answer.object) == ("talk", "chat.completion")


def test_a_streamed_chat_is_the_same(sdk: openai.OpenAI, direct: Client) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="talk", messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    right = direct.chat(MESSAGES, model="talk", max_tokens=12)
    parts = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == right.text
    assert parts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "length"
    assert all(chunk.usage is None for chunk in parts)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"stop": ["e"]}, {"stop_words": ["e"]}),
        ({"stop": "e", "max_tokens": 30}, {"stop_words": ["e"], "max_tokens": 30}),
        (SAMPLED, {"temperature": 1.2, "top_p": 0.9, "random_seed": 11}),
        ({"seed": -1, "temperature": 1.0}, {"random_seed": 2**64 - 1, "temperature": 1.0}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100}}),
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
        ({"response_format": {"type": "json_object"}}, {"guided_json": {"type": "object"}}),
        (
            {"extra_body": {"top_k": 3, "temperature": 2.0, "seed": 5, "repetition_penalty": 1.3, "min_tokens": 4}},
            {"top_k": 3, "temperature": 2.0, "random_seed": 5, "repetition_penalty": 1.3, "min_tokens": 4},
        ),
        ({"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "medium"}, {}),
    ],
)
def test_fields_mean_what_they_say(
    sdk: openai.OpenAI, direct: Client, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    answer = sdk.chat.completions.create(model="talk", messages=MESSAGES, **({"max_tokens": 12} | asked))
    right = direct.chat(MESSAGES, model="talk", **({"max_tokens": 12} | options))
    assert answer.choices[0].message.content == right.text
    assert answer.choices[0].finish_reason == right.finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(sdk: openai.OpenAI, direct: Client, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "talk", "messages": MESSAGES, "max_tokens": 8, "n": 3, **SAMPLED}
    right = direct.generate_many(MESSAGES, 3, model="talk", max_tokens=8, temperature=1.2, top_p=0.9, random_seed=11)
    texts = ["", "", ""]
    if stream:
        for chunk in sdk.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        for choice in sdk.chat.completions.create(**asked).choices:
            texts[choice.index] = choice.message.content
    assert texts == [each.text for each in right]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(sdk: openai.OpenAI, direct: Client, words: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "talk", "messages": MESSAGES, "max_tokens": 8, "logprobs": True}
    right = direct.chat(MESSAGES, model="talk", max_tokens=8, top_logprobs=3, return_tokens=True)
    found: list[Any] = []
    if stream:
        for chunk in sdk.chat.completions.create(**asked, top_logprobs=3, stream=True):
            for choice in chunk.choices:
                found += choice.logprobs.content if choice.logprobs else []
    else:
        found = sdk.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    assert [entry.logprob for entry in found] == list(right.log_probs)
    assert [bytes(entry.bytes) for entry in found] == list(right.tokens)
    assert b"".join(right.tokens).decode("utf-8", "replace") == right.text
    for entry, token_id, top in zip(found, right.token_ids, right.top_log_probs, strict=True):
        assert [each.logprob for each in entry.top_logprobs] == [value for _, value in top]
        assert [each.token for each in entry.top_logprobs] == [words.decode([token]) for token, _ in top]
        assert entry.token == words.decode([token_id])


class Person(BaseModel):
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=130)
    kind: Literal["a", "b"]


def test_a_schema_of_pydantic(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(model="talk", messages=MESSAGES, max_tokens=100, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_reasoning(sdk: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "chain", "messages": ASK, "tools": [TOOL], "max_tokens": 24}
    if stream:
        with sdk.chat.completions.stream(**asked) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = sdk.chat.completions.create(**asked).choices[0]
    message: Any = choice.message
    assert message.reasoning_content == THOUGHTS
    assert message.content == SPEECH
    assert choice.finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Zürich"})
    again = sdk.chat.completions.create(
        model="chain",
        messages=[*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "18"}],
        max_tokens=24,
    )
    assert again.choices[0].finish_reason == "stop"


def test_only_one_call_and_no_reasoning_where_asked(gateway: Gateway, direct: Client) -> None:
    body = {"model": "chain", "messages": ASK, "tools": [TOOL], "max_tokens": 24}
    _, _, answer = gateway.ask("/v1/chat/completions", body | {"parallel_tool_calls": False})
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    _, _, answer = gateway.ask("/v1/chat/completions", body | {"include_reasoning": False, "tool_choice": "none"})
    right = direct.chat(ASK, model="chain", tools=[TOOL], tool_choice="none", max_tokens=24)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": right.text, "refusal": None}


def test_completions(sdk: openai.OpenAI, direct: Client, words: Any) -> None:
    right = direct.generate(PROMPT, model="talk", max_tokens=16)
    assert sdk.completions.create(model="talk", prompt=PROMPT).choices[0].text == right.text
    ids: list[int] = words(PROMPT).input_ids
    both: list[list[int]] = [ids, words("rain").input_ids]
    answer = sdk.completions.create(model="talk", prompt=both, max_tokens=16, n=2, temperature=1.0, seed=3)
    texts = [
        each.text
        for text in (PROMPT, "rain")
        for each in direct.generate_many(text, 2, model="talk", max_tokens=16, temperature=1.0, random_seed=3)
    ]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, both))
    streamed = ["", ""]
    for chunk in sdk.completions.create(model="talk", prompt=[PROMPT, "rain"], stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [right.text, direct.generate("rain", model="talk", max_tokens=16).text]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_echo_with_log_probabilities(gateway: Gateway, direct: Client, words: Any, stream: bool, tokens: bool) -> None:
    """As lm_eval scores a text."""
    ids: list[int] = words(PROMPT).input_ids
    right = direct.generate(
        PROMPT, model="talk", max_tokens=3, prompt_logprobs=2, top_logprobs=2, return_tokens=True,
        return_prompt_token_ids=True,
    )  # fmt: skip
    body = {"model": "talk", "prompt": ids if tokens else PROMPT, "max_tokens": 3, "echo": True, "logprobs": 2}
    if stream:
        _, _, lines = gateway.ask("/v1/completions", body | {"stream": True})
        chunks = [json.loads(line[6:]) for line in lines.split("\n\n") if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        told = {name: [each for part in parts for each in part[name]] for name in parts[0]}
    else:
        _, _, answer = gateway.ask("/v1/completions", body)
        text, told = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    assert text == PROMPT + right.text
    assert list(right.prompt_token_ids) == ids
    assert told["token_logprobs"] == [None, *right.prompt_log_probs, *right.log_probs]
    assert told["tokens"][: len(ids)] == [words.decode([token]) for token in ids]
    assert told["text_offset"][len(ids)] == len(PROMPT)
    assert told["top_logprobs"][0] is None
    for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert value in top.values()
        assert 2 <= len(top) <= 3


def test_scoring_without_an_answer(gateway: Gateway, direct: Client) -> None:
    body = {"model": "talk", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    _, _, answer = gateway.ask("/v1/completions", body)
    right = direct.generate(PROMPT, model="talk", max_tokens=0, prompt_logprobs=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *right.prompt_log_probs]
    _, _, answer = gateway.ask("/v1/completions", {"model": "talk", "prompt": PROMPT, "max_tokens": 0, "echo": True})
    assert answer["choices"][0]["text"] == PROMPT


def test_responses(sdk: openai.OpenAI, direct: Client) -> None:
    answer = sdk.responses.create(
        model="talk", instructions="Be brief.", input="What is rain?", max_output_tokens=12, store=False
    )
    right = direct.chat(MESSAGES, model="talk", max_tokens=12)
    assert answer.output_text == right.text
    assert (answer.status, answer.usage.output_tokens if answer.usage else 0) == ("incomplete", 12)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    scored = sdk.responses.create(
        model="talk", input=MESSAGES, max_output_tokens=3, include=["message.output_text.logprobs"], top_logprobs=2
    )
    part: Any = scored.output[0].content[0]  # type: ignore[union-attr, index]
    direct_scores = direct.chat(MESSAGES, model="talk", max_tokens=3, top_logprobs=2)
    assert [each.logprob for each in part.logprobs] == list(direct_scores.log_probs)


def test_responses_with_tools(sdk: openai.OpenAI) -> None:
    function = {"type": "function", **TOOL["function"], "strict": False}  # type: ignore[dict-item]
    asked: dict[str, Any] = {"model": "chain", "input": "hi", "tools": [function], "max_output_tokens": 24}
    whole = sdk.responses.create(**asked)
    with sdk.responses.stream(**asked) as events:
        kinds = [event.type for event in events]
        streamed = events.get_final_response()
    for answer in (whole, streamed):
        thought, spoken, call = answer.output
        assert thought.type == "reasoning"
        assert thought.content is not None
        assert thought.content[0].text == THOUGHTS
        assert answer.output_text == SPEECH
        assert spoken.type == "message"
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich"})
        assert answer.status == "completed"
    order = ["response.created", "response.reasoning_text.delta", "response.output_text.delta"]
    order += ["response.function_call_arguments.delta", "response.function_call_arguments.done", "response.completed"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in order] == order
    history = [{"role": "user", "content": "hi"}, *(item.model_dump(exclude_none=True) for item in whole.output)]
    history.append({"type": "function_call_output", "call_id": whole.output[-1].call_id, "output": "18"})  # type: ignore[union-attr]
    again = sdk.responses.create(model="chain", input=history, max_output_tokens=24)
    assert again.status == "completed"


def test_a_schema_of_pydantic_in_responses(sdk: openai.OpenAI) -> None:
    answer = sdk.responses.parse(model="talk", input=MESSAGES, max_output_tokens=100, text_format=Person)
    assert isinstance(answer.output_parsed, Person)


def test_embeddings(sdk: openai.OpenAI, gateway: Gateway, direct: Client, gateway_folder: Path) -> None:
    right = direct.embed(TEXTS, model="embed")
    coded = sdk.embeddings.create(model="embed", input=TEXTS)  # the library asks for base64
    np.testing.assert_array_equal(np.array([each.embedding for each in coded.data], np.float32), right)
    count = sum(map(len, AutoTokenizer.from_pretrained(gateway_folder / "embed")(TEXTS).input_ids))
    assert coded.usage.prompt_tokens == count
    _, _, answer = gateway.ask("/v1/embeddings", {"model": "embed", "input": TEXTS[0], "dimensions": 8})
    short = direct.embed(TEXTS[0], model="embed", dimensions=8)
    np.testing.assert_array_equal(np.array(answer["data"][0]["embedding"], np.float32), short)
    _, _, answer = gateway.ask("/v1/embeddings", {"model": "embed", "input": TEXTS, "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(answer["data"][2]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, right[2])
    cut = direct.embed([LONG_TEXT["input"]], model="embed", truncate=True)
    for length in (96, -1):
        _, _, answer = gateway.ask("/v1/embeddings", LONG_TEXT | {"truncate_prompt_tokens": length})
        np.testing.assert_array_equal(np.array(answer["data"][0]["embedding"], np.float32), cut[0])


def test_rerank(gateway: Gateway, direct: Client) -> None:
    right = direct.rank("rain", TEXTS, model="rank")
    scores = [(each.index, each.score) for each in right]
    assert len({score for _, score in scores}) == 3
    body: dict[str, Any] = {"model": "rank", "query": "rain", "documents": TEXTS}
    _, _, answer = gateway.ask("/v1/rerank", body | {"top_n": 2})
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == scores[:2]
    assert answer["results"][0]["document"] == {"text": TEXTS[scores[0][0]]}
    assert answer["usage"]["total_tokens"] == sum(
        map(len, direct.tokenize(["rain"] * 3, text_pairs=TEXTS, model="rank"))
    )
    objects = [{"text": text} for text in TEXTS]
    _, _, answer = gateway.ask("/v1/rerank", body | {"documents": objects, "return_documents": False})
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == scores
    assert "document" not in answer["results"][0]
    _, _, answer = gateway.ask("/v2/rerank", body)
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == scores
    long = body | {"documents": ["rain " * 200, "cat"]}
    assert gateway.ask("/v2/rerank", long)[0] == 400
    _, _, answer = gateway.ask("/v2/rerank", long | {"max_tokens_per_doc": 50})
    cut = direct.rank("rain", long["documents"], model="rank", truncate=True)
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [
        (each.index, each.score) for each in cut
    ]
    _, _, answer = gateway.ask("/rerank", {"query": "rain", "texts": TEXTS, "return_text": True})
    assert [(each["index"], each["score"]) for each in answer] == scores
    assert answer[0]["text"] == TEXTS[scores[0][0]]


def test_scores(gateway: Gateway, direct: Client) -> None:
    right = {each.index: each.score for each in direct.rank("rain", TEXTS, model="rank")}
    _, _, answer = gateway.ask("/v1/score", {"model": "rank", "text_1": "rain", "text_2": TEXTS})
    assert [each["score"] for each in answer["data"]] == [right[index] for index in range(3)]
    pairs = {"model": "rank", "text_1": ["rain", "cat", "rain"], "text_2": TEXTS}
    _, _, answer = gateway.ask("/v1/score", pairs)
    middle = direct.rank("cat", [TEXTS[1]], model="rank")[0].score
    assert [each["score"] for each in answer["data"]] == pytest.approx([right[0], middle, right[2]], abs=1e-6)
    _, _, answer = gateway.ask("/v1/score", {"model": "embed", "text_1": TEXTS[0], "text_2": TEXTS})
    vectors = direct.embed(TEXTS, model="embed")
    np.testing.assert_allclose([each["score"] for each in answer["data"]], vectors @ vectors[0], atol=1e-6)


def test_classes(gateway: Gateway, direct: Client) -> None:
    right = [
        [(each.label, each.score) for each in classes] for classes in direct.classify(TEXTS, model="classify", top_k=3)
    ]
    _, _, answer = gateway.ask("/v1/classify", {"model": "classify", "input": TEXTS})
    told = [[(each["label"], each["score"]) for each in entry["predictions"]] for entry in answer["data"]]
    assert told == right
    assert [entry["label"] for entry in answer["data"]] == [classes[0][0] for classes in right]
    # As vLLM's: in the order of the model's config.
    by_class = [[dict(classes)[f"LABEL_{row}"] for row in range(3)] for classes in right]
    assert [(entry["probs"], entry["num_classes"]) for entry in answer["data"]] == [(probs, 3) for probs in by_class]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, direct.tokenize(TEXTS, model="classify")))
    _, _, answer = gateway.ask("/predict", {"inputs": TEXTS[0]})
    assert [(each["label"], each["score"]) for each in answer] == right[0]
    _, _, answer = gateway.ask("/predict", {"inputs": TEXTS[0], "parameters": {"top_k": 1}})
    assert [(each["label"], each["score"]) for each in answer] == right[0][:1]
    _, _, answer = gateway.ask("/predict", {"inputs": [[text] for text in TEXTS]})
    assert [[(each["label"], each["score"]) for each in classes] for classes in answer] == right
    _, _, answer = gateway.ask("/predict", {"inputs": [TEXTS[0], TEXTS[1]]})  # a pair
    pair = direct.classify(TEXTS[0], text_pairs=TEXTS[1], model="classify", top_k=3)
    assert [(each["label"], each["score"]) for each in answer] == [(each.label, each.score) for each in pair]


def test_tei_embeds(gateway: Gateway, direct: Client) -> None:
    _, _, answer = gateway.ask("/embed", {"inputs": TEXTS})
    np.testing.assert_array_equal(np.array(answer, np.float32), direct.embed(TEXTS, model="embed"))
    _, _, answer = gateway.ask("/embed", {"inputs": TEXTS[0], "truncate": True})
    np.testing.assert_array_equal(np.array(answer, np.float32), direct.embed(TEXTS[:1], model="embed"))


def test_tokens(gateway: Gateway, words: Any, gateway_folder: Path) -> None:
    text = "The cat 😀 sat"
    ids = words(text).input_ids
    _, _, answer = gateway.ask("/tokenize", {"model": "talk", "prompt": text, "return_token_strs": True})
    assert answer["tokens"] == ids
    assert (answer["count"], answer["max_model_len"]) == (len(ids), 2048)
    assert answer["token_strs"] == [words.decode([token]) for token in ids]
    _, _, answer = gateway.ask("/detokenize", {"model": "talk", "tokens": ids})
    assert answer == {"prompt": text}
    rendered = words.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True).input_ids
    _, _, answer = gateway.ask("/tokenize", {"model": "talk", "messages": MESSAGES})
    assert answer["tokens"] == rendered
    _, _, answer = gateway.ask("/tokenize", {"model": "embed", "prompt": "a cat"})
    assert answer["tokens"] == AutoTokenizer.from_pretrained(gateway_folder / "embed")("a cat").input_ids


def test_adapters(sdk: openai.OpenAI, gateway: Gateway, direct: Client) -> None:
    right = direct.chat(MESSAGES, model="talk", lora_name="other", max_tokens=12).text
    assert right != direct.chat(MESSAGES, model="talk", max_tokens=12).text
    answer = sdk.chat.completions.create(model="talk:other", messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content == right
    assert sdk.responses.create(model="talk:other", input=MESSAGES, max_output_tokens=12).output_text == right
    body = {"model": "talk:other", "messages": MESSAGES, "options": {"num_predict": 12}, "stream": False}
    assert gateway.ask("/api/chat", body)[2]["message"]["content"] == right
    plain = direct.generate(PROMPT, model="talk", lora_name="other", max_tokens=16).text
    assert sdk.completions.create(model="talk:other", prompt=PROMPT).choices[0].text == plain
    with pytest.raises(openai.NotFoundError, match="the model 'talk:third' does not exist"):
        sdk.completions.create(model="talk:third", prompt=PROMPT)


def test_models(sdk: openai.OpenAI) -> None:
    names = ["chain", "classify", "embed", "rank", "tag", "talk", "translate", "talk:other"]
    assert [model.id for model in sdk.models.list()] == names
    assert sdk.models.retrieve("talk").owned_by == "trident"
    with pytest.raises(openai.NotFoundError, match="the model 'talk_tokenizer' does not exist"):
        sdk.models.retrieve("talk_tokenizer")


@pytest.mark.parametrize("stream", [False, True])
def test_ollama(gateway: Gateway, direct: Client, stream: bool) -> None:
    def ask(path: str, **body: Any) -> tuple[str, str, list[Any], dict[str, Any]]:
        status, _, answer = gateway.ask(path, {"model": "chain:latest", **body, "stream": stream})
        assert status == 200, answer
        lines = [json.loads(line) for line in answer.splitlines()] if stream else [answer]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        parts = [line.get("message", line) for line in lines]
        text = "".join(part.get("content", part.get("response", "")) for part in parts)
        thinking = "".join(part.get("thinking", "") for part in parts)
        return text, thinking, [call for part in parts for call in part.get("tool_calls", [])], lines[-1]

    text, thinking, tool_calls, last = ask("/api/chat", messages=ASK, tools=[TOOL])
    assert (text, thinking) == (SPEECH, THOUGHTS)
    assert tool_calls == [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}]
    assert last["done_reason"] == "stop"
    options = {"num_predict": 10, "temperature": 1.0, "seed": 4, "top_k": 20, "num_ctx": 4096}
    text, *_, last = ask("/api/generate", model="talk", prompt=PROMPT, raw=True, options=options)
    right = direct.generate(PROMPT, model="talk", max_tokens=10, temperature=1.0, random_seed=4, top_k=20)
    assert text == right.text
    assert (last["eval_count"], last["done_reason"]) == (10, "length")
    text, *_ = ask("/api/generate", model="talk", prompt="What is rain?", system="Be brief.", options=options)
    right = direct.chat(MESSAGES, model="talk", max_tokens=10, temperature=1.0, random_seed=4, top_k=20)
    assert text == right.text


@pytest.mark.parametrize(("keep", "reason"), [(None, "load"), (0, "unload"), ("5m", "load")])
def test_ollama_s_clients_load_a_model_by_asking_nothing(gateway: Gateway, keep: Any, reason: str) -> None:
    given = {"model": "talk"} | ({} if keep is None else {"keep_alive": keep})
    status, _, chat = gateway.ask("/api/chat", given | {"messages": []})
    assert (status, chat["message"]) == (200, {"role": "assistant", "content": ""})
    status, _, generated = gateway.ask("/api/generate", given)
    assert (status, generated["response"]) == (200, "")
    assert [(each["done"], each["done_reason"]) for each in (chat, generated)] == [(True, reason)] * 2
    assert gateway.ask("/api/generate", {"model": "nothing"})[0] == 404


def test_ollama_s_other_endpoints(gateway: Gateway, direct: Client) -> None:
    _, _, answer = gateway.ask("/api/tags")
    assert [model["name"] for model in answer["models"]][-2:] == ["talk:latest", "translate:latest"]
    _, _, answer = gateway.ask("/api/version")
    assert answer["version"]
    _, _, answer = gateway.ask("/api/embed", {"model": "embed", "input": TEXTS})
    np.testing.assert_array_equal(np.array(answer["embeddings"], np.float32), direct.embed(TEXTS, model="embed"))
    status, _, answer = gateway.ask("/api/chat", {"model": "chain", "messages": ASK, "options": {"mirostat": 1}})
    assert (status, answer) == (400, {"error": "options.mirostat is not known here"})


CHAT: dict[str, Any] = {"model": "talk", "messages": MESSAGES, "max_tokens": 4}
LONG_TEXT: dict[str, Any] = {"model": "embed", "input": "word " * 200}
RESPONSE: dict[str, Any] = {"model": "talk", "input": "a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "message"),
    [
        ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, 404, "model_not_found", "model", "gpt-9"),
        ("/v1/chat/completions", CHAT | {"model": "embed"}, 400, "model_not_suitable", "model", "feature-extraction"),
        ("/v1/chat/completions", {"messages": MESSAGES}, 400, "missing_required_parameter", "model", "model"),
        ("/v1/chat/completions", CHAT | {"temperatur": 1}, 400, "unknown_parameter", "temperatur", "not known"),
        ("/v1/chat/completions", CHAT | {"temperature": "hot"}, 400, "invalid_value", "temperature", "number"),
        ("/v1/chat/completions", CHAT | {"temperature": 101}, 400, None, "temperature", "between 0 and 100"),
        ("/v1/chat/completions", CHAT | {"messages": []}, 400, None, "messages", "empty"),
        ("/v1/chat/completions", CHAT | {"functions": []}, 400, "unknown_parameter", "functions", "not known"),
        ("/v1/chat/completions", CHAT | {"n": 33}, 400, None, "n", "between 1 and 32"),
        ("/v1/chat/completions", CHAT | {"n": 0}, 400, None, "n", "at least 1"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, None, "top_logprobs", "needs logprobs"),
        ("/v1/chat/completions", CHAT | {"modalities": ["audio"]}, 400, None, "modalities", "text"),
        ("/v1/chat/completions", CHAT | {"stream_options": {}}, 400, None, "stream_options", "stream true"),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 5}, 400, None, "max_completion_tokens", "differ"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 2**40}, 400, None, None, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 5000}, 400, "context_length_exceeded", "max_tokens", "room"),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]},
            400,
            "context_length_exceeded",
            "messages",
            "context",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            None,
            None,
            "messages[0].content[0] is an image, and this model reads no images",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
            400,
            None,
            "response_format",
            "response_format is refused: Invalid type",
        ),
        (
            "/v1/chat/completions",
            {"model": "talk", "messages": MESSAGES, "max_completion_tokens": -1},
            400,
            None,
            "max_completion_tokens",
            "max_completion_tokens must be at least 0",
        ),
        ("/v1/chat/completions", CHAT | {"x" * 5000: 1}, 400, "unknown_parameter", "x" * 160, "not known"),
        (
            "/v1/responses",
            RESPONSE | {"max_output_tokens": -1},
            400,
            None,
            "max_output_tokens",
            "max_output_tokens must be at least 0",
        ),
        ("/v1/completions", {"model": "talk", "prompt": ""}, 400, None, "prompt", "empty"),
        ("/v1/completions", {"model": "talk", "prompt": [[]]}, 400, None, "prompt", "empty"),
        ("/v1/completions", {"model": "talk", "prompt": [99999]}, 400, None, "prompt", "99999"),
        ("/v1/completions", {"model": "talk", "prompt": "a", "suffix": "b"}, 400, None, "suffix", "suffix"),
        ("/v1/completions", {"model": "talk", "prompt": "a", "best_of": 3}, 400, None, "best_of", "best_of"),
        ("/v1/embeddings", {"model": "embed", "input": []}, 400, None, "input", "empty"),
        ("/v1/embeddings", {"model": "embed", "input": [1, 2]}, 400, None, "input", "token ids"),
        ("/v1/embeddings", {"model": "embed", "input": "a", "dimensions": 7}, 400, None, "dimensions", "7"),
        (
            "/v1/embeddings",
            {"model": "embed", "input": "a", "truncate_prompt_tokens": 50},
            *(400, None, "truncate_prompt_tokens", "must be 96, at which the model cuts, or -1, found 50"),
        ),
        ("/v1/embeddings", LONG_TEXT, 400, "context_length_exceeded", "input", "maximum context length is 96"),
        ("/v1/rerank", {"model": "rank", "query": "a", "documents": ["b"], "top_n": 0}, 400, None, "top_n", "top_n"),
        ("/v1/responses", RESPONSE | {"conversation": "r"}, 400, "invalid_value", "conversation", "None"),
        ("/v1/responses", RESPONSE | {"input": [{"type": "item_reference"}]}, 400, None, "input", "item_reference"),
        ("/tokenize", {"model": "talk"}, 400, None, "prompt", "exactly one"),
        ("/v1/nothing", {}, 404, None, None, "no such endpoint"),
    ],
)  # fmt: skip
def test_refusals(
    gateway: Gateway, path: str, body: Any, status: int, code: str | None, param: str | None, message: str
) -> None:
    found, headers, answer = gateway.ask(path, body)
    assert found == status, answer
    assert answer["error"]["code"] == code
    assert param is None or answer["error"]["param"] == param
    assert message in answer["error"]["message"]
    assert headers["x-request-id"].startswith("req-")


NO_IMAGES = (
    "reads no images: leave them out, or ask a vision-language model (SmolVLM, Idefics3, Qwen2-VL or Qwen2.5-VL) whose "
    "table sets limits.images"
)


def test_an_image_for_a_model_of_texts(gateway: Gateway, gateway_server: LocalServer) -> None:
    image = base64.b64encode(b"\x89PNG").decode()
    url = f"data:image/png;base64,{image}"
    part = {"type": "image_url", "image_url": {"url": url}}
    said = f"messages[0].content[0] is an image, and this model {NO_IMAGES}"
    asked = {"model": "talk", "messages": [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]}
    for body in (asked, asked | {"stream": True}):
        status, _, answer = gateway.ask("/v1/chat/completions", body)
        error = {"message": said, "type": "invalid_request_error", "param": "messages", "code": None}
        assert (status, answer) == (400, {"error": error})
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    status, _, answer = gateway.ask("/v1/responses", {"model": "talk", "input": items})
    assert (status, answer["error"]["message"], answer["error"]["param"]) == (400, said, "input")
    told = {"model": "talk", "messages": [{"role": "user", "content": "hi", "images": [image]}]}
    assert gateway.ask("/api/chat", told)[::2] == (400, {"error": said})
    assert gateway.ask("/api/generate", {"model": "talk", "prompt": "hi", "images": [image]})[::2] == (
        400,
        {"error": said},
    )

    # Beside a text or messages, the files are an input, which the model has not.
    def refused(client: Client, call: str, **more: Any) -> str:
        with pytest.raises(InvalidRequestError) as error:
            list(getattr(client, call)("hi", model="talk", **more))
        return str(error.value)

    for address, name in ((gateway_server.grpc_url, "the model 'talk'"), (gateway_server.http_url, "this model")):
        with Client(address, timeout=60) as client:
            for images in ([b"\x89PNG"], [b"\x89PNG", b"\x89PNG"]):
                for call in ("generate", "chat", "stream"):
                    assert refused(client, call, images=images) == f"{name} {NO_IMAGES}"
    status, text = post(f"{gateway_server.http_url}/v2/models/talk/generate", {"text_input": "hi", "images": url})
    assert (status, json.loads(text)["error"]) == (400, f"INVALID_ARGUMENT: this model {NO_IMAGES}")


def test_the_forms_of_errors(gateway: Gateway) -> None:
    _, _, answer = gateway.ask("/embed", {"inputs": []})
    assert answer == {"error": "inputs is empty: give at least one text", "error_type": "validation"}
    _, _, answer = gateway.ask("/api/generate", {"model": "talk", "prompt": "a", "options": {"repeat_penalty": -1}})
    assert answer["error"].startswith("repeat_penalty must be ")
    _, _, answer = gateway.ask("/v2/rerank", {"model": "rank", "query": "a", "documents": []})
    assert answer == {"message": "documents is empty: give at least one text"}
    status, _, answer = gateway.ask("/v1/chat/completions")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    assert CALL["type"] == "function"
