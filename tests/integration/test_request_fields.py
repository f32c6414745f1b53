"""What clients of TensorRT-LLM, OpenAI and Hugging Face send, on a real server, against `generate` of the folder."""

from __future__ import annotations

import json
import queue
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_models
from tests.conftest import post, triton_request
from tests.integration.test_bad_requests import raw_stream
from trident_client import Client, DeadlineExceededError, InvalidRequestError, _generation, _wire
from trident_export import install, models_file
from trident_serving.errors import DeadlineExceeded, InvalidRequest
from trident_serving.generation.service import GenerationService
from trident_serving.generation.stream import Chunk
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer
from trident_serving.runtime.sampling.grammars import Grammar, GrammarKind, Grammars
from trident_serving.schema.limits import GenerationLimits

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "the cat sat on"
TURN = "<|turn|>"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 7, "top_p": 0.9}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answer to the prompt has a special token in its middle, and no end within 24 tokens."""
    path = tmp_path_factory.mktemp("fields") / "m"
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = CHAT
    config = tiny_models.causal_config("llama", 128)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        plain = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        head = model.get_output_embeddings().weight
        head[tokenizer.convert_tokens_to_ids(TURN)] = 1.05 * head[plain[5]]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, a task in front of it, and the same graph with a generation config that samples."""
    root = tmp_path_factory.mktemp("fields-server")
    template = 'template = "To {{ target_lang }}: {{ text_input }}"\ntarget_lang = "English"\n'
    entries = {
        "m": tiny_models.causal_entry(folder, slots=8, max_waiting=4),
        "tr": f'task = "translation"\ngenerator = "m"\n{template}',
    }
    (root / "models.toml").write_text(tiny_models.models_toml(entries))
    install.export(models_file.load(root / "models.toml"), root / "repository", root, root / "cache", lambda line: None)
    sampling = root / "repository" / "sampling"
    shutil.copytree(root / "repository" / "m", sampling)
    for file in (sampling / "config.pbtxt", sampling / "1" / "trident.json"):
        file.write_text(file.read_text().replace('"m"', '"sampling"'))
    config = json.loads((sampling / "1" / "generation_config.json").read_text())
    (sampling / "1" / "generation_config.json").write_text(json.dumps(config | SAMPLED))
    return root / "repository"


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[LocalServer]:
    running = local.start(repository, repository.parent / "log")
    yield running
    running.stop()


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected


