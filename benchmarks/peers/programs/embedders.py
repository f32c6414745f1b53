"""Libraries that embed texts: sentence-transformers with each of its backends, infinity and fastembed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.interface import THREADS, Floats


class SentenceTransformers:
    """sentence-transformers; its ONNX and OpenVINO backends run the model that they export themselves."""

    def __init__(self, source: Path, work: Path, backend: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(THREADS)
        self.name = f"sentence-transformers {backend}"
        self.weights = source if backend == "torch" else work / backend
        if backend != "torch" and not self.weights.exists():
            shutil.copytree(source, self.weights)
        self._model = SentenceTransformer(str(self.weights), device="cpu", backend=backend)
        if backend == "onnx" and not (self.weights / "onnx/model.onnx").exists():
            self._model.save_pretrained(str(self.weights))  # the graph that it has exported, for fastembed, too

    def embed(self, texts: Sequence[str], batch_size: int) -> Floats:
        """See `Embedder.embed`."""
        found: Floats = self._model.encode(
            list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return found


class Infinity:
    """infinity's engine in process; it forms batches itself, up to the asked size."""

    name = "infinity torch"

    def __init__(self, source: Path, work: Path) -> None:
        import torch
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs

        torch.set_num_threads(THREADS)
        self.weights = source
        self._engine = AsyncEmbeddingEngine.from_args(
            EngineArgs(model_name_or_path=str(source), engine="torch", device="cpu", bettertransformer=False)
        )
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.astart())

    def embed(self, texts: Sequence[str], batch_size: int) -> Floats:
        """See `Embedder.embed`."""
        rows: list[Floats] = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            found, _ = self._loop.run_until_complete(self._engine.embed(part))
            rows += found
        vectors = np.array(rows)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Fastembed:
    """fastembed with the ONNX graph that the folder of the model holds, or that sentence-transformers exported."""

    name = "fastembed"

    def __init__(self, source: Path, work: Path) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        exported = work.parent / "sentence-transformers" / "onnx"
        if not (exported / "onnx/model.onnx").exists():
            raise RuntimeError("it needs an ONNX graph, which the peer sentence-transformers exports")
        self.weights = exported / "onnx/model.onnx"
        TextEmbedding.add_custom_model(
            model="bench/minilm",
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(url="local"),
            dim=384,
            model_file="onnx/model.onnx",
        )
        self._model = TextEmbedding("bench/minilm", specific_model_path=str(exported), threads=THREADS)

    def embed(self, texts: Sequence[str], batch_size: int) -> Floats:
        """See `Embedder.embed`."""
        return np.array(list(self._model.embed(list(texts), batch_size=batch_size)))
