"""Whether the text side of an encoder-decoder's artefacts is Hugging Face's: sources, answers, and what a request gets.

The reference is transformers' own tokenizer and `generate` with the folder's settings. Answers to silent requests are
compared token for token, of float32 variants: beams and rules are the same for all, and rounded weights choose
otherwise now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trident_export.errors import FidelityError
from trident_export.measure.texts import CORPUS_CHARACTERS, CORPUS_TEXTS, EDGES
from trident_serving.errors import InvalidRequest
from trident_serving.schema.fields import LongInput
from trident_serving.schema.limits import Seq2SeqLimits
from trident_serving.seq2seq.decoder import Seq2SeqDecoder
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.request import GenerationDefaults, RequestParser, Seq2SeqRequest, positions
from trident_serving.seq2seq.search import Found, SearchParams
from trident_serving.seq2seq.source import SourceSettings, SourceText, TargetStyle

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Answers that are compared, and their longest.
ANSWERS, ANSWER_TOKENS = 4, 24
# Scores nearer than this are a tie, which float noise decides.
_TIE = 1e-4


def check_sources(tokenizer: Any, folder: Path, texts: Sequence[str]) -> None:
    """Texts to source tokens, and tokens to text.

    Args:
        tokenizer: of the model's folder.
        folder: a version folder.

    Raises:
        FidelityError: one is otherwise.
    """
    settings, served = SourceSettings.load(folder), SourceText.load(folder, 10**6)
    if settings.source_lang:
        tokenizer.src_lang = settings.source_lang
    before = settings.text_prefix
    if settings.target_style is TargetStyle.TEXT_CODE and settings.target_lang:
        before = f">>{settings.target_lang}<<"
    # The last names special tokens: a tokenizer that is SentencePiece's own does not find them in a text.
    edges = EDGES if tokenizer.is_fast else EDGES[:-1]
    for text in [*edges, *(text[:CORPUS_CHARACTERS] for text in texts[:: max(1, len(texts) // CORPUS_TEXTS)])]:
        ids = tokenizer(before + text).input_ids
        try:
            found = list(served.windows(text, LongInput.ERROR)[0].ids)
        except InvalidRequest:
            continue  # a script that the vocabulary does not know
        if found != ids:
            raise FidelityError(
                f"the source {text!r} has the tokens {found} where Hugging Face's tokenizer gives {ids}"
            )
        if getattr(tokenizer, "separate_vocabs", False):  # Marian's with a vocabulary for each side
            ids = tokenizer(text_target=text).input_ids
        whole, shown = tokenizer.decode(ids, skip_special_tokens=True), served.decode(ids)
        if shown != whole:
            raise FidelityError(f"the served tokenizer writes {shown!r} where Hugging Face's writes {whole!r}")


def check_answers(
    model: PreTrainedModel, config: GenerationConfig, folder: Path, limits: Seq2SeqLimits, texts: Sequence[str]
) -> None:
    """A request that names nothing but its text against `generate`, token for token.

    Args:
        config: the folder's, with its settings for the task.

    Raises:
        FidelityError: an answer is another.
    """
    requests = silent_requests(folder, limits, texts)
    beams = min(config.num_beams or 1, limits.max_beams)
    expected = generated(model, config, folder, limits, requests, beams)
    for (tokens, score), found in zip(expected, _served(folder, limits, requests), strict=True):
        if list(found.tokens) != tokens and not (beams > 1 and abs(found.score - score) < _TIE):
            raise FidelityError(
                f"a request that names only its text is answered by the tokens {list(found.tokens)}, Hugging Face's "
                f"generate with the folder's settings gives {tokens}"
            )


def silent_requests(
    folder: Path, limits: Seq2SeqLimits, texts: Sequence[str], count: int = ANSWERS, tokens: int = ANSWER_TOKENS
) -> list[Seq2SeqRequest]:
    """Requests of `count` of the texts that name nothing else, with answers of so many tokens at most."""
    defaults = GenerationDefaults.load(folder)
    parser = RequestParser(SourceText.load(folder, limits.max_source_tokens), defaults, limits)
    step = max(1, len(texts) // count)
    return [_request(parser, text, tokens) for text in texts[::step][:count]]


def generated(
    model: PreTrainedModel,
    config: GenerationConfig,
    folder: Path,
    limits: Seq2SeqLimits,
    requests: Sequence[Seq2SeqRequest],
    beams: int,
) -> list[tuple[list[int], float]]:
    """The answers of Hugging Face's `generate` to requests, and their scores, 0 of greedy ones."""
    language = SourceText.load(folder, limits.max_source_tokens).forced_bos(None)
    config.max_length = None  # the answers' length is given in new tokens
    found = []
    for request in requests:
        rules = request.params.rules
        with torch.inference_mode():
            given = model.generate(
                torch.tensor([list(request.windows[0].ids)]),
                generation_config=config,
                do_sample=False,
                num_beams=beams,
                min_length=min(config.min_length or 0, rules.max_length),
                max_new_tokens=rules.max_length - rules.prompt_length,
                forced_bos_token_id=config.forced_bos_token_id if language is None else language,
                return_dict_in_generate=True,
                output_scores=True,
            )
        score = float(given.sequences_scores[0]) if beams > 1 else 0.0
        found.append((given.sequences[0, rules.prompt_length :].tolist(), score))
    return found


