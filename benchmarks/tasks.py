"""Compares encoders and encoder-decoders with transformers' pipelines and `generate`.

Embeddings are MiniLM's. Classification is MiniLM's body with a random head, translation a model of OPUS-MT's size (six
and six layers, 512 wide) with random weights, which is as fast as a trained one; answers have a fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    pipeline,
)

from benchmarks.peers.environments import PeerError
from benchmarks.peers.interface import Embedder
from trident_client import Client
from trident_export import corpora, install, models_file, progress
from trident_export.measure import fidelity
from trident_serving.launcher import local

TEXTS = corpora.held_out()[:16]
SENTENCES = [text[:80] for text in TEXTS]
CALLERS = (1, 16)
TRANSLATION_CALLERS = 8
TRANSLATED_TOKENS = 32

# What is measured: a name "group | peer", and a function that returns units of work done in one round.
Peers = dict[str, Callable[[], int]]


@contextmanager
def served(cache: Path, minilm: Path, smollm2: Path) -> Iterator[Client]:
    """A server with the models that are made for this."""
    folder = cache / "bench"
    specs = [_classifier(folder, minilm), _translator(folder, smollm2)]
    install.export(specs, folder / "repository", folder, cache, progress.say)
    with (
        local.running(folder / "repository", folder / "server.log") as server,
        Client(server.grpc_url, timeout=600) as client,
    ):
        yield client


def _classifier(folder: Path, minilm: Path) -> models_file.ModelSpec:
    path = folder / "classifier"
    if not path.exists():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=4).save_pretrained(path)
        AutoTokenizer.from_pretrained(minilm).save_pretrained(path)
    table = {
        "task": "text-classification",
        "source": {"path": str(path)},
        "variants": ["fp32", "int8"],
        "limits": {"labels": 4, "max_tokens": 256, "buckets": [128]},
    }
    return models_file.parse("classifier", table)


def _translator(folder: Path, smollm2: Path) -> models_file.ModelSpec:
    path = folder / "translator"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        torch.manual_seed(0)
        sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _LAYERS.items()}
        config = BartConfig(vocab_size=len(tokenizer), d_model=512, max_position_embeddings=512, **sizes)
        config.update({"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2})
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.update(forced_eos_token_id=None)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    table = {
        "task": "translation",
        "source": {"path": str(path)},
        "variants": ["fp32"],
        "limits": {"max_source_tokens": 256, "max_target_tokens": 64},
    }
    return models_file.parse("translator", table)


_LAYERS = {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}


def embeddings(client: Client, folder: Path, others: Sequence[Embedder] = ()) -> Peers:
    """Texts embedded one by one and sixteen at once.

    Args:
        others: peers that are run with batches of 1 and 16.
    """
    pipe = pipeline("feature-extraction", model=str(folder), tokenizer=str(folder), device="cpu", truncation=True)
    peers = _encoder_peers(
        "embeddings", pipe, lambda text, variant: client.embed(text, model=f"minilm{variant}", truncate=True)
    )

    def embed(other: Embedder, size: int) -> int:
        return len(other.embed(TEXTS * 2, size))

    for callers in CALLERS:
        group = f"embeddings, {callers} caller{'s' if callers > 1 else ''}, texts/s"
        for other in others:
            name = f"{group} | {other.name}, batch_size {callers}"
            peers[name] = lambda other=other, size=callers: embed(other, size)
    return peers


def cosines(client: Client, folder: Path, others: Sequence[Embedder], failed: dict[str, str]) -> dict[str, float]:
    """The worst cosine of each embedder's vectors with Hugging Face's in float32, by name; who fails is noted."""
    texts = corpora.held_out()[:64]
    reference = _hugging_face(folder, texts)
    found = {}
    ways: dict[str, Callable[[], Any]] = {
        f"Trident {variant or 'fp32'}": lambda variant=variant: client.embed(
            texts, model=f"minilm{variant and '_' + variant}", truncate=True
        )
        for variant in ("", "int8")
    }
    ways |= {other.name: lambda other=other: other.embed(texts, 16) for other in others}
    for name, embed in ways.items():
        try:
            found[name] = fidelity.compare_embeddings(reference, np.array(embed()))["worst_cosine"]
        except PeerError as error:
            failed[name] = str(error)
    return found


def _hugging_face(folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """Means of the last hidden states, normalized, as MiniLM's sentence-transformers files say."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            rows.append(torch.nn.functional.normalize(model(**tokens).last_hidden_state[0].mean(dim=0), dim=0).numpy())
    return np.stack(rows)


def classification(client: Client, cache: Path) -> Peers:
    """The same for labels."""
    path = str(cache / "bench/classifier")
    pipe = pipeline("text-classification", model=path, tokenizer=path, device="cpu", truncation=True, max_length=256)
    return _encoder_peers(
        "classification", pipe, lambda text, variant: client.classify(text, model=f"classifier{variant}", truncate=True)
    )


def _encoder_peers(name: str, pipe: Any, ask: Callable[[str, str], object]) -> Peers:
    def hugging_face(batch_size: int) -> int:
        pipe(TEXTS * 2, batch_size=batch_size)
        return 2 * len(TEXTS)

    def trident(callers: int, variant: str) -> int:
        with ThreadPoolExecutor(callers) as pool:
            return len(list(pool.map(lambda text: ask(text, variant), TEXTS * 4)))

    peers: Peers = {}
    for callers in CALLERS:
        group = f"{name}, {callers} caller{'s' if callers > 1 else ''}, texts/s"
        for size in (1, 16):
            peers[f"{group} | transformers pipeline, batch_size {size}"] = lambda size=size: hugging_face(size)
        peers[f"{group} | Trident fp32"] = lambda callers=callers: trident(callers, "")
        peers[f"{group} | Trident int8"] = lambda callers=callers: trident(callers, "_int8")
    return peers


def translation(client: Client, cache: Path) -> Peers:
    """Answers of a fixed length, greedy and by four beams."""
    path = cache / "bench/translator"
    model = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = {"max_new_tokens": TRANSLATED_TOKENS, "min_new_tokens": TRANSLATED_TOKENS}

    def hugging_face(beams: int) -> int:
        with torch.inference_mode():
            for text in SENTENCES[:4]:
                ids = torch.tensor([tokenizer(text).input_ids])
                model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, **length)
        return 4

    def trident(beams: int) -> int:
        options = {"max_tokens": TRANSLATED_TOKENS, "min_tokens": TRANSLATED_TOKENS, "num_beams": beams}
        with ThreadPoolExecutor(TRANSLATION_CALLERS) as pool:
            asked = pool.map(lambda text: client.translate(text, model="translator", **options), SENTENCES)
            return len(list(asked))

    peers: Peers = {}
    for beams in (1, 4):
        group = f"translation, {TRANSLATION_CALLERS} callers, {beams} beam{'s' if beams > 1 else ''}, answers/s"
        peers[f"{group} | transformers generate, one by one"] = lambda beams=beams: hugging_face(beams)
        peers[f"{group} | Trident fp32"] = lambda beams=beams: trident(beams)
    return peers
