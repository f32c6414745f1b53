"""Draft models: exported with tiny random models, run with real decoders, served by the real server.

`big` computes what `small` does: it has `small`'s two layers, and many more that add nothing. So its draft is always
right, and several times faster. Answers are compared to the bit with those of the same graph without a draft.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, LlamaConfig

from tests import tiny_models
from tests.conftest import run_export
from trident_client import Client, _wire
from trident_export import drafts, install, models_file
from trident_export.errors import ModelsFileError
from trident_export.graphs import decoder_passes, editing
from trident_export.graphs.causal import export_causal_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.tasks.text_generation import check_draft
from trident_serving.artefacts import DraftSettings, read_draft, read_manifest
from trident_serving.generation.draft_model import ModelAcceptance
from trident_serving.generation.service import GenerationService
from trident_serving.generation.stream import Chunk
from trident_serving.launcher import local
from trident_serving.schema.limits import GenerationLimits

LAYERS, CONTEXT, SHORT = 10, 128, 48
LIMITS = GenerationLimits(context=CONTEXT, slots=4, prefill_chunk=16, threads=1)
TABLE = """[big]
task = "text-generation"
source = {{ path = "big" }}
variants = ["fp32"]
limits = {{ context = {context}, slots = 4, prefill_chunk = 16, threads = 1 }}
draft = "small"

[own]
task = "text-generation"
source = {{ path = "small" }}
variants = ["int8", "fp32"]
limits = {{ context = {context}, slots = 4, prefill_chunk = 16, threads = 1 }}
gates = {{ int8 = {{ kl = 9.0, top1 = 0.1 }} }}
draft = "int8"

[small]
task = "text-generation"
source = {{ path = "small" }}
variants = ["fp32"]
limits = {{ context = {short}, slots = 2, prefill_chunk = 16, threads = 1 }}
on_demand = true
"""


def make_big(folder: Path, small: Path) -> Path:
    """`small` with more layers, whose attention and feed-forward give zeros."""
    config = LlamaConfig.from_pretrained(small)
    config.num_hidden_layers = LAYERS
    big = AutoModelForCausalLM.from_config(config)
    big.load_state_dict(AutoModelForCausalLM.from_pretrained(small).state_dict(), strict=False)
    with torch.no_grad():
        for layer in big.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    big.save_pretrained(folder)
    for file in small.glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models file, and what it exports."""
    folder = tmp_path_factory.mktemp("drafts")
    make_big(folder / "big", tiny_models.make_causal(folder / "small", "llama"))
    (folder / "models.toml").write_text(TABLE.format(context=CONTEXT, short=SHORT))
    done = run_export("export", *options(folder))
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("small [") < done.stderr.index("big [")
    return folder


def options(folder: Path) -> tuple[str, ...]:
    return ("--models-file", str(folder / "models.toml"), "--repository", str(folder / "repository"))


def test_a_version_folder_holds_the_graph_that_drafts(folder: Path) -> None:
    repository = folder / "repository"
    specs = {spec.name: spec for spec in models_file.load(folder / "models.toml")}
    for public, graph, settings in (
        ("big", "small", DraftSettings("small", SHORT, 16)),
        ("own_fp32", "own", DraftSettings("own", CONTEXT, 16)),
    ):
        assert read_draft(repository / public / "1") == settings
        for file in ("model.onnx", "model.onnx.data"):
            linked = repository / public / "1" / "draft" / file
            assert linked.samefile(repository / graph / "1" / file)
    assert read_draft(repository / "own" / "1") is None
    manifests = [read_manifest(repository, name) for name in ("big", "own", "small")]
    assert [manifest.drafts for manifest in manifests if manifest] == [{"fp32": "small"}, {"fp32": "own"}, {}]
    for spec in specs.values():
        assert install.is_current(spec, repository, folder)
    graph = repository / "big" / "1" / "draft" / "model.onnx"
    graph.rename(graph.with_name("away"))
    assert not install.is_current(specs["big"], repository, folder)
    graph.with_name("away").rename(graph)