def generated(model: Any, ids: list[int], **options: Any) -> list[int]:
    """Hugging Face's greedy answer."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    with torch.inference_mode():
        found: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": "", "stop_words": ""},
        {"bad_words": [""], "stop_words": [""]},
        {"parameters": {"bad_words": [""], "stop_words": [""]}},
        {"pad_id": 511, "end_id": -1},
        {"beam_width": 1, "length_penalty": 1.0, "len_penalty": 1.0, "early_stopping": False},
        {"min_length": 1, "seed": 1},
        {"top_p": 0.0, "top_k": 1},
        {"return_context_logits": False, "return_generation_logits": False, "num_return_sequences": 1},
        {"return_num_input_tokens": True, "return_num_output_tokens": True},
    ],
)
def test_names_of_tensorrt_llm(server: LocalServer, fields: dict[str, Any]) -> None:
    url = f"{server.http_url}/v2/models/m/generate"
    plain = post(url, {"text_input": PROMPT, "max_tokens": 20})
    assert plain[0] == 200
    status, text = post(url, {"text_input": PROMPT, "max_tokens": 20} | fields)
    assert (status, json.loads(text)) == (200, json.loads(plain[1]))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"max_tokens": 0},
            "max_tokens must be at least 1, found 0; 0 is for requests with prompt_logprobs or return_pr",
        ),
        ({"beam_width": 4}, "beam_width must be 1, found 4: generators do not search with beams; n asks for"),
        ({"return_context_logits": True}, "return_context_logits must be false, found true: logits are not returned"),
        ({"seed": 1, "random_seed": 1}, "seed is another name of random_seed: give one of them"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids holds 65 tokens, the limit is 64"),
        ({"stop_token_ids": [5000]}, "stop_token_ids names the token 5000, the model has"),
        ({"end_id": 5000}, "stop_token_ids names the token 5000"),
        ({"stop_words": ["x"] * 10_000}, "stop_words holds 10000 texts, the limit is 32"),
        ({"logit_bias": "[1]"}, "logit_bias must be a JSON object"),
        ({"logit_bias": '{"99999": 1}'}, "logit_bias names the token 99999, the model has"),
        ({"logit_bias": '{"-1": 1}'}, "logit_bias must name tokens by their ids, found '-1'"),
        ({"logit_bias": '{"1": 1e9}'}, "logit_bias must hold numbers between -100 and 100"),
        ({"logit_bias": '{"1": NaN}'}, "logit_bias must hold numbers between -100 and 100, found nan"),
        ({"n": 33}, "n must be between 1 and 32, found 33"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1, found 0"),
        ({"guided_json": "{}", "guided_regex": "a"}, "give one of guided_json and guided_regex"),
        ({"guided_json": "{"}, "guided_json is not JSON"),
        ({"guided_json": '{"type": "nothing"}'}, "guided_json is refused"),
        ({"guided_json": '{"$ref": "#"}'}, "guided_json"),
        ({"guided_json": '{"const": NaN}'}, "guided_json is not JSON: Out of range float values are not JSON"),
        ({"guided_json": '{"const": 1e400}'}, "guided_json is not JSON: Out of range float values are not JSON"),
        ({"guided_json": '{"multipleOf": 99.9983}'}, "its multipleOf have 999983 remainders, the limit is 50000"),
        ({"guided_json": '{"multipleOf": 997, "anyOf": [{"multipleOf": 1009}]}'}, "have 1005973 remainders"),
        ({"guided_grammar": 'start: %json {"multipleOf": 999983}'}, "have 999983 remainders, the limit is 50000"),
        ({"guided_json": '{"type": "string", "pattern": "(("}'}, "guided_json is refused: regex parse error: unclosed"),
        ({"guided_regex": "(("}, '"((" (in regex): regex parse error: unclosed group'),
        ({"guided_regex": "(" * 900}, "regex parse error: unclosed group"),
        ({"guided_regex": "a?" * 15_000}, "guided_regex is refused: initial lexer configuration (grammar) too big"),
        ({"guided_regex": r"[^\s\S]"}, "guided_regex admits no text"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar is refused"),
        ({"guided_choice": ["", ""]}, "guided_choice must be a list of texts that are not empty"),
        ({"guided_json": json.dumps({"enum": ["x" * 40_000]})}, "guided_json has more than 32768 bytes"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide_type 'regex' needs guided_decoding_guide"),
        ({"guided_decoding_guide_type": "poem"}, "guided_decoding_guide_type must be one of json, json_schema"),
    ],
)
def test_refused_by_name(server: LocalServer, client: Client, fields: dict[str, Any], sentence: str) -> None:
    """A neighbour's answer is what it is without them."""
    alone = client.generate(PROMPT, model="m", max_tokens=40).text
    stream = client.stream(PROMPT, model="m", max_tokens=40)
    text = next(stream).text
    status, found = post(f"{server.http_url}/v2/models/m/generate", {"text_input": PROMPT, "max_tokens": 4} | fields)
    assert (status, sentence in json.loads(found)["error"]) == (400, True), found
    assert text + "".join(chunk.text for chunk in stream) == alone


