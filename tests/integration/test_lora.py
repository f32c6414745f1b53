"""Adapters beside their base on a real server: each request has its own, and is answered as peft answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_models
from tests.conftest import post
from tests.integration.test_drafts import answers, submit
from tests.integration.test_engine_limits import metrics
from tests.unit.test_adapters import adapter
from trident_client import Client, InvalidRequestError, NotFoundError, UnavailableError
from trident_export import configs, install, models_file, recipes, tasks
from trident_export.errors import ExportError, FidelityError
from trident_export.graphs import lora as graphs_lora
from trident_export.graphs.editing import load, save
from trident_export.graphs.lora import Lora, Low
from trident_export.huggingface import lora, sources
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import fidelity
from trident_export.passes import Pass, Rotate
from trident_export.passes.smooth import Smooth
from trident_export.tasks import text_generation
from trident_serving.artefacts import VERSION, DraftSettings
from trident_serving.generation import draft_model
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.service import GenerationService
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer
from trident_serving.schema.limits import GenerationLimits

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

ADAPTERS: dict[str, LoraConfig] = {
    "queries": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "all.layers": LoraConfig(
        r=8,
        lora_alpha=4,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 2},
    ),
    "Feed-forward": LoraConfig(r=2, target_modules=["k_proj", "down_proj", "up_proj"], layers_to_transform=[1]),
}
NAMES = [None, *ADAPTERS]
# The numbers of a random model are near each other.
GATES = "gates = { int8 = { top1 = 0.85 }, int8_cache = { top1 = 0.8 } }\n"
PROMPTS = ["the cat sat on", "rain fell all night in the old town and", "1 2 3 4", "B"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales of norms are not all the same, as they would be in a new model: such a graph is not rotated."""
    path = tiny_models.make_causal(tmp_path_factory.mktemp("lora") / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: adapter(root / f"{index}", base, config) for index, (name, config) in enumerate(ADAPTERS.items())}


def spec_of(root: Path, base: Path, folders: dict[str, Path], variants: str = '["fp32"]') -> models_file.ModelSpec:
    named = ", ".join(f'"{name}" = "{folder}"' for name, folder in folders.items())
    entry = tiny_models.causal_entry(base, slots=8, threads=1).replace('["fp32"]', variants)
    gates = GATES if "int8" in variants else ""
    (root / "models.toml").write_text(tiny_models.models_toml({"m": f"{entry}adapters = {{ {named} }}\n{gates}"}))
    return models_file.load(root / "models.toml")[0]


