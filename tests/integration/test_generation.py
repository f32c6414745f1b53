"""Text generation on SmolLM2 through the real server, against Hugging Face."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trident_client import Client, NotFoundError
from trident_serving.launcher.local import LocalServer

FP32 = "smollm2_fp32"
NEW_TOKENS = 16
PROMPTS = [
    "The quick brown fox jumps over the",
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "Q: What is 2 + 2?\nA:",
    "  leading spaces and\ttabs",
    "1, 2, 3, 4,",
    "Water boils at",
    '{"name": "Alice", "age":',
    "Dear Sir or Madam,",
    "In 1969, the first",
    "SELECT * FROM",
    "La capitale de la France est",
    "Der schnelle braune Fuchs",
    "emoji 😀 and 中文",
    "A",
    "Roses are red,\nviolets are",
    "# Introduction\n\nThis paper",
    "The meaning of life, the universe and everything is " * 6,
    "To be, or not to be, that is the",
]


@pytest.fixture(scope="module")
def hugging_face(smollm2_folder: Path) -> Iterator[dict[str, str]]:
    """The greedy continuation of every prompt by Hugging Face `generate` in float32."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    answers = {}
    for prompt in PROMPTS:
        batch = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2)
        answers[prompt] = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    yield answers


def test_greedy_equals_hugging_face_one_by_one(client: Client, hugging_face: dict[str, str]) -> None:
    found = {p: client.generate(p, model=FP32, max_tokens=NEW_TOKENS).text for p in PROMPTS}
    assert found == hugging_face