@pytest.mark.parametrize("options", [{"stop_words": [TURN]}, {"stop_token_ids": "turn"}, {"end_id": "turn"}])
def test_special_tokens_stop(client: Client, server: LocalServer, model: Any, tokenizer: Any, options: Any) -> None:
    turn = tokenizer.convert_tokens_to_ids(TURN)
    ids = tokenizer(PROMPT).input_ids
    right = generated(model, ids, eos_token_id=[model.generation_config.eos_token_id, turn])
    assert right[-1] == turn
    fields = {name: value if name == "stop_words" else turn for name, value in options.items()}
    _, text = post(f"{server.http_url}/v2/models/m/generate", {"text_input": PROMPT, "max_tokens": 24} | fields)
    found = json.loads(text)
    assert found["finish_reason"] == "stop"
    assert found["num_output_tokens"] == len(right)
    assert found["text_output"] == tokenizer.decode(right, skip_special_tokens=True)


def test_special_tokens_are_shown_on_request(client: Client, model: Any, tokenizer: Any) -> None:
    right = generated(model, tokenizer(PROMPT).input_ids)
    found = client.generate(PROMPT, model="m", max_tokens=24, skip_special_tokens=False)
    assert found.text == tokenizer.decode(right)
    assert TURN in found.text


def test_stop_words_count_from_min_tokens_on(client: Client, tokenizer: Any) -> None:
    whole = client.generate(PROMPT, model="m", max_tokens=40, min_tokens=12)
    early = client.generate(PROMPT, model="m", max_tokens=3).text[-1:]
    found = client.generate(PROMPT, model="m", max_tokens=40, min_tokens=12, stop_words=[early])
    assert found.num_output_tokens >= 12
    assert whole.text.startswith(found.text)
    assert early in found.text