@pytest.fixture(scope="module")
def spec(base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> models_file.ModelSpec:
    return spec_of(tmp_path_factory.mktemp("export"), base, folders, '["fp32", "int8", "int8_cache"]')


@pytest.fixture(scope="module", autouse=True)
def two_blocks() -> Iterator[None]:
    """The first two adapters share a block, the third has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_lora, "COLUMNS", 16)
        yield


@pytest.fixture(scope="module")
def repository(spec: models_file.ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants, each of which has passed its gate with each adapter."""
    root = tmp_path_factory.mktemp("repository")
    install.export([spec], root / "repository", root, root / "cache", lambda line: None)
    return root / "repository"


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    running = local.start(repository, tmp_path_factory.mktemp("server") / "log")
    yield running
    running.stop()


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def peft(base: Path, folders: dict[str, Path]) -> dict[str | None, Any]:
    """Hugging Face's model without and with each adapter."""

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()

    return {None: model()} | {name: PeftModel.from_pretrained(model(), str(f)).eval() for name, f in folders.items()}


def ask(client: Client, name: str | None, prompt: str, **options: Any) -> Any:
    return client.generate(
        prompt, model="m", max_tokens=24, ignore_eos=True, lora_name=name, return_log_probs=True, **options
    )


def test_equal_to_peft(client: Client, base: Path, peft: dict[str | None, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = set()
    for name, model in peft.items():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                said = model.generate(
                    input_ids=ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
                )
                logits = model(input_ids=said).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            tokens = said[0, ids.shape[1] :]
            answer = ask(client, name, prompt)
            assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
            np.testing.assert_allclose(answer.log_probs, logits.gather(1, tokens[:, None])[:, 0], atol=1e-4)
            texts.add(answer.text)
    assert len(texts) == len(PROMPTS) * len(NAMES)  # each adapter says something else


@pytest.mark.parametrize("model", ["m", "m_int8", "m_int8_cache"])
def test_bit_exact_in_company(repository: Path, model: str) -> None:
    """Prompts, single tokens and drafts of a mix of adapters in one run, against each of them alone and whole."""
    graph = onnx.load(str(repository / model / VERSION / "model.onnx"), load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("If") == 11  # 8 of the first block, 3 of the second
    decoder = OnnxDecoder(repository / model / VERSION / "model.onnx", slots=8, context=64, longest_run=64, threads=2)
    assert decoder.adapters == tuple(ADAPTERS)
    random = np.random.default_rng(0)
    texts = [random.integers(3, 500, 40).tolist() for _ in range(8)]
    texts[4:] = texts[:4]  # the same texts with other adapters
    chosen = [0, 1, 2, 3, 1, 2, 3, 0]
    alone = [decoder.run([SlotTokens(0, 0, ids, 40, adapter=chosen[row])]).copy() for row, ids in enumerate(texts)]
    assert all(float(np.abs(alone[row] - alone[row + 4]).max()) > 0.1 for row in range(4))
    position = [0] * 8
    while min(position) < 40:
        rows = [row for row in range(8) if position[row] < 40 and random.random() < 0.7]
        items = []
        for row in rows:
            piece = texts[row][position[row] : position[row] + int(random.choice([1, 1, 3, 17]))]
            items.append(SlotTokens(row, position[row], piece, len(piece), adapter=chosen[row]))
        found = decoder.run(items) if items else np.empty((0, 1))
        begin = 0
        for item in items:
            end = item.start + len(item.tokens)
            np.testing.assert_array_equal(found[begin : begin + item.wanted], alone[item.slot][item.start : end])
            position[item.slot], begin = end, begin + item.wanted


@pytest.mark.parametrize("steps", [[Rotate()], [Smooth(samples=4)], [Rotate(), Smooth(samples=4)]], ids=repr)
def test_passes_that_change_no_answer_change_none_of_an_adapter(
    spec: models_file.ModelSpec, tmp_path: Path, steps: list[Pass]
) -> None:
    source = sources.fetch(spec, tmp_path, tmp_path, lambda line: None)
    job = tasks.Job(spec, source, tmp_path, lambda line: None)
    tasks.trace(job)
    path = job.graphs / "model.onnx"
    runs = text_generation.calibration_runs(job)
    save(recipes.transform(load(path), steps, runs), tmp_path / "model.onnx")
    weights = [
        {each.name: numpy_helper.to_array(each) for each in onnx.load(str(file)).graph.initializer}
        for file in (path, tmp_path / "model.onnx")
    ]
    name = "adapters/model/model/layers.1/self_attn/qkv_proj/block_1/A"
    assert not np.allclose(weights[0][name], weights[1][name])
    ids = list(range(7, 40))
    for number in range(len(NAMES)):
        before, after = (
            OnnxDecoder(file, slots=1, context=64, longest_run=64, threads=1).run(
                [SlotTokens(0, 0, ids, len(ids), adapter=number)]
            )
            for file in (path, tmp_path / "model.onnx")
        )
        np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))


def test_answers_do_not_depend_on_neighbours(client: Client) -> None:
    jobs = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    alone = [ask(client, *job, prompt_lookup=False) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(client, *job), jobs))
    assert [(a.text, a.log_probs) for a in together] == [(a.text, a.log_probs) for a in alone]
    with ThreadPoolExecutor(len(jobs)) as pool:
        options = {"temperature": 1.0, "random_seed": 7}
        sampled = list(pool.map(lambda job: ask(client, *job, **options), jobs * 2))
    assert [a.text for a in sampled[: len(jobs)]] == [a.text for a in sampled[len(jobs) :]]


def test_prefixes_are_reused_by_their_own_adapter_only(server: LocalServer, client: Client) -> None:
    prompt = "a beginning that many requests share, long enough to be worth a copy: "
    before = metrics(server, "m")
    first = [ask(client, name, prompt) for name in NAMES]
    between = metrics(server, "m")
    assert between["prefix_hit_tokens_total"] == before["prefix_hit_tokens_total"]
    again = [ask(client, name, prompt) for name in NAMES]
    after = metrics(server, "m")
    ran = between["prompt_tokens_total"] - before["prompt_tokens_total"]
    assert after["prefix_hit_tokens_total"] - between["prefix_hit_tokens_total"] == ran - len(NAMES)
    assert [(a.text, a.log_probs) for a in again] == [(a.text, a.log_probs) for a in first]


def test_a_draft_model_and_prompt_lookup_beside_adapters(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draft for every adapter, the model as the base does, and slots are shared: answers are as alone."""
    monkeypatch.setattr(draft_model, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # it takes no time
    monkeypatch.setattr(draft_model.ModelAcceptance, "chance", lambda self: 0.9)
    plain, drafted = tmp_path / "plain" / "1", tmp_path / "drafted" / "1"
    for copy in (plain, drafted):
        shutil.copytree(repository / "m" / "1", copy)
    shutil.copytree(repository / "m_int8" / "1", drafted / "draft", ignore=shutil.ignore_patterns("*.json", "*.jinja"))
    DraftSettings("m_int8", 128, 16).write(drafted / "draft")
    limits = GenerationLimits(context=128, slots=4, prefill_chunk=16, threads=1)
    alone = GenerationService(plain, replace(limits, prefix_reuse=False, prompt_lookup=False))
    together = GenerationService(drafted, limits)
    shared = "a beginning that many requests share, long enough to be worth a copy: 1 2 3 1 2 3 1"
    requests: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "lora_name": name or "",
            "max_tokens": 40,
            "ignore_eos": True,
            "return_log_probs": True,
            **more,
        }
        for more in ({}, {"n": 2}, {"guided_regex": "[a-z ]{9,}"}, {"temperature": 1.0, "random_seed": 5})
        for prompt in (shared, shared[:60])
        for name in NAMES
    ]
    expected = [answers(submit(alone, **request)) for request in requests]
    for _ in range(2):
        assert [answers(each) for each in [submit(together, **request) for request in requests]] == expected
    counters = together.recorder.drain().counters
    assert counters["model_draft_tokens"] > counters["model_draft_tokens_accepted"] > 100
    assert counters["draft_tokens"] - counters["model_draft_tokens"] > 100
    assert counters["prefix_hit_tokens"] > 500
    for service in (alone, together):
        service.stop()


@pytest.mark.parametrize("name", ["gone", "queries ", "QUERIES", "../queries", "0", "é" * 500])
def test_an_unknown_adapter_is_refused_and_hurts_nobody(client: Client, name: str) -> None:
    expected = ask(client, "queries", PROMPTS[0])
    stream = client.stream(PROMPTS[0], model="m", max_tokens=24, ignore_eos=True, lora_name="queries")
    first = next(stream).text
    with pytest.raises(InvalidRequestError, match=r"lora_name .* its adapters are queries, all\.layers, Feed-forward;"):
        ask(client, name, PROMPTS[0])
    assert first + "".join(chunk.text for chunk in stream) == expected.text


def test_over_http_and_in_chat_lists(server: LocalServer, client: Client) -> None:
    url = f"{server.http_url}/v2/models/m/generate"
    body = {"text_input": PROMPTS[0], "max_tokens": 24, "ignore_eos": True}
    for name in NAMES:
        status, text = post(url, body | ({"lora_name": name} if name else {"lora_name": ""}))
        assert (status, json.loads(text)["text_output"]) == (200, ask(client, name, PROMPTS[0]).text)
    status, text = post(url, body | {"lora_name": "gone"})
    assert status == 400
    assert "lora_name 'gone' is not known" in text
    assert client.adapters("m") == list(ADAPTERS)
    two = client.generate_many(PROMPTS[0], 2, model="m", max_tokens=24, ignore_eos=True, lora_name="queries")
    assert [answer.text for answer in two] == [ask(client, "queries", PROMPTS[0]).text] * 2


def test_unloaded_and_loaded_with_the_model(server: LocalServer, client: Client) -> None:
    expected = [ask(client, name, PROMPTS[1]).text for name in NAMES]
    url = f"{server.http_url}/v2/repository/models/m"
    assert post(f"{url}/unload", {}, server.admin_headers)[0] == 200
    with pytest.raises((NotFoundError, UnavailableError)):
        ask(client, "queries", PROMPTS[1])
    assert post(f"{url}/load", {}, server.admin_headers)[0] == 200
    assert [ask(client, name, PROMPTS[1]).text for name in NAMES] == expected


def test_a_damaged_adapter_is_caught(repository: Path, spec: models_file.ModelSpec, tmp_path: Path) -> None:
    """One adapter's sign is wrong in one layer of a written graph; or the graph has other adapters."""
    source = sources.fetch(spec, tmp_path, tmp_path, lambda line: None)
    tokenizer = text_generation.TextTokenizer.load(repository / "m" / VERSION)
    samples = text_generation.sample_ids(tokenizer, 64, 512, tasks.corpora.held_out())
    references = text_generation.adapter_references(source, samples)
    whole = text_generation.measure_adapters(repository / "m" / VERSION, samples, references)
    for measured in whole.values():
        fidelity.check("text-generation", "fp32", measured)
    for variant in ("fp32", "int8"):
        graph = onnx.load(str(repository / spec.public_name(variant) / VERSION / "model.onnx"))
        name = "adapters/model/model/layers.1/mlp/down_proj/block_1/B_0"  # the third adapter's
        (tensor,) = (each for each in graph.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), name))
        folder = tmp_path / variant
        folder.mkdir()
        onnx.save(graph, str(folder / "model.onnx"), save_as_external_data=True, location="data")
        found = text_generation.measure_adapters(folder, samples, references)
        measured = {"kl": 0.0, "top1": 1.0, "batch_effect": 0.0}
        for name, each in found.items():
            measured |= fidelity.of_adapter(each, name)
        with pytest.raises(FidelityError, match=f"{variant} with adapter Feed-forward does not compute .* top1 is"):
            fidelity.check("text-generation", variant, measured, spec.gates.get(variant))
        others = {name: value for name, value in measured.items() if "Feed" not in name}
        fidelity.check("text-generation", variant, others, spec.gates.get(variant))
    other = text_generation.AdapterReferences(references.names[::-1])
    with pytest.raises(FidelityError, match="has the adapters"):
        text_generation.measure_adapters(repository / "m" / VERSION, samples, other)


