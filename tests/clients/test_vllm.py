"""Models that vLLM computes, with the real vLLM and the real server, against our own engine and Hugging Face.

`make clients` runs these where an environment with vLLM is: the one of `make bench`, or one that TRIDENT_VLLM_PYTHON
names. A start of vLLM takes ten seconds and more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import gateways, tiny_models, vllm_environments
from tests.conftest import ROOT
from trident_client import Client, InvalidRequestError, UnavailableError
from trident_export import install, models_file
from trident_export.errors import FidelityError, UnsupportedModel
from trident_serving.artefacts import read_manifest
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

PYTHON = vllm_environments.real()
pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PYTHON is None, reason=vllm_environments.MISSING),
]

# Answers as long take seconds.
CONTEXT = 2048
OWN_CODE = ROOT / "tests" / "own_code"
PROMPT = "the cat sat on"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SETTINGS = "enforce_eager = true"  # a start takes less time so
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def entry(folder: Path, settings: str = SETTINGS, variant: str = "fp32", **limits: int) -> str:
    """A table of a model that vLLM computes."""
    chosen = {"context": 128, "slots": 4, "kv_cache_mib": 64, "max_waiting": 4, "threads": 2} | limits
    shown = ", ".join(f"{name} = {value}" for name, value in chosen.items())
    return (
        f'task = "text-generation"\nengine = "vllm"\nsource = {{ path = "{folder}" }}\nvariants = ["{variant}"]\n'
        f'limits = {{ {shown} }}\nvllm = {{ python = "{PYTHON}", {settings} }}\n'
    )


def export(root: Path, entries: dict[str, str], cache: Path | None = None) -> Path:
    """Export some tables; the repository."""
    (root / "models.toml").write_text(tiny_models.models_toml(entries))
    specs = models_file.load(root / "models.toml")
    install.export(specs, root / "repository", root, cache or root / "cache", lambda line: None)
    return root / "repository"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm-model") / "m"
    config = tiny_models.causal_config("llama", CONTEXT)
    config.head_dim = 32  # the least of vLLM's kernels for CPUs
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(path)
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


def make_internlm2(folder: Path) -> Path:
    """A model of a type that transformers does not have, with its code in the folder."""
    for file in OWN_CODE.glob("*.py"):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "vocab_size": tiny_models.VOCABULARY,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_models.byte_level_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model twice, computed by vLLM and by our own engine."""
    root = tmp_path_factory.mktemp("vllm-server")
    return export(root, {"m": entry(folder, context=CONTEXT), "ours": tiny_models.causal_entry(folder)})


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[LocalServer]:
    with local.running(repository, repository.parent / "log") as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as connected:
        yield connected