def greedy(folder: Path, limits: Seq2SeqLimits, requests: Sequence[Seq2SeqRequest]) -> list[list[int]]:
    """The tokens that the engine which serves answers requests with, without beams."""
    alone = [replace(request, params=replace(request.params, num_beams=1)) for request in requests]
    return [list(found.tokens) for found in _served(folder, limits, alone)]


def _request(parser: RequestParser, text: str, tokens: int) -> Seq2SeqRequest:
    """A request that is silent but for what a long text becomes."""
    policy = np.array([[LongInput.TRUNCATE.encode()]], np.object_)
    request = parser.parse({"text_input": np.array([[text.encode()]], np.object_), "long_input": policy})
    rules = request.params.rules
    longest = min(rules.max_length, rules.prompt_length + tokens)
    shorter = replace(rules, max_length=longest, min_length=min(rules.min_length, longest))
    return replace(request, params=replace(request.params, rules=shorter))


class _Waiter:
    """A consumer that is waited for."""

    def __init__(self) -> None:
        self.cancelled = False
        self.found: Found | None = None
        self.error: Exception | None = None
        self.done = threading.Event()

    def finish(self, found: Found | None) -> None:
        self.found = found
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


def _served(folder: Path, limits: Seq2SeqLimits, requests: Sequence[Seq2SeqRequest]) -> list[Found]:
    """The answers of the engine that serves."""
    first = requests[0]
    capacity = positions(limits.max_target_tokens, first.prompt)
    sources = [request.windows[0].ids for request in requests]
    return answers(folder, sources, first.prompt, first.params, capacity=capacity, threads=limits.threads)


def answers(
    folder: Path,
    sources: Sequence[Sequence[int]],
    prompt: Sequence[int],
    params: SearchParams,
    *,
    capacity: int,
    threads: int,
) -> list[Found]:
    """Answers of the engine that serves, to several sources at once.

    Args:
        folder: a version folder, or one with the two graphs alone.
        capacity: that the decoder was written for.
    """
    slots = params.num_beams * len(sources)
    engine = Engine(Seq2SeqDecoder(folder, slots=slots, capacity=capacity, threads=threads), len(sources))
    waiters = [_Waiter() for _ in sources]
    try:
        engine.submit([Job(ids, prompt, params, waiter) for ids, waiter in zip(sources, waiters, strict=True)])
        for waiter in waiters:
            waiter.done.wait()
            if waiter.error is not None:
                raise waiter.error
        return [waiter.found for waiter in waiters if waiter.found is not None]
    finally:
        engine.stop()
