"""Causal language models that vLLM computes: the Hugging Face folder as it is, and the text files that our side reads.

The gate compares what vLLM says with Hugging Face's eager logits in float32: the log-probabilities of the texts' tokens
(vLLM's `prompt_logprobs`) and of greedy answers behind them, token by token (`logprobs`), as far as both answer alike.
vLLM tells the likeliest tokens of a position, and those that it leaves out count as one, with what is left of the
probability. So the divergence is at most too small, by less than that rest.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trident_export import corpora, disk
from trident_export.errors import EngineError, ModelsFileError, UnsupportedModel
from trident_export.huggingface.converted import SETTINGS_FILES
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.sources import OLDER_WEIGHT_FILES, WEIGHT_FILES
from trident_export.measure import fidelity
from trident_export.measure import texts as texts_gate
from trident_export.models_file import VLLM_DTYPES, ModelSpec
from trident_export.progress import track
from trident_export.tasks import Evaluator, Job
from trident_export.tasks.text_generation import (
    GATE_DECODED,
    GATE_ROWS,
    GREEDY_TOKENS,
    check_texts,
    sample_ids,
    save_text_files,
)
from trident_serving.artefacts import VERSION, WEIGHTS, VllmBuild, read_vllm
from trident_serving.errors import LoadError
from trident_serving.runtime.sampling.defaults import GenerationDefaults
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.vllm import interpreter, translation
from trident_serving.vllm.process import WorkerEnded, WorkerProcess

# Of a position, those that vLLM tells.
LIKELIEST = 1024
# Tokens of a text and its answer in the gate's engine at most, and its cache where the table names none.
GATE_CONTEXT = 512
GATE_CACHE_MIB = 1024
_SMALLEST = 1e-12  # a probability that is 0 by rounding

Logits = NDArray[np.float32]


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """See `trident_export.tasks`."""
    source.check_head(AutoModelForCausalLM)
    assert spec.vllm_limits
    longest = getattr(source.text_config, "max_position_embeddings", None)
    if longest is not None and spec.vllm_limits.context > longest:
        raise ModelsFileError(
            f"[{spec.name}] limits.context is {spec.vllm_limits.context}, the model was built for {longest} positions"
        )
    check_texts(source)


def trace(job: Job) -> None:
    """See `trident_export.tasks`: there is no graph."""
    _build(job.spec, job.spec.default_variant)
    if unused := texts_gate.not_applied(job.source.generation_config):
        job.progress(f"the generation config's {', '.join(unused)} are not applied: a request gives what it wants")
    save_text_files(job.source, job.assets, job.source.text_config.vocab_size)
    try:
        translation.check_defaults(GenerationDefaults.load(job.assets))
    except LoadError as error:
        raise UnsupportedModel(f"[{job.spec.name}] {error}") from None


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`."""
    folder = job.staging / job.spec.public_name(variant) / VERSION
    shutil.copytree(job.assets, folder)
    link_folder(job.source, folder / WEIGHTS)
    _build(job.spec, variant).write(folder)


def _build(spec: ModelSpec, variant: str) -> VllmBuild:
    """What is computed with what.

    Raises:
        EngineError: there is no vLLM.
    """
    try:
        version = interpreter.version(interpreter.find(spec.vllm.python))
    except LoadError as error:
        raise EngineError(f"[{spec.name}] {error}") from None
    return VllmBuild(version, VLLM_DTYPES[variant], spec.trust_remote_code)


def link_folder(source: HuggingFaceFolder, target: Path) -> None:
    """Give a folder's files second names, or copies where the disk is another.

    Raises:
        NoSpace: there is no room for copies.
    """
    target.mkdir(parents=True)
    weights = WEIGHT_FILES if any(source.path.glob(WEIGHT_FILES[0])) else OLDER_WEIGHT_FILES
    code = ("*.py",) if source.trust_remote_code else ()
    files = {file for pattern in (*SETTINGS_FILES, *weights, *code) for file in source.path.glob(pattern)}
    for file in sorted(file for file in files if file.is_file()):
        name = target / file.relative_to(source.path)
        name.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), name)
        except OSError:  # another disk, or another user's file
            disk.require_room(target, file.stat().st_size)
            shutil.copyfile(file, name)