def test_an_export_whose_adapter_is_left_out_fails(
    base: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lora.read

    def halved(*arguments: Any) -> Lora:
        found = read(*arguments)
        return Lora(found.name, {name: Low(low.down, low.up / 2) for name, low in found.layers.items()})

    monkeypatch.setattr(lora, "read", halved)
    spec = spec_of(tmp_path, base, {"queries": folders["queries"]})
    with pytest.raises(ExportError, match="fp32 with adapter queries does not compute what Hugging Face computes"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "uses DoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "has biases"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "saves whole layers (lm_head)"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "changes its base"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]), "trains tokens of the embedding"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "adapts model.embed_tokens: only linear layers"),
        (LoraConfig(r=2, target_modules=["lm_head"]), "adapts lm_head: only linear layers"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is an adapter of kind IA3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_only_be_merged(base: Path, tmp_path: Path, config: PeftConfig, sentence: str) -> None:
    folder = adapter(tmp_path / "adapter", base, config)
    with pytest.raises(ExportError) as refused:
        lora.read(HuggingFaceFolder(base), "x", folder, AutoModelForCausalLM)
    assert sentence in str(refused.value)
    assert "merge it by a table of its own, source = { ..., adapter = ... }" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_tokenizer_or_base_is_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders["queries"], tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(copied)
    lora.check(copied, HuggingFaceFolder(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(copied)
    spec = spec_of(tmp_path, base, {"queries": copied})
    with pytest.raises(ExportError, match="has another tokenizer than"):
        sources.fetch(spec, tmp_path, tmp_path, lambda line: None)
    other = tiny_models.make_causal(tmp_path / "other", "llama", seed=5)
    spec = spec_of(tmp_path, other, {"queries": folders["queries"]})
    with pytest.raises(ExportError, match="is an adapter of another base"):
        sources.fetch(spec, tmp_path, tmp_path, lambda line: None)


def test_layers_that_are_no_matmul_of_tokens_are_refused(tmp_path: Path) -> None:
    gpt2 = tiny_models.make_causal(tmp_path / "gpt2", "gpt2")
    folder = adapter(tmp_path / "adapter", gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    spec = spec_of(tmp_path, gpt2, {"x": folder})
    with pytest.raises(ExportError, match=r"adapts transformer\.h\.0\.attn\.c_attn: only linear layers"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path, lambda line: None)


def test_an_adapter_changes_the_fingerprint_and_the_config(
    spec: models_file.ModelSpec, repository: Path, folders: dict[str, Path]
) -> None:
    assert install.is_current(spec, repository, repository)
    built = configs.build(spec)["m_int8"]
    assert built.parameters["adapters"].string_value == "queries,all.layers,Feed-forward"
    settings = folders["queries"] / "adapter_config.json"
    before = settings.read_text()
    try:
        settings.write_text(json.dumps(json.loads(before) | {"lora_alpha": 99}))
        assert not install.is_current(spec, repository, repository)
    finally:
        settings.write_text(before)
