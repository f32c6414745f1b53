"""Other people's clients of OpenAI's, Cohere's, TEI's and Ollama's APIs, against the gateway: our client's answers.

`make clients` runs these, each client in an environment of its own. OpenAI's own library is in
tests/integration/test_gateway.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.environments import environment
from tests.conftest import ROOT
from tests.gateways import Gateway
from tests.integration.test_messages import TOOL
from trident_client import Client
from trident_export.evaluation import measures

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

TEXTS = ["a cat", "The dog lay under the tree.", "rain"]
MESSAGES: list[Any] = [{"role": "user", "content": "What is rain?"}]
THOUGHTS, SPEECH = "He asks.", "I look."
CITY = {"city": "Zürich"}


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(*command: str | Path, seconds: float = 600, **environ: str) -> str:
    """What a command prints. None of them may ask the network."""
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **environ}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=kept | quiet, timeout=seconds
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def program(client: str, *arguments: str, environment_of: str = "") -> Any:
    """The JSON that a program of an environment prints last."""
    script = ROOT / "tests" / "clients" / "programs" / f"gateway_{client}.py"
    python = environment(environment_of or client.replace("_", "-")) / "python"
    return json.loads(run(python, script, *arguments).splitlines()[-1])


@pytest.fixture
def chat(direct: Client) -> str:
    """What every client must get for the same question."""
    return direct.chat(MESSAGES, model="talk", max_tokens=8).text


def equal(found: Any, right: Any) -> None:
    np.testing.assert_array_equal(np.array(found, np.float32), right)


def test_cohere(gateway: Gateway, direct: Client) -> None:
    found = program("cohere", gateway.url, "rain", *TEXTS)
    right = [[each.index, each.score] for each in direct.rank("rain", TEXTS, model="rank")]
    assert found["v2"] == right[:2]
    assert found["v1"] == right
    assert "the model 'nothing' does not exist" in found["refusal"]


def test_ollama(gateway: Gateway, direct: Client) -> None:
    found = program("ollama", gateway.url, json.dumps(TOOL), *TEXTS)
    assert (found["content"], found["thinking"], found["streamed"]) == (SPEECH, THOUGHTS, SPEECH)
    assert found["calls"] == found["streamed_calls"] == [{"name": "weather", "arguments": CITY}]
    assert found["again"] == "stop"
    right = direct.chat(MESSAGES, model="talk", max_tokens=10, temperature=1.0, random_seed=4)
    assert found["generated"] == "".join(found["chunks"]) == right.text
    equal(found["vectors"], direct.embed(TEXTS, model="embed"))
    assert found["models"] == [
        f"{name}:latest" for name in ("chain", "classify", "embed", "rank", "tag", "talk", "translate")
    ]
    assert found["refusal"].startswith("404 the model 'nothing' does not exist")


def test_huggingface_hub(gateway: Gateway, direct: Client, chat: str) -> None:
    found = program("huggingface_hub", gateway.url, *TEXTS)
    equal(found["vectors"], direct.embed(TEXTS, model="embed"))
    assert found["chat"] == "".join(found["chunks"]) == chat


def test_langchain(gateway: Gateway, direct: Client, chat: str) -> None:
    found = program("langchain", gateway.url, *TEXTS)
    assert found["chat"] == "".join(found["chunks"]) == found["responses"] == chat
    assert found["calls"] == [{"name": "weather", "args": CITY}]
    assert found["tool"] == "18 in Zürich"
    assert found["person"] == [True, True]
    assert found["completion"] == direct.generate("the cat", model="talk", max_tokens=8).text
    equal(found["vectors"], direct.embed(TEXTS, model="embed"))


def test_litellm(gateway: Gateway, direct: Client, chat: str) -> None:
    found = program("litellm", gateway.url, json.dumps(TOOL), "rain", *TEXTS)
    assert found["chat"] == "".join(found["chunks"]) == chat
    assert found["reasoning"] == THOUGHTS
    assert [[name, json.loads(arguments)] for name, arguments in found["calls"]] == [["weather", CITY]]
    assert found["completion"] == direct.generate("the cat", model="talk", max_tokens=8).text
    equal(found["vectors"], direct.embed(TEXTS, model="embed"))
    right = [[each.index, each.score] for each in direct.rank("rain", TEXTS, model="rank")]
    assert found["ranked"] == right[:2]
    assert "in the context of 2048" in found["refusal"]


def test_llama_index(gateway: Gateway, direct: Client, chat: str) -> None:
    found = program("llama_index", gateway.url, *TEXTS, environment_of="llama-index-openai")
    assert found["chat"] == "".join(found["chunks"]) == chat
    assert found["completion"] == direct.generate("the cat", model="talk", max_tokens=8).text
    equal(found["vectors"], direct.embed(TEXTS, model="embed"))


CHOICES = [
    {"question": "The cat sat on the", "choices": [" mat", " moon and looked"], "answer": 0},
    {"question": "Rain falls from the", "choices": [" sky", " tree 😀"], "answer": 1},
]
TASK = """task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_lm_eval(gateway: Gateway, direct: Client, gateway_folder: Path, tmp_path: Path) -> None:
    """A task of ours: the likelihoods are those of the prompt's tokens."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in CHOICES))
    (tmp_path / "ours.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    arguments = f"model=talk,base_url={gateway.url}/v1/completions,tokenizer={gateway_folder / 'talk'},max_length=2047"
    command: list[str | Path] = [environment("lm-eval") / "lm_eval", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", "ours", "--include_path", tmp_path]
    run(*command, "--log_samples", "--output_path", tmp_path / "out", "--batch_size", "2", **OFFLINE)
    (samples,) = (tmp_path / "out").rglob("samples_ours_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        doc = sample["doc"]
        for choice, ((told, greedy),) in zip(doc["choices"], sample["resps"], strict=True):
            scored = direct.generate(
                doc["question"] + choice, model="talk", max_tokens=0, prompt_logprobs=1, return_prompt_token_ids=True
            )
            asked = direct.generate(doc["question"], model="talk", max_tokens=0, return_prompt_token_ids=True)
            start = len(asked.prompt_token_ids)
            assert scored.prompt_token_ids[:start] == asked.prompt_token_ids
            own = scored.prompt_log_probs[start - 1 :]
            best = [pairs[0][1] for pairs in scored.prompt_top_log_probs[start - 1 :]]
            assert float(told) == pytest.approx(sum(own), abs=1e-4)
            assert str(greedy) == str(list(own) == best)


def test_mteb(gateway: Gateway, direct: Client, tmp_path: Path) -> None:
    """A task of ours: its figures are those of our own evaluation."""
    passages = [f"{text} {number}" for number, text in enumerate(TEXTS * 5)]
    rows = [{"query": text, "passages": passages, "relevant": [number]} for number, text in enumerate(TEXTS)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [environment("mteb") / "python", ROOT / "tests/clients/programs/gateway_mteb.py"]
    printed = run(*command, gateway.url, "embed", tmp_path / "own.jsonl", **OFFLINE).splitlines()[-1]
    vectors, asked = direct.embed(passages, model="embed"), direct.embed(TEXTS, model="embed")
    orders = np.argsort(-(asked @ vectors.T), axis=1).tolist()
    expected = {each.name: each.value for each in measures.search([row["relevant"] for row in rows], orders)}
    names = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}
    assert json.loads(printed) == {name: pytest.approx(expected[ours], abs=1e-4) for ours, name in names.items()}


@pytest.mark.parametrize("kind", ["chat", "completions", "embeddings", "rankings"])
def test_aiperf(gateway: Gateway, gateway_folder: Path, tmp_path: Path, kind: str) -> None:
    model = {"embeddings": "embed", "rankings": "rank"}.get(kind, "talk")
    endpoint = {"rankings": "cohere_rankings"}.get(kind, kind)
    command: list[str | Path] = [environment("aiperf") / "aiperf", "profile", "--model", model, "--url", gateway.url]
    command += ["--endpoint-type", endpoint, "--tokenizer", gateway_folder / "talk", "--isl", "12"]
    command += ["--request-count", "6", "--concurrency", "2", "--ui", "none", "--no-gpu-telemetry"]
    command += ["--no-server-metrics", "--artifact-dir", tmp_path]
    if kind in ("chat", "completions"):
        command += ["--streaming", "--osl", "16", "--extra-inputs", "ignore_eos:true"]
    if kind == "rankings":
        command += ["--rankings-passages-prompt-token-mean", "20", "--rankings-query-prompt-token-mean", "5"]
    run(*command)
    metrics = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert metrics["request_count"]["avg"] == 6
    assert "error_request_count" not in metrics or not metrics["error_request_count"]["avg"]
    if kind in ("chat", "completions"):
        assert metrics["time_to_first_token"]["avg"] > 0