def metric(server: LocalServer, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(rf'^trident_{name}{{model="m",version="1"}} (\S+)$', text, flags=re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def eventually(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def test_the_manifest_says_what_computes_it(repository: Path) -> None:
    manifest = read_manifest(repository, "m")
    assert manifest is not None
    assert re.fullmatch(r"vllm \d+\.\d+.*", manifest.engine)
    measured = manifest.fidelity["fp32"]
    assert measured["kl"] < 1e-6
    assert measured["top1"] == 1.0
    assert measured["batch_effect"] < 1e-3
    weights = repository / "m" / "1" / "huggingface" / "model.safetensors"
    assert weights.stat().st_nlink > 1  # the disk holds them once
    ours = read_manifest(repository, "ours")
    assert ours is not None
    assert ours.engine == ""


def test_answers_are_those_of_our_engine(client: Client) -> None:
    fields: list[dict[str, Any]] = [
        {},
        {"stop_words": [" the"]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {5: 100.0, 6: -100.0}, "max_tokens": 4},
        {"bad_words": ["e", "a"]},
        {"ignore_eos": True, "min_tokens": 20},
        {"truncate_prompt_tokens": 2},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.0},
        {"guided_json": SCHEMA, "max_tokens": 60},
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "[a-c]{3,5}"},
    ]
    for given in fields:
        vllm, ours = (client.generate(PROMPT, model=name, **{"max_tokens": 24} | given) for name in ("m", "ours"))
        assert (vllm.text, vllm.finish_reason) == (ours.text, ours.finish_reason), given
        assert vllm.num_input_tokens == ours.num_input_tokens
    assert json.loads(client.generate(PROMPT, model="m", max_tokens=60, guided_json=SCHEMA).text).keys() == {
        "name",
        "age",
    }
    chat = [{"role": "user", "content": "hello"}]
    assert client.chat(chat, model="m", max_tokens=12).text == client.chat(chat, model="ours", max_tokens=12).text


def test_log_probabilities(client: Client) -> None:
    fields = {"max_tokens": 8, "top_logprobs": 3, "prompt_logprobs": 2}
    vllm, ours = (client.generate(PROMPT, model=name, **fields) for name in ("m", "ours"))
    for name, count in (("", 8), ("prompt_", vllm.num_input_tokens - 1)):
        found, expected = (getattr(each, f"{name}log_probs") for each in (vllm, ours))
        assert len(found) == count
        np.testing.assert_allclose(found, expected, atol=1e-4)
        for one, other in zip(*(getattr(each, f"{name}top_log_probs") for each in (vllm, ours)), strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            np.testing.assert_allclose([value for _, value in one], [value for _, value in other], atol=1e-4)


def test_sampling(client: Client) -> None:
    fields = {"model": "m", "max_tokens": 16, "temperature": 1.0}
    same = [client.generate(PROMPT, **fields, random_seed=2**64 - 2).text for _ in range(2)]
    other = client.generate(PROMPT, **fields, random_seed=3).text
    assert same[0] == same[1] != other


def test_a_stream(client: Client) -> None:
    chunks = list(client.stream(PROMPT, model="m", max_tokens=1500, ignore_eos=True))
    assert len(chunks) > 1  # a tiny model says thousands of tokens a second, and those that wait go out together
    whole = client.generate(PROMPT, model="m", max_tokens=1500, ignore_eos=True)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].num_output_tokens == 1500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 1.0, "typical_p": 0.5}, "typical_p must be 1 for this model, found 0.5"),
        ({"temperature": 3.0}, "vLLM: temperature must be in"),
        ({"lora_name": "x"}, "this model has no adapters"),
        ({"guided_regex": "("}, "guided_regex is refused"),
        ({"max_tokens": 5000}, "leave room for"),
    ],
)
def test_what_it_can_not_do(client: Client, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        client.generate(PROMPT, model="m", **fields)


def test_a_prompt_as_long_as_the_context(client: Client) -> None:
    """vLLM generates a token in any case."""
    with pytest.raises(InvalidRequestError, match="^vLLM: "):
        client.generate([5] * CONTEXT, model="m", max_tokens=0, prompt_logprobs=0)
    found = client.generate([5] * (CONTEXT - 1), model="m", max_tokens=0, prompt_logprobs=0)
    assert (found.text, len(found.prompt_log_probs), found.num_output_tokens) == ("", CONTEXT - 2, 0)


def test_a_client_that_hangs_up(server: LocalServer, client: Client) -> None:
    before = metric(server, "requests_cancelled_total")
    stream = client.stream(PROMPT, model="m", max_tokens=1900, ignore_eos=True, min_tokens=1900)
    next(iter(stream))
    stream.close()
    eventually(lambda: metric(server, "requests_cancelled_total") == before + 1)  # published four times a second
    eventually(lambda: metric(server, "requests_running") == 0)
    assert metric(server, "slots") == 4
    assert metric(server, "generated_tokens_total") > 0


def test_through_the_gateway(server: LocalServer, tmp_path: Path) -> None:
    with gateways.running(tmp_path / "gateway.log", server.grpc_url) as gateway:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        status, _, found = gateway.ask("/v1/completions", body)
        assert status == 200, found
        expected = gateway.ask("/v1/completions", body | {"model": "ours"})[2]
        assert found["choices"][0]["text"] == expected["choices"][0]["text"]
        assert found["usage"] == expected["usage"]


def workers(server: LocalServer) -> list[int]:
    """The processes of our program in vLLM's interpreter, the oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = path.joinpath("cmdline").read_bytes().split(b"\0")
            group = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[2])
            if any(word.endswith(b"vllm/worker.py") for word in words) and group == int(path.name):
                found.append(int(path.name))
    return sorted(found)


def test_a_worker_that_is_killed(server: LocalServer, client: Client) -> None:
    """Running requests fail, and the model comes back by itself."""
    (before,) = workers(server)
    with ThreadPoolExecutor(1) as pool:
        fields = {"model": "m", "max_tokens": 1900, "ignore_eos": True, "min_tokens": 1900}
        running = pool.submit(lambda: [client.generate(PROMPT, **fields) for _ in range(100)])
        eventually(lambda: metric(server, "requests_running") > 0)
        os.kill(before, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="vLLM"):
            running.result(60)

    def answers() -> bool:
        try:
            return bool(client.generate(PROMPT, model="m", max_tokens=4).text)
        except UnavailableError:
            return False

    eventually(answers, 120)
    assert workers(server) != [before]
    assert len(workers(server)) == 1


def test_settings_that_change_the_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    """As any that vLLM takes; this one rotates otherwise than config.json says."""
    settings = f'{SETTINGS}, hf_overrides = {{ rope_parameters = {{ rope_type = "default", rope_theta = 50.0 }} }}'
    with pytest.raises(FidelityError, match="fp32 does not compute what Hugging Face computes: kl is"):
        export(tmp_path, {"m": entry(folder, settings)})
    assert read_manifest(tmp_path / "repository", "m") is None


def test_a_type_that_our_exporter_refuses(tmp_path: Path) -> None:
    """InternLM2: transformers does not have it, and the code in its folder writes its attention out."""
    folder = make_internlm2(tmp_path / "m")
    trusted = "trust_remote_code = true\n"
    with pytest.raises(UnsupportedModel, match="InternLM2ForCausalLM is not supported: it can't run over slots"):
        export(tmp_path, {"ours": trusted + tiny_models.causal_entry(folder)})
    repository = export(tmp_path, {"m": trusted + entry(folder)})
    manifest = read_manifest(repository, "m")
    assert manifest is not None
    assert manifest.fidelity["fp32"]["kl"] < 1e-6
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    with local.running(repository, tmp_path / "log") as running, Client(running.grpc_url, timeout=120) as client:
        found = client.generate(PROMPT, model="m", max_tokens=12)
    assert found.text == tokenizer.decode(answer, skip_special_tokens=True) != ""


def test_smollm2_through_both_engines(tmp_path: Path) -> None:
    """Real weights: both pass the gate of their numbers, and answer alike."""
    smollm2 = models_file.load(ROOT / "models.toml")[0].source
    assert smollm2.package
    source = f'{{ package = "{smollm2.package}", path = "{smollm2.path}" }}'
    limits = "limits = { context = 512, slots = 4, kv_cache_mib = 256 }"
    head = f'task = "text-generation"\nsource = {source}\n{limits}\n'
    repository = export(
        tmp_path,
        {
            "ours": f'{head}variants = ["fp32"]\n',
            "m": f'{head}engine = "vllm"\nvariants = ["fp32", "bf16"]\nvllm = {{ python = "{PYTHON}", {SETTINGS} }}\n',
        },
        ROOT / ".cache",
    )
    manifest = read_manifest(repository, "m")
    assert manifest is not None
    assert manifest.fidelity["fp32"]["kl"] < 1e-5
    assert 1e-5 < manifest.fidelity["bf16"]["kl"] < 1e-2  # it rounds
    with local.running(repository, tmp_path / "log") as running, Client(running.grpc_url, timeout=300) as client:
        for prompt in ("1, 2, 3, 4,", "The capital of France is", "def add(a, b):"):
            texts = [client.generate(prompt, model=name, max_tokens=24).text for name in ("m", "ours")]
            assert texts[0] == texts[1]
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        answers = [client.chat(chat, model=name, max_tokens=24) for name in ("m", "ours", "m_bf16")]
        assert answers[0].text == answers[1].text
        assert "Paris" in answers[2].text
        assert answers[0].finish_reason == answers[1].finish_reason == "stop"