class Waiting:
    """A channel that keeps what comes."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.first = threading.Event()
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.cancelled = False

    def send(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.first.set()
        if chunk.final:
            self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


def submit(service: GenerationService, prompt: str, **fields: Any) -> Waiting:
    inputs = {"text_input": _wire.texts([prompt])[None]}
    for name, value in fields.items():
        kind = bool if isinstance(value, bool) else np.float32 if isinstance(value, float) else np.int32
        inputs[name] = _wire.texts([value])[None] if isinstance(value, str) else np.array([[value]], kind)
    channel = Waiting()
    service.submit(service.parse(inputs), channel)
    return channel


Answer = tuple[str, str, list[float]]


def answers(channel: Waiting) -> list[Answer]:
    """Text, reason and log-probabilities of each answer of a request."""
    assert channel.done.wait(60)
    assert channel.error is None
    (chunk,) = channel.chunks
    found = []
    for each in (chunk, *chunk.others):
        assert each.finish_reason is not None
        found.append((each.text, each.finish_reason.value, [token.chosen for token in each.log_probs]))
    return found


LONG = "A slot keeps its content when its sequence ends, and a prompt that begins like it starts behind that. "
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "The", "max_tokens": 60},
    {"prompt": LONG, "max_tokens": 40},
    {"prompt": LONG, "max_tokens": 30, "n": 3},
    {"prompt": LONG[:60], "max_tokens": 50, "prompt_lookup": False},
    {"prompt": LONG[:40] + "It ends.", "max_tokens": 60, "repetition_penalty": 1.3},
    {"prompt": "The cache", "max_tokens": 50, "temperature": 0.7, "seed": 3},
    {"prompt": "1, 2, 3, 1, 2, 3, 1,", "max_tokens": 60},
    {"prompt": "The", "max_tokens": 40, "guided_regex": "[a-z ]*"},
    {"prompt": LONG + LONG[:30], "max_tokens": 30},
    {"prompt": "A", "max_tokens": 30, "min_tokens": 30},
]


def ask_all(service: GenerationService) -> list[list[Answer]]:
    """All requests at once, twice: the second time the cache and the pool hold what the first left."""
    found = []
    for _ in range(2):
        channels = [submit(service, **request, return_log_probs=True) for request in REQUESTS]
        found += [answers(channel) for channel in channels]
    return found


@pytest.fixture(scope="module")
def serve(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., GenerationService]]:
    """Serves the float32 graph of `own` in this process, with any draft folder or none."""
    started: list[GenerationService] = []

    def start(draft: Path | None = None) -> GenerationService:
        copy = tmp_path_factory.mktemp("version") / "1"
        shutil.copytree(folder / "repository" / "own_fp32" / "1", copy, ignore=shutil.ignore_patterns("draft"))
        if draft is not None:
            shutil.copytree(draft, copy / "draft")
        started.append(GenerationService(copy, LIMITS))
        return started[-1]

    yield start
    for service in started:
        service.stop()


@pytest.fixture(scope="module")
def expected(serve: Callable[..., GenerationService]) -> list[list[Answer]]:
    found = ask_all(serve())
    assert len({text for request in found for text, _, _ in request}) >= len(REQUESTS) - 2
    return found


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft folder of another model with other random numbers."""
    folder = tmp_path_factory.mktemp("stranger")
    source = tiny_models.make_causal(folder / "source", "llama", seed=5)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    graph = decoder_passes.optimize(export_causal_graph(model, CONTEXT + 16, CONTEXT))
    editing.save(graph, folder / "draft" / "model.onnx")
    DraftSettings("stranger", CONTEXT, 16).write(folder / "draft")
    return folder / "draft"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model takes no time and seems to be good, so that it drafts whenever it can."""
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr("trident_serving.generation.draft_model.time", clock)
    monkeypatch.setattr(ModelAcceptance, "chance", lambda self: 0.9)


@pytest.fixture(autouse=True)
def _no_failure(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A draft that fails is in the log only."""
    yield
    assert not [record for record in caplog.get_records("call") if "the draft model failed" in record.getMessage()]


@pytest.mark.parametrize("draft", ["small", "own", "stranger"])
@pytest.mark.usefixtures("eager")
def test_answers_are_the_same_to_the_bit(
    folder: Path, serve: Callable[..., GenerationService], expected: list[list[Answer]], stranger: Path, draft: str
) -> None:
    """With the same model for short texts, the same in 8 bits, and one that is always wrong."""
    places = {"small": folder / "repository/big/1/draft", "own": folder / "repository/own_fp32/1/draft"}
    service = serve(places.get(draft, stranger))
    assert service.draft_name == draft
    assert ask_all(service) == expected
    counters = service.recorder.drain().counters
    drafted, accepted = counters["model_draft_tokens"], counters["model_draft_tokens_accepted"]
    assert drafted > (80 if draft == "small" else 200)
    low, high = {"small": (0.6, 1.0), "own": (0.3, 1.0), "stranger": (0.0, 0.1)}[draft]
    assert low <= accepted / drafted <= high


@pytest.mark.usefixtures("eager")
def test_a_cancelled_answer_leaves_a_good_slot(
    folder: Path, serve: Callable[..., GenerationService], expected: list[list[Answer]]
) -> None:
    service = serve(folder / "repository/big/1/draft")
    streams = [submit(service, LONG[:30], max_tokens=100, stream=True, ignore_eos=True) for _ in range(4)]
    for stream in streams:
        assert stream.first.wait(30)
        stream.cancelled = True
    assert [answers(submit(service, **request, return_log_probs=True)) for request in REQUESTS] == expected[:10]