def test_bad_words_and_bias(client: Client, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    plain = generated(model, ids)
    word = next(text for token in plain if (text := tokenizer.decode([token])).isalpha())
    banned = [tokenizer(word, add_special_tokens=False).input_ids]
    spaced = tokenizer(f" {word}", add_special_tokens=False).input_ids
    banned += [spaced] if len(spaced) == len(banned[0]) else []
    right = generated(model, ids, bad_words_ids=banned)
    assert right != plain
    found = client.generate(PROMPT, model="m", max_tokens=24, bad_words=[word, ""])
    assert found.text == tokenizer.decode(right, skip_special_tokens=True)
    bias = {plain[0]: -20.0, plain[3]: -3.5, 7: 2.0}
    right = generated(model, ids, sequence_bias=[[[token], value] for token, value in bias.items()])
    assert right != plain
    found = client.generate(PROMPT, model="m", max_tokens=24, logit_bias=bias)
    assert found.text == tokenizer.decode(right, skip_special_tokens=True)


def test_end_tokens_can_be_ignored(client: Client, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    right = generated(model, ids, max_new_tokens=100, eos_token_id=None)
    found = client.generate(PROMPT, model="m", max_tokens=100, ignore_eos=True)
    assert (found.finish_reason, found.num_output_tokens) == ("length", 100)
    assert found.text == tokenizer.decode(right, skip_special_tokens=True)


def test_several_answers(client: Client, server: LocalServer) -> None:
    options: dict[str, Any] = {"model": "m", "max_tokens": 24}
    one = client.generate(PROMPT, return_log_probs=True, **options)
    three = [replace(one, index=index) for index in range(3)]
    assert client.generate_many(PROMPT, 3, return_log_probs=True, **options) == three
    sampled = {"temperature": 1.5, "top_logprobs": 2, "min_tokens": 3}
    alone = [
        replace(client.generate(PROMPT, random_seed=40 + index, **sampled, **options), index=index)
        for index in range(10)
    ]
    assert len({each.text for each in alone}) == 10
    assert client.generate_many(PROMPT, 10, random_seed=40, **sampled, **options) == alone  # more than there are slots
    _, text = post(f"{server.http_url}/v2/models/m/generate", {"text_input": PROMPT, "max_tokens": 4, "n": 3})
    assert json.loads(text)["index"] == [0, 1, 2]
    prompt = "a longer prompt that is computed once, " * 2  # 80 tokens or so in chunks of 16
    before = hits(server)
    many = client.generate_many(prompt, 4, **options)
    until = time.monotonic() + 10  # metrics are published now and then
    while hits(server) - before <= 3 * 0.9 * many[0].num_input_tokens:
        assert time.monotonic() < until
        time.sleep(0.05)


def hits(server: LocalServer) -> float:
    """Tokens of prompts that were not computed again."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("trident_prefix_hit") and '="m"' in line)


def test_several_answers_are_streamed_with_their_index(server: LocalServer, client: Client) -> None:
    expected = [client.generate(PROMPT, model="m", max_tokens=24, temperature=1.5, random_seed=s).text for s in (5, 6)]
    status, text = post(
        f"{server.http_url}/v2/models/m/generate_stream",
        {"text_input": PROMPT, "max_tokens": 24, "temperature": 1.5, "random_seed": 5, "n": 2, "stream": True},
    )
    chunks = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line]
    assert status == 200
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text_output"] for chunk in own) == expected[index]
        assert [bool(chunk["finish_reason"]) for chunk in own] == [False] * (len(own) - 1) + [True]


def test_counts_of_chunks(server: LocalServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True}
    counts: list[int] = []
    while len(counts) < 2:  # a short answer may be ready before its first chunk is sent
        _, text = post(f"{server.http_url}/v2/models/m/generate_stream", body | {"return_num_output_tokens": True})
        counts = [json.loads(line.removeprefix("data:"))["num_output_tokens"] for line in text.splitlines() if line]
        assert sum(counts) == 100


@pytest.mark.parametrize("tokens", [1, 17, 127, 128])
def test_log_probabilities_of_the_prompt(client: Client, model: Any, tokenizer: Any, tokens: int) -> None:
    """Scoring: no answer, and the context may be full; a prompt that the cache holds is scored as well."""
    text = tokenizer.decode(np.random.default_rng(0).integers(40, 120, tokens).tolist())
    ids = tokenizer(text).input_ids[-128:]
    with torch.inference_mode():
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    right = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0] if len(ids) > 1 else torch.zeros(0)
    for _ in range(2):
        found = client.generate(
            text, model="m", max_tokens=0, prompt_logprobs=3, truncate_prompt_tokens=len(ids), return_log_probs=True
        )
        assert (found.text, found.finish_reason, found.num_output_tokens) == ("", "length", 0)
        np.testing.assert_allclose(found.prompt_log_probs, right.numpy(), atol=2e-4)
        for own, row in zip(found.prompt_top_log_probs, logits[:-1], strict=True):
            values, tokens_ = row.topk(3)
            np.testing.assert_allclose([value for _, value in own], values.numpy(), atol=2e-4)
            assert [token for token, _ in own] == tokens_.tolist()


def test_prompts_and_answers_as_tokens(client: Client, model: Any, tokenizer: Any) -> None:
    """Ids in and out, with the bytes of each token; a prompt is told without a run of the model."""
    text = "the cat 😀 sat" + TURN
    ids = tokenizer(text).input_ids
    right = generated(model, ids)
    for prompt in (text, ids):
        told = {"return_prompt_token_ids": True, "return_tokens": True, "skip_special_tokens": False}
        chunks = list(client.stream(prompt, model="m", max_tokens=24, top_logprobs=2, prompt_logprobs=1, **told))
        whole = client.generate(prompt, model="m", max_tokens=24, top_logprobs=2, prompt_logprobs=1, **told)
        assert [token for chunk in chunks for token in chunk.token_ids] == right == list(whole.token_ids)
        assert list(chunks[0].prompt_token_ids) == ids == list(whole.prompt_token_ids)
        assert b"".join(whole.prompt_tokens).decode() == text
        assert b"".join(whole.tokens).decode("utf-8", "replace") == whole.text
        for tokens, top in (
            (whole.top_tokens, whole.top_log_probs),
            (whole.prompt_top_tokens, whole.prompt_top_log_probs),
        ):
            spelled = [[token.decode("utf-8", "replace") for token in row] for row in tokens]
            assert spelled == [[tokenizer.decode([token]) for token, _ in row] for row in top]
    only = client.generate(text, model="m", max_tokens=0, return_prompt_token_ids=True)
    assert (only.prompt_token_ids, only.text, only.finish_reason) == (tuple(ids), "", "length")
    back = {"return_prompt_token_ids": True, "exclude_input_in_output": False, "skip_special_tokens": False}
    assert client.generate(ids, model="m", max_tokens=0, **back).text == text
    silent = client.generate(text, model="m", max_tokens=4)
    assert (silent.token_ids, silent.tokens, silent.prompt_token_ids) == ((), (), ())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 999], "input_ids names the token 999"),
        ([-1], "input_ids names the token -1"),
        ([5] * 128, "has 128 tokens"),
    ],
)
def test_tokens_that_are_refused(client: Client, prompt: list[int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        client.generate(prompt, model="m")
    both = {"text_input": _wire.texts(["a"])[None], "input_ids": np.array([[1]], np.int32)}
    with pytest.raises(InvalidRequestError, match="one of text_input, messages and input_ids, found text_input"):
        list(client._chunks(replace(_generation.prompt("a", "m", {}), inputs=both), None))


def test_several_streamed_answers_have_their_index(client: Client) -> None:
    options = {"max_tokens": 12, "temperature": 1.5, "random_seed": 3}
    texts = ["", "", ""]
    for chunk in client.stream(PROMPT, model="m", n=3, **options):
        texts[chunk.index] += chunk.text
    assert texts == [each.text for each in client.generate_many(PROMPT, 3, model="m", **options)]


def test_prompts_are_cut_on_request(client: Client, model: Any, tokenizer: Any) -> None:
    text = "one two three four five six seven eight nine ten " * 20
    ids = tokenizer(text).input_ids
    assert len(ids) > 128
    silent = client.generate(text, model="m", truncate_prompt_tokens=-1, ignore_eos=True)
    assert (silent.num_input_tokens, silent.num_output_tokens) == (128 - 16, 16)  # `default_max_tokens` is 16
    for kept, expected in ((9, 9), (-1, 128 - 24), (1000, None)):
        if expected is None:
            with pytest.raises(InvalidRequestError, match="in the context|the model's context of 128 allows 127"):
                client.generate(text, model="m", max_tokens=24, truncate_prompt_tokens=kept)
            continue
        found = client.generate(text, model="m", max_tokens=24, truncate_prompt_tokens=kept)
        assert found.num_input_tokens == expected
        right = generated(model, ids[-expected:])
        assert (
            found.text
            == tokenizer.decode(ids[-expected:] + right, skip_special_tokens=True)[
                len(tokenizer.decode(ids[-expected:], skip_special_tokens=True)) :
            ]
        )


def test_a_config_that_samples(client: Client) -> None:
    explicit = {name: value for name, value in SAMPLED.items() if name != "do_sample"}
    for seed in range(3):
        silent = client.generate(PROMPT, model="sampling", max_tokens=20, random_seed=seed)
        assert silent == client.generate(PROMPT, model="m", max_tokens=20, random_seed=seed, **explicit)
    greedy = client.generate(PROMPT, model="m", max_tokens=20)
    assert client.generate(PROMPT, model="sampling", max_tokens=20, temperature=0.0) == greedy
    assert silent.text != greedy.text


GUIDED: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": SCHEMA}, "json"),
    ({"guided_regex": r"[a-c]{2,9}-\d\d"}, r"[a-c]{2,9}-\d\d"),
    ({"guided_choice": ["yes, it is", "no, it is not", "中文"]}, r"yes, it is|no, it is not|中文"),
    ({"guided_grammar": 'start: "x" NUMBER ("+" NUMBER)~2\nNUMBER: /[0-9]{1,3}/'}, r"x\d{1,3}\+\d{1,3}\+\d{1,3}"),
    ({"guided_grammar": 'root ::= "(" [a-z]+ ")"'}, r"\([a-z]+\)?"),
]


@pytest.mark.parametrize(("options", "pattern"), GUIDED)
def test_answers_follow_a_grammar(client: Client, options: dict[str, Any], pattern: str) -> None:
    """Greedy or sampled, with and without drafts, alone and in company: the same answer, and one that fits."""
    for more in ({}, {"temperature": 1.5, "random_seed": 3}, {"temperature": 1.0, "random_seed": 4, "min_p": 0.1}):
        asked = {"model": "m", "max_tokens": 90, **options, **more}
        alone = client.generate(PROMPT, **asked)
        if pattern == "json":
            found = json.loads(alone.text)
            assert set(found) == {"name", "age", "tags"}
            assert 0 <= found["age"] <= 130
            assert set(found["tags"]) <= {"a", "b"}
        else:
            assert re.fullmatch(pattern, alone.text), alone.text
        assert alone.finish_reason in ("stop", "length")
        assert client.generate(PROMPT, prompt_lookup=False, **asked) == alone
        assert "".join(chunk.text for chunk in client.stream(PROMPT, **asked)) == alone.text


def test_several_grammars_in_one_batch(client: Client) -> None:
    asked = [{"model": "m", "max_tokens": 60, **options} for options, _ in GUIDED] + [{"model": "m", "max_tokens": 60}]
    alone = [client.generate(PROMPT, **each) for each in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda each: client.generate(PROMPT, **each), asked)) == alone


def test_what_a_grammar_ends_is_no_text(client: Client) -> None:
    asked = {"model": "m", "guided_regex": "", "ignore_eos": True, "skip_special_tokens": False}
    found = client.generate(PROMPT, **asked)
    assert (found.text, found.finish_reason) == ("", "stop")


class Waiting:
    """A channel that keeps what comes."""

    def __init__(self) -> None:
        self.chunks: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        self.cancelled = False

    def send(self, chunk: Chunk) -> None:
        self.chunks.put(chunk)

    fail = send  # type: ignore[assignment]

    def is_cancelled(self) -> bool:
        return self.cancelled


def test_a_grammar_that_takes_too_much_to_follow_is_given_up(repository: Path) -> None:
    """Each mask of it takes longer; llguidance's own limit lets this text pass."""
    text = "the brother of the other one sees to it more often than not, before others do so"
    tokens = Tokenizer.from_file(str(repository / "m" / "1" / "tokenizer.json"))
    grammars = Grammars(repository / "m" / "1" / "tokenizer.json", tokens.get_vocab_size(), frozenset([0]))
    guide = grammars.guide(Grammar(GrammarKind.REGEX, "(.*[aeiou].{0,200})*x")).result()

    def follow() -> None:
        for token in tokens.encode(text).ids:
            guide.masks([])
            guide.accept(token)

    with pytest.raises(InvalidRequest, match="can't be followed further: lexer error: too many expressions"):
        follow()
    grammars.stop()


@pytest.mark.parametrize("pattern", ["x[ab]", "x[ab]?", "x[ab]?c?", "x[ab]*"])
def test_a_draft_that_goes_beyond_the_grammars_end_changes_nothing(repository: Path, pattern: str) -> None:
    """As a text with earlier answers and their end tokens gives one."""
    file = repository / "m" / "1" / "tokenizer.json"
    tokens = Tokenizer.from_file(str(file))
    grammars = Grammars(file, tokens.get_vocab_size(), frozenset([0]))
    x, a, b = (tokens.token_to_id(text) for text in "xab")
    first = grammars.guide(Grammar(GrammarKind.REGEX, pattern)).result()
    first.accept(x)
    (expected,) = first.masks([])
    for draft in ([a, 0], [a, 0, 0], [0], [0, a], [b, 0, x], [a, a, 0]):
        guide = first.copy()
        fitting = guide.fits(draft)
        masks = guide.masks(fitting)
        assert len(masks) == 1 + len(fitting)
        np.testing.assert_array_equal(masks[0], expected)
        np.testing.assert_array_equal(guide.masks([])[0], expected)
        assert guide.accept(a) == first.copy().accept(a)
    grammars.stop()


def test_a_request_ends_while_its_grammar_waits(repository: Path) -> None:
    """Behind one that takes long to compile: its time ends, or its client goes; and neither is compiled."""
    service = GenerationService(
        repository / "m" / "1", GenerationLimits(context=128, slots=2, prefill_chunk=16, threads=1)
    )
    compiling = threading.Event()
    service._grammars._compiler.submit(compiling.wait, 60)

    def ask(timeout: int | None = None, **fields: str) -> Waiting:
        inputs = {name: _wire.texts([text])[None] for name, text in ({"text_input": PROMPT} | fields).items()}
        channel = Waiting()
        service.submit(service.parse(inputs, timeout), channel)
        return channel

    overdue, gone, patient = (
        ask(timeout, guided_choice=text) for timeout, text in ((50_000, "a"), (None, "b"), (None, "c"))
    )
    gone.cancelled = True
    error = overdue.chunks.get(timeout=30)
    assert isinstance(error, DeadlineExceeded)
    assert str(error) == "the timeout of 0.05 s was over while its grammar waited"
    for channel, reason in ((gone, "cancelled"), (ask(), "length")):
        chunk = channel.chunks.get(timeout=30)
        assert isinstance(chunk, Chunk)
        assert chunk.finish_reason is not None
        assert chunk.finish_reason.value == reason
    assert patient.chunks.empty()
    compiling.set()
    chunk = patient.chunks.get(timeout=30)
    assert isinstance(chunk, Chunk)
    assert (chunk.text, chunk.finish_reason) == ("c", "stop")
    assert [json.loads(text) for _, text in service._grammars._compiled] == [["c"]]
    counters = service.recorder.drain().counters
    assert (counters["requests_failed"], counters["requests_cancelled"]) == (1, 1)
    late = ask(timeout=1, guided_choice="c")  # its grammar is known, and its time over: told by the engine
    assert isinstance(late.chunks.get(timeout=30), DeadlineExceeded)
    service.stop()


def test_a_cut_answer_says_so(client: Client) -> None:
    found = client.generate(PROMPT, model="m", max_tokens=4, guided_json=SCHEMA)
    assert found.text
    assert (found.finish_reason, found.text) == ("length", '{"name": "'[: len(found.text)])


def test_guides_of_tensorrt_llm(server: LocalServer) -> None:
    request = {
        "text_input": _wire.texts([PROMPT])[None],
        "max_tokens": np.array([[60]], np.int32),
        "guided_decoding_guide_type": _wire.texts(["json_schema"])[None],
        "guided_decoding_guide": _wire.texts([json.dumps(SCHEMA)])[None],
        "beam_width": np.array([[1]], np.int32),
        "seed": np.array([[1]], np.uint64),
    }
    assert raw_stream(server, triton_request("m", request)) == ""
    url = f"{server.http_url}/v2/models/m/generate"
    _, text = post(url, {"text_input": PROMPT, "max_tokens": 90, "guided_decoding_guide_type": "json"})
    assert json.loads(text)["text_output"][:1] in ("{", "[")


def test_more_texts_than_the_queue_takes(client: Client) -> None:
    """In order, each the answer that it has alone; one that waits for too long fails, and the others with it."""
    texts = [f"text {index}" for index in range(60)]
    found = client.translate(texts, model="tr", max_tokens=12)
    assert len(found) == 60
    for index in (0, 17, 59):
        assert found[index] == client.translate(texts[index], model="tr", max_tokens=12)
    with pytest.raises(DeadlineExceededError):
        client.translate(texts, model="tr", max_tokens=60, timeout=0.005)
    assert client.translate([], model="tr") == []
