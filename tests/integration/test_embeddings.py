"""Embeddings of MiniLM through the real server, against Hugging Face."""

from __future__ import annotations

import importlib
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, serialized_byte_size, shared_memory

from trident_client import Client, InvalidRequestError, _admin_key
from trident_export import corpora
from trident_serving.launcher.admin_key import HEADER
from trident_serving.launcher.local import LocalServer


@pytest.fixture(scope="module")
def texts() -> list[str]:
    paragraphs = corpora.held_out()
    return [*paragraphs, *(paragraph[: 20 + 17 * row] for row, paragraph in enumerate(paragraphs))]


@pytest.fixture(scope="module")
def hugging_face(minilm_folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """Mean pooling over the mask and normalization, as the model's card says; in float32."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            mean = model(**batch).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def test_equal_to_hugging_face(client: Client, texts: list[str], hugging_face: NDArray[np.float32]) -> None:
    found = client.embed(texts, truncate=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, hugging_face, atol=1e-5, rtol=0)


def test_int8_is_close_to_hugging_face(client: Client, texts: list[str], hugging_face: NDArray[np.float32]) -> None:
    found = client.embed(texts, model="minilm_int8", truncate=True)
    assert (found * hugging_face).sum(axis=1).min() > 0.99
    assert np.abs(found - hugging_face).max() > 1e-4  # it is another model than fp32


def test_mixed_lengths_share_runs_and_keep_their_answers(
    server: LocalServer, client: Client, texts: list[str], hugging_face: NDArray[np.float32]
) -> None:
    """16 callers with one text a request: the dynamic batcher joins those of one bucket."""
    before = batch_counts(server, "minilm_model")
    rows = list(range(len(texts))) * 4
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda row: client.embed(texts[row], truncate=True), rows))
    np.testing.assert_allclose(np.stack(found), hugging_face[rows], atol=1e-5, rtol=0)
    after = batch_counts(server, "minilm_model")
    assert after[0] - before[0] == len(rows)
    assert (after[0] - before[0]) / (after[1] - before[1]) > 2


def batch_counts(server: LocalServer, model: str) -> tuple[float, float]:
    """Inferences and runs of a model so far."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        metrics = response.read().decode()

    def value(name: str) -> float:
        found = re.search(rf'^{name}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', metrics, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    return value("nv_inference_count"), value("nv_inference_exec_count")


def test_truncation_is_asked_for(client: Client) -> None:
    long = "the cat sat on the mat " * 60
    with pytest.raises(InvalidRequestError, match="has 362 tokens, the model takes 256"):
        client.embed(long)
    # 254 words and the two special tokens are what the model sees.
    words = long.split()
    np.testing.assert_allclose(client.embed(long, truncate=True), client.embed(" ".join(words[:254])), atol=1e-6)


def test_a_single_text_and_none(client: Client) -> None:
    assert client.embed("hello").shape == (384,)
    np.testing.assert_allclose(client.embed("hello"), client.embed(["hello"])[0], atol=1e-7)
    assert client.embed([]).size == 0
    assert client.embed(["hello"] * 70).shape == (70, 384)


def test_similar_texts_are_closer(client: Client) -> None:
    cat, kitten, finance = client.embed(["a cat on a sofa", "a kitten on a couch", "quarterly interest rates"])
    assert cat @ kitten > 0.6
    assert cat @ finance < 0.2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_texts_and_vectors_in_shared_memory(server: LocalServer, client: Client, protocol: str) -> None:
    """As perf_analyzer has them with --shared-memory system; only whoever has the admin key registers a region."""
    library = importlib.import_module(f"tritonclient.{protocol}")
    key = server.admin_headers[HEADER]
    headers = {HEADER if protocol == "http" else _admin_key.METADATA: key}
    data = np.array([["a cat"], ["The dog lay under the tree."]], np.object_)
    size, answered = serialized_byte_size(serialize_byte_tensor(data)), 2 * 384 * 4
    name = f"trident-test-{os.getpid()}-{protocol}"
    region = shared_memory.create_shared_memory_region(name, f"/{name}", size + answered)
    url = server.grpc_url if protocol == "grpc" else f"127.0.0.1:{server.http_port}"
    with library.InferenceServerClient(url) as triton:
        try:
            shared_memory.set_shared_memory_region(region, [serialize_byte_tensor(data)])
            with pytest.raises(InferenceServerException, match="restricted, expecting header"):
                triton.register_system_shared_memory(name, f"/{name}", size + answered)
            triton.register_system_shared_memory(name, f"/{name}", size + answered, headers=headers)
            given, wanted = library.InferInput("text_input", [2, 1], "BYTES"), library.InferRequestedOutput("embedding")
            given.set_shared_memory(name, size)
            wanted.set_shared_memory(name, answered, size)
            triton.infer("minilm", [given], outputs=[wanted])
            found = shared_memory.get_contents_as_numpy(region, np.float32, [2, 384], size)
            np.testing.assert_array_equal(found, client.embed(data[:, 0].tolist()))
        finally:
            triton.unregister_system_shared_memory(name, headers=headers)
            shared_memory.destroy_shared_memory_region(region)