@dataclass(frozen=True)
class Told:
    """What vLLM says of a text and of its own answer to it.

    Attributes:
        tokens: the answer.
        ids: tokens that it tells at each position, int64 [tokens but the last, told]; -1 where it tells fewer.
        log_probs: theirs, float32, the same shape.
    """

    tokens: list[int]
    ids: NDArray[np.int64]
    log_probs: Logits


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
) -> Evaluator:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_logits`.

    `batch_effect` is the largest difference of a log-probability of some texts between a run with others and a run
    without. `greedy_match`, the thorough one, is how many tokens of an answer are Hugging Face's, as of other models.
    """
    limits = spec.vllm_limits
    assert limits
    model = source.reference(AutoModelForCausalLM)
    folder = root / spec.name / VERSION
    tokenizer = TextTokenizer.load(folder)
    texts_gate.check(source, model, folder, limits, corpora.held_out())
    length = GREEDY_TOKENS if thorough else GATE_DECODED
    length = min(length, limits.context // 2)
    samples = sample_ids(tokenizer, limits.context - length, source.text_config.vocab_size, texts)
    found = [_reference(model, ids, length) for ids in track(samples, "Hugging Face")]
    answers, reference = [answer for answer, _ in found], [logits for _, logits in found]
    del model
    gc.collect()  # vLLM's process needs the memory

    def evaluate(variant: str) -> dict[str, float]:
        version_folder = root / spec.public_name(variant) / VERSION
        with _worker(spec, version_folder) as worker:
            alone = [told for ids in samples[:GATE_ROWS] for told in ask(worker, [ids], length)]
            together = ask(worker, samples, length)
        measured = compare(samples, answers, reference, together)
        measured["batch_effect"] = max(map(difference, alone, together))
        measured[fidelity.LONGEST] = float(max(map(len, samples)) + length)
        if thorough:
            measured["greedy_match"] = fidelity.mean_match(answers, [told.tokens for told in together])
        return measured

    return evaluate


def _reference(model: PreTrainedModel, ids: list[int], length: int) -> tuple[list[int], Logits]:
    """Hugging Face's greedy answer to a text, which nothing ends, and the logits of both but for the last token."""
    no_end = model.config.get_text_config().vocab_size  # a token that never comes
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=no_end, pad_token_id=0, repetition_penalty=1.0
    )
    given = torch.tensor([ids])
    found: Any = model.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
    tokens: list[int] = found[0].tolist()
    with torch.inference_mode():
        logits: Logits = model(torch.tensor([tokens[:-1]])).logits[0].float().numpy()
    return tokens[len(ids) :], logits


@contextmanager
def _worker(spec: ModelSpec, version_folder: Path) -> Iterator[WorkerProcess]:
    """A worker with a model as it will be served, but for the length of texts and what it tells.

    Raises:
        EngineError: it does not start, or ends.
    """
    limits = spec.vllm_limits
    assert limits
    short = replace(
        limits, context=min(limits.context, GATE_CONTEXT), kv_cache_mib=limits.kv_cache_mib or GATE_CACHE_MIB
    )
    arguments = translation.engine_arguments(version_folder, short, spec.vllm, read_vllm(version_folder))
    worker = None
    try:
        python = interpreter.find(spec.vllm.python)
        worker = WorkerProcess(python, arguments | {"max_logprobs": LIKELIEST}, limits.threads)
        yield worker
    except (LoadError, WorkerEnded) as error:
        raise EngineError(f"[{spec.name}] {error}") from None
    finally:
        if worker is not None:
            worker.close()


def ask(worker: WorkerProcess, texts: Sequence[Sequence[int]], length: int) -> list[Told]:
    """What vLLM says of texts, which run at once, and of its answers of so many tokens.

    Raises:
        EngineError: it says why not.
        WorkerEnded: it says nothing more.
    """
    likeliest = min(LIKELIEST, worker.ready.vocabulary)
    sampling = {"max_tokens": length, "temperature": 0.0, "logprobs": likeliest, "prompt_logprobs": likeliest}
    for number, ids in enumerate(texts):
        worker.generate(number, {"prompt": list(ids), "sampling": sampling})
    tokens: list[list[int]] = [[] for _ in texts]
    entries: list[list[Any]] = [[] for _ in texts]
    left = set(range(len(texts)))
    for message in worker.messages():
        if "id" not in message:
            continue
        number = message["id"]
        if why := message.get("invalid") or message.get("error"):
            raise EngineError(f"vLLM does not answer the gate: {why}")
        tokens[number] += message["tokens"]
        entries[number] += [*message.get("prompt_log_probs", ()), *message.get("log_probs", ())]
        if "end" in message:
            left.discard(number)
        if not left:
            return [_told(*each) for each in zip(tokens, entries, strict=True)]
    raise WorkerEnded(f"vLLM's process {worker.how()}")


def _told(tokens: list[int], entries: Sequence[Any]) -> Told:
    most = max(len(likeliest) for _, likeliest in entries)
    ids, values = np.full((len(entries), most), -1, np.int64), np.zeros((len(entries), most), np.float32)
    for row, (_, likeliest) in enumerate(entries):
        ids[row, : len(likeliest)] = [token for token, _ in likeliest]
        values[row, : len(likeliest)] = [value for _, value in likeliest]
    return Told(tokens, ids, values)


def compare(
    samples: Sequence[list[int]], answers: Sequence[list[int]], reference: Sequence[Logits], found: Sequence[Told]
) -> dict[str, float]:
    """The measures of `fidelity.compare_logits`, of each text and of its answer up to the first other token.

    Args:
        answers: Hugging Face's.
        reference: its logits of texts and answers, [tokens but the last, vocabulary].
    """
    expected, actual, ids = [], [], []
    for text, answer, logits, told in zip(samples, answers, reference, found, strict=True):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, told.tokens, strict=False)))
        rows = min(len(text) - 1 + same + 1, len(logits))
        expected.append(logits[:rows])
        actual.append(filled(told, logits)[:rows])
        ids.append([*text, *answer][:rows])
    return fidelity.compare_logits(expected, actual, ids)


def filled(told: Told, reference: Logits) -> Logits:
    """Log-probabilities of every token: what vLLM leaves out has the rest, spread as Hugging Face spreads its own.

    The divergence from Hugging Face is then that of the tokens that are told and of all others as one.
    """
    expected = fidelity.log_softmax(reference)
    result = np.empty_like(expected)
    for row, (ids, values, own) in enumerate(zip(told.ids, told.log_probs, expected, strict=True)):
        known = ids >= 0
        left = np.ones(len(own), bool)
        left[ids[known]] = False
        rest, own_rest = 1.0 - np.exp(values[known].astype(np.float64)).sum(), np.exp(own[left]).sum()
        result[row] = own + np.log(max(rest, _SMALLEST)) - np.log(max(own_rest, _SMALLEST))
        result[row, ids[known]] = values[known]
    return result.astype(np.float32)


def difference(first: Told, second: Told) -> float:
    """The largest difference of a log-probability that both tell, up to the first other token of their answers."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first.tokens, second.tokens, strict=False)))
    rows = len(first.ids) - len(first.tokens) + min(same + 1, len(first.tokens))
    largest = 0.0
    for one, other in zip(_rows(first, rows), _rows(second, rows), strict=True):
        largest = max([largest, *(abs(value - other[token]) for token, value in one.items() if token in other)])
    return largest


def _rows(told: Told, count: int) -> Iterator[Mapping[int, float]]:
    for ids, values in zip(told.ids[:count], told.log_probs[:count], strict=True):
        yield {int(token): float(value) for token, value in zip(ids, values, strict=True) if token >= 0}
