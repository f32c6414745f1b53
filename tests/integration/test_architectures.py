"""Any causal architecture through the same engine: random weights, the real server, against Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_models
from tests.conftest import run_export
from trident_client import Client, InvalidRequestError
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

ARCHITECTURES = ("gpt2", "llama", "opt", "qwen35", "lfm2")
HYBRIDS = ("qwen35", "lfm2")  # with states beside keys and values
PROMPTS = ["The quick brown fox jumps over the", "A", "emoji 😀 中文", "x = [1, 2, 3]\n" * 3, "Alice was"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_models.make_causal(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def tiny_server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("tiny-server")
    entries = {name: tiny_models.causal_entry(folder) for name, folder in folders.items()}
    (root / "models.toml").write_text(tiny_models.models_toml(entries))
    done = run_export("export", "--models-file", str(root / "models.toml"), "--repository", str(root / "repository"))
    assert done.returncode == 0, done.stderr
    running = local.start(root / "repository", root / "log")
    yield running
    running.stop()


@pytest.fixture
def tiny_client(tiny_server: LocalServer) -> Iterator[Client]:
    with Client(tiny_server.grpc_url, timeout=60) as connected:
        yield connected


def hugging_face(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_hugging_face(tiny_client: Client, folders: dict[str, Path], name: str) -> None:
    """The prompts are longer and shorter than a prefill chunk; they run one by one, and with four others."""
    expected = [hugging_face(folders[name], prompt, 32) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)  # the weights are not so flat that every answer is the same
    alone = [tiny_client.generate(prompt, model=name, max_tokens=32).text for prompt in PROMPTS]
    assert alone == expected
    with ThreadPoolExecutor(5) as pool:
        together = pool.map(lambda prompt: tiny_client.generate(prompt, model=name, max_tokens=32).text, PROMPTS)
    assert list(together) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_context_can_be_used(tiny_client: Client, folders: dict[str, Path], name: str) -> None:
    tokens = len(AutoTokenizer.from_pretrained(folders[name])(PROMPTS[3]).input_ids)
    answer = tiny_client.generate(PROMPTS[3], model=name, max_tokens=128 - tokens)
    assert answer.num_input_tokens + answer.num_output_tokens in range(tokens + 1, 129)
    with pytest.raises(InvalidRequestError, match="in the context of 128"):
        tiny_client.generate(PROMPTS[3], model=name, max_tokens=129 - tokens)


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_are_those_of_the_text(tiny_client: Client, folders: dict[str, Path], name: str) -> None:
    """Prompts that share a beginning, one that goes on where an answer ended, and what a cancelled stream left."""
    shared = "The rain in Spain stays mainly in the plain, and "
    prompts = [f"{shared}{end}" for end in ("then", "so do I", "it is wet", "the sun")]
    expected = [hugging_face(folders[name], prompt, 24) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda prompt: tiny_client.generate(prompt, model=name, max_tokens=24).text, prompts)
        assert list(together) == expected
    stream = tiny_client.stream(prompts[0], model=name, max_tokens=70)
    next(stream)
    stream.close()  # which cancels it
    streamed = [
        "".join(chunk.text for chunk in tiny_client.stream(text, model=name, max_tokens=24)) for text in prompts
    ]
    assert streamed == expected
    longer = f"{prompts[0]}{expected[0]} again"
    assert tiny_client.generate(longer, model=name, max_tokens=24).text == hugging_face(folders[name], longer, 24)


@pytest.mark.parametrize("name", ["llama", *HYBRIDS])
def test_what_a_grammar_forces_leaves_states_right(tiny_client: Client, name: str) -> None:
    """Forced texts are drafts, but for a model with states; the next answer is what it was."""
    before = tiny_client.generate(PROMPTS[0], model=name, max_tokens=24)
    choices = ["a long text that is the same up to here: yes", "a long text that is the same up to here: no"]
    for seed in range(3):
        options = {"model": name, "max_tokens": 90, "temperature": 1.5, "random_seed": seed}
        assert tiny_client.generate(PROMPTS[0], guided_choice=choices, **options).text in choices
    assert tiny_client.generate(PROMPTS[0], model=name, max_tokens=24) == before


def test_half_a_character_at_the_end_is_shown_as_such(tiny_client: Client, folders: dict[str, Path]) -> None:
    """Random weights give invalid UTF-8 all the time: joined chunks equal the answer in one chunk."""
    for prompt in PROMPTS:
        options = {"model": "llama", "max_tokens": 40, "temperature": 2.0, "random_seed": 3}
        whole = tiny_client.generate(prompt, **options).text
        assert "".join(chunk.text for chunk in tiny_client.stream(prompt, **options)) == whole


def test_a_model_without_a_chat_template_says_so(tiny_client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="messages needs a model with a chat template"):
        tiny_client.chat("Hello", model="gpt2")


def test_the_queue_is_bounded(tiny_server: LocalServer, folders: dict[str, Path], tmp_path: Path) -> None:
    from trident_client import UnavailableError

    entry = tiny_models.causal_entry(folders["gpt2"], slots=1, max_waiting=2)
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"gpt2": entry}))
    repository = tmp_path / "repository"
    assert (
        run_export("export", "--models-file", str(tmp_path / "models.toml"), "--repository", str(repository)).returncode
        == 0
    )
    assert json.loads((repository / "gpt2/1/trident.json").read_text())["fidelity"]["fp32"]["kl"] < 1e-4
    server = local.start(repository, tmp_path / "log")
    try:
        with Client(server.grpc_url, timeout=60) as client, ThreadPoolExecutor(40) as pool:
            options = {"model": "gpt2", "max_tokens": 100}
            expected = client.generate("A", **options).text
            results = list(pool.map(lambda _: outcome(client, options), range(40)))
    finally:
        server.stop()
    refused = [result for result in results if isinstance(result, UnavailableError)]
    assert refused
    # 0 run until the first step has placed one of those that wait.
    full = [
        re.search(r"the queue is full: 2 of 2 requests wait while [01] run; try again", str(one)) for one in refused
    ]
    assert all(full)
    assert {result for result in results if isinstance(result, str)} == {expected}


def outcome(client: Client, options: dict[str, object]) -> object:
    try:
        return client.generate("A", **options).text
    except Exception as error:
        return error