def test_the_cache_of_the_draft_takes_its_part(folder: Path, serve: Callable[..., GenerationService]) -> None:
    without, with_draft = serve().memory, serve(folder / "repository/own_fp32/1/draft").memory
    assert with_draft.bytes_per_token == 2 * without.bytes_per_token  # two models of the same form
    assert with_draft.logits == 2 * without.logits
    assert without.weights < with_draft.weights < 2 * without.weights
    limits = GenerationLimits(context=CONTEXT, slots=16, prefill_chunk=16, kv_cache_mib=1, threads=1)
    held = []
    for name in ("own", "own_fp32"):
        service = GenerationService(folder / "repository" / name / "1", limits)
        held.append(service.memory.cache_tokens)
        service.stop()
    assert held == [2**20 // without.bytes_per_token, 2**20 // with_draft.bytes_per_token]


def test_served(folder: Path, tmp_path: Path, expected: list[list[Answer]]) -> None:
    plain = [request for request in REQUESTS if set(request) <= {"prompt", "max_tokens"}]
    with local.running(folder / "repository", tmp_path / "log") as server, Client(server.grpc_url) as client:
        for model in ("big", "own_fp32"):
            for request in plain:
                found = client.generate(request["prompt"], model=model, max_tokens=request["max_tokens"])
                assert found.text == expected[REQUESTS.index(request)][0][0]
        several = client.generate_many("The cache is", 3, model="big", max_tokens=60, ignore_eos=True)
        text = client.generate("The cache is", model="big", max_tokens=60, ignore_eos=True).text
        assert [answer.text for answer in several] == 3 * [text]
        counted: dict[str, str] = {}
        deadline = time.monotonic() + 10
        while int(counted.get("_accepted_", 0)) <= 30:  # the metrics are a moment behind
            assert time.monotonic() < deadline, counted
            with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
                metrics = response.read().decode()
            counted = dict(re.findall(r'trident_model_draft_tokens(\w*)_?total\{model="big".*\} (\d+)', metrics))
    assert int(counted["_"]) >= int(counted["_accepted_"])
    log = (tmp_path / "log").read_text()
    assert re.search(r"trident: big: 4 slots of 128 tokens, drafted by small; ", log)
    assert re.search(r"trident: own: 4 slots of 128 tokens; ", log)


def other_tokens(state: dict[str, Any], kind: str) -> None:
    if kind == "vocabulary":
        vocabulary = state["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    elif kind == "merges":
        state["model"]["merges"].reverse()
    else:
        state["added_tokens"].append(state["added_tokens"][0] | {"id": 700, "content": "<|more|>"})


@pytest.mark.parametrize("kind", ["vocabulary", "merges", "added tokens"])
def test_a_draft_with_other_tokens_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    (spec,) = models_file.select(models_file.load(folder / "models.toml"), "big")
    drafts.check(spec, HuggingFaceFolder(folder / "big"), folder / "repository")
    shutil.copytree(folder / "big", tmp_path / "big")
    file = tmp_path / "big" / "tokenizer.json"
    state = json.loads(file.read_text())
    other_tokens(state, kind)
    file.write_text(json.dumps(state))
    with pytest.raises(ModelsFileError, match=rf"\[big\]: draft 'small' has another {kind} than this model: a draft"):
        drafts.check(spec, HuggingFaceFolder(tmp_path / "big"), folder / "repository")


def test_models_with_states_neither_draft_nor_are_drafted(folder: Path, tmp_path: Path) -> None:
    (spec,) = models_file.select(models_file.load(folder / "models.toml"), "big")
    hybrid = AutoModelForCausalLM.from_config(tiny_models.hybrid_config("lfm2"))
    with pytest.raises(ModelsFileError, match=r"\[big\] has the draft 'small', but models of type 'lfm2' keep states"):
        check_draft(spec, hybrid)
    check_draft(replace(spec, draft=""), hybrid)
    graph = helper.make_graph(
        [], "g", [helper.make_tensor_value_info("past_states.0.conv", TensorProto.FLOAT, [1])], []
    )
    (tmp_path / "small" / "1").mkdir(parents=True)
    onnx.save(helper.make_model(graph), tmp_path / "small" / "1" / "model.onnx")
    with pytest.raises(ModelsFileError, match=r"\[big\]: draft 'small' keeps states, from which a token"):
        drafts.check(spec, HuggingFaceFolder(folder / "big"), tmp_path)


def test_a_model_whose_draft_fails_is_not_exported(folder: Path, tmp_path: Path) -> None:
    for name in ("big", "small"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "small" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "models.toml").write_text(TABLE.format(context=CONTEXT, short=SHORT))
    done = run_export("export", "big", *options(tmp_path))
    assert done.returncode == 1
    assert "small: " in done.stderr
    assert "its draft small is not exported: see there" in done.stderr
    assert read_manifest(tmp_path / "repository", "big") is None