def test_greedy_equals_hugging_face_in_a_batch(client: Client, hugging_face: dict[str, str]) -> None:
    """Eight at a time; they start and end at different times, because the prompts differ in length."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: client.generate(p, model=FP32, max_tokens=NEW_TOKENS).text, PROMPTS))
    assert dict(zip(PROMPTS, answers, strict=True)) == hugging_face


def test_the_capital_of_france(client: Client) -> None:
    """Of float32: two tokens are nearly as likely, and how a processor rounds 8 bits decides between them."""
    answer = client.chat("What is the capital of France?", model=FP32)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert answer.num_input_tokens == 37
    assert client.generate([{"role": "user", "content": "What is the capital of France?"}], model=FP32) == answer


def test_the_default_variant_gives_the_same_answers_in_a_batch(client: Client) -> None:
    prompts = PROMPTS[:12]
    alone = [client.generate(p, max_tokens=12).text for p in prompts]
    with ThreadPoolExecutor(12) as pool:  # more than there are slots
        together = list(pool.map(lambda p: client.generate(p, max_tokens=12).text, prompts))
    assert together == alone


def test_stream_joined_equals_unary(client: Client) -> None:
    for prompt in PROMPTS[:6]:
        unary = client.generate(prompt, max_tokens=24, min_tokens=24)
        chunks = list(client.stream(prompt, max_tokens=24, min_tokens=24))
        assert "".join(chunk.text for chunk in chunks) == unary.text
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == unary.finish_reason
        assert chunks[-1].num_output_tokens == unary.num_output_tokens == 24
        assert len(chunks) > 2  # tokens that wait for the sender's next time leave together


def test_stream_arrives_while_it_is_generated(client: Client) -> None:
    start = time.monotonic()
    times = [time.monotonic() - start for _ in client.stream("Once upon a time", max_tokens=60)]
    assert times[0] < times[-1] / 2


def test_http_generate_stream(server: LocalServer, client: Client) -> None:
    body = json.dumps({"text_input": "Once upon a time", "max_tokens": 60, "stream": True}).encode()
    url = f"{server.http_url}/v2/models/smollm2/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        lines = response.read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(events) > 3
    assert "".join(event["text_output"] for event in events) == client.generate("Once upon a time", max_tokens=60).text
    assert events[-1]["finish_reason"] == "length"


def test_emoji_is_never_cut(client: Client) -> None:
    """The model repeats emoji, each of which is several tokens."""
    prompt = "Repeat: 😀🚀🐍 😀🚀🐍 😀🚀🐍 😀🚀🐍"
    chunks = [chunk.text for chunk in client.stream(prompt, max_tokens=24)]
    assert any("😀" in text or "🚀" in text or "🐍" in text for text in chunks)
    assert not any("\ufffd" in text for text in chunks[:-1])


def test_stop_words_are_not_shown(client: Client) -> None:
    whole = client.generate("1, 2, 3, 4,", max_tokens=20).text
    assert " 7, 8" in whole
    stopped = client.generate("1, 2, 3, 4,", max_tokens=20, stop_words=["nothing like it", " 7, 8"])
    assert stopped.text == whole[: whole.index(" 7, 8")]
    assert stopped.finish_reason == "stop"
    chunks = list(client.stream("1, 2, 3, 4,", max_tokens=20, stop_words=[" 7, 8"]))
    assert "".join(chunk.text for chunk in chunks) == stopped.text


def test_sampling_is_reproducible_by_seed(client: Client) -> None:
    def sample(seed: int | None) -> str:
        return client.generate("I like", max_tokens=16, temperature=1.0, top_p=0.95, random_seed=seed).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert sample(None) != sample(None)
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(sample, [7] * 6))) == 1


def test_log_probs_equal_hugging_face(client: Client, smollm2_folder: Path) -> None:
    answer = client.generate("The capital of France is", model=FP32, max_tokens=4, return_log_probs=True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    batch = tokenizer("The capital of France is", return_tensors="pt")
    length = batch["input_ids"].shape[1]
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=2)
    with torch.inference_mode():
        log_probs = model(out).logits[0, length - 1 : -1].log_softmax(-1)
    expected = log_probs.gather(1, out[0, length:, None])[:, 0].tolist()
    assert answer.log_probs == pytest.approx(expected, abs=1e-4)


def test_min_tokens_and_prompt_in_the_answer(client: Client, server: LocalServer) -> None:
    short = client.chat("What is the capital of France?", model=FP32)
    more = short.num_output_tokens + 5
    longer = client.chat("What is the capital of France?", model=FP32, min_tokens=more, max_tokens=40)
    assert longer.num_output_tokens >= short.num_output_tokens + 5
    body = json.dumps({"text_input": "Hello", "max_tokens": 3, "exclude_input_in_output": False}).encode()
    url = f"{server.http_url}/v2/models/smollm2/generate"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        answer = json.load(response)
    assert answer["text_output"] == "Hello" + client.generate("Hello", max_tokens=3).text


def test_requests_join_while_others_are_answered(client: Client) -> None:
    """Continuous batching: a short request that comes later is answered before a long one ends."""
    ended: dict[str, float] = {}

    def run(name: str, tokens: int) -> None:
        client.generate("Once upon a time", max_tokens=tokens)
        ended[name] = time.monotonic()

    long = threading.Thread(target=run, args=("long", 200))
    long.start()
    time.sleep(0.3)
    run("short", 4)
    assert long.is_alive()
    long.join()
    assert ended["short"] < ended["long"]


def test_cancellation_frees_the_slot(client: Client) -> None:
    """Twice as many endless requests as slots are abandoned; a later one must not wait for them."""
    streams = [client.stream("Once upon a time", max_tokens=1500) for _ in range(8)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    start = time.monotonic()
    client.generate("Hello", max_tokens=2)
    assert time.monotonic() - start < 5  # eight answers of 1,500 tokens take over 20 s


def test_a_call_without_a_model_takes_the_server_s_only_one(client: Client) -> None:
    assert client.generate(PROMPTS[0], max_tokens=3) == client.generate(PROMPTS[0], max_tokens=3, model="smollm2")
    assert client.embed("a").shape == (384,)
    with pytest.raises(NotFoundError, match="serves no model for text-classification: name one"):
        client.classify("a")
