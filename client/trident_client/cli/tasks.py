"""Commands that read texts, recordings or images: one for each task but generation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trident_client import Client, Segment, SparseVector, _files
from trident_client._options import EXPLANATION, TRANSCRIPTION, TRANSLATION
from trident_client.cli import output, texts
from trident_client.cli.connection import number
from trident_client.cli.exits import Exit, InputError
from trident_client.cli.generation import add_flags, chosen

_SHOWN = 90  # characters of a text that stands above its results


def embed(client: Client, options: argparse.Namespace) -> int:
    """Embeddings."""
    given = texts.each(options)
    vectors = client.embed(
        given,
        model=options.model,
        prompt_name=options.prompt_name,
        dimensions=options.dimensions,
        truncate=options.truncate,
        batch_size=options.batch_size,
    )
    found = ({"text": text, "embedding": row.tolist()} for text, row in zip(given, vectors, strict=True))
    heads = (", ".join(f"{value:+.4f}" for value in row[:6]) for row in vectors)
    lines = (f"[{head}, ...] {vectors.shape[1]} numbers  {text[:60]}" for head, text in zip(heads, given, strict=True))
    output.results(options, found, lines)
    return Exit.DONE


def embed_sparse(client: Client, options: argparse.Namespace) -> int:
    """Sparse embeddings."""
    given = texts.each(options)
    vectors = client.embed_sparse(
        given,
        model=options.model,
        prompt_name=options.prompt_name,
        truncate=options.truncate,
        batch_size=options.batch_size,
    )
    found = ({"text": text, **output.plain(row)} for text, row in zip(given, vectors, strict=True))

    def line(text: str, row: SparseVector) -> str:
        pairs = list(zip(row.indices, row.weights, strict=True))[:6]
        head = ", ".join(f"{index}: {weight:.4f}" for index, weight in pairs)
        return f"[{head}, ...] {len(row.indices)} tokens  {text[:60]}"

    output.results(options, found, map(line, given, vectors))
    return Exit.DONE


def similarity(client: Client, options: argparse.Namespace) -> int:
    """The cosine similarity of each text's embedding with that of `--to`, in the texts' order."""
    given = texts.each(options)
    asked = {"model": options.model, "dimensions": options.dimensions, "truncate": options.truncate}
    (one,) = client.embed([options.to], prompt_name=options.to_prompt_name or options.prompt_name, **asked)
    many = client.embed(given, prompt_name=options.prompt_name, batch_size=options.batch_size, **asked)
    norms = np.linalg.norm(many, axis=1) * np.linalg.norm(one)
    cosines = many @ one / np.where(norms > 0, norms, 1)
    return _print_scores(options, given, [float(value) for value in cosines], "similarity")


def score(client: Client, options: argparse.Namespace) -> int:
    """The score of each passage for a query, in the passages' order."""
    given = texts.each(options)
    scores = [0.0] * len(given)
    for ranked in _ranked(client, options, given):
        scores[ranked.index] = ranked.score
    return _print_scores(options, given, scores, "score")


def _print_scores(options: argparse.Namespace, given: Sequence[str], scores: Sequence[float], name: str) -> int:
    found = ({"text": text, name: value} for text, value in zip(given, scores, strict=True))
    output.results(
        options, found, (f"{value:+.4f}  {text[:_SHOWN]}" for text, value in zip(given, scores, strict=True))
    )
    return Exit.DONE


def tokenize(client: Client, options: argparse.Namespace) -> int:
    """The tokens of texts, by their ids."""
    given = texts.each(options)
    if client.parameters(options.model).get("task") == "text-generation":
        asked: dict[str, Any] = {"model": options.model, "max_tokens": 0, "return_prompt_token_ids": True}
        found = [list(client.generate(text, **asked).prompt_token_ids) for text in given]
    else:
        found = client.tokenize(given, model=options.model, truncate=options.truncate)
    rows = [{"text": text, "tokens": ids} for text, ids in zip(given, found, strict=True)]
    output.results(options, rows, (" ".join(map(str, ids)) for ids in found))
    return Exit.DONE


def classify(client: Client, options: argparse.Namespace) -> int:
    """The likeliest classes."""
    given = texts.each(options)
    pairs = options.pairs
    if pairs is not None and len(pairs) != len(given):
        raise InputError(f"there are {len(given)} texts and {len(pairs)} of --pair: give one for each text")
    found = client.classify(
        given,
        text_pairs=pairs,
        model=options.model,
        top_k=options.top_k,
        truncate=options.truncate,
        batch_size=options.batch_size,
    )
    return _print_records(options, given, found, "labels", _label)


def zero_shot(client: Client, options: argparse.Namespace) -> int:
    """Which labels fit."""
    given = texts.each(options)
    found = client.classify_zero_shot(
        given,
        options.labels,
        hypothesis_template=options.template,
        multi_label=options.multi_label,
        model=options.model,
        truncate=options.truncate,
    )
    return _print_records(options, given, found, "labels", _label)


def _label(item: Any) -> str:
    return f"{item.score:.4f}  {item.label}"


def entities(client: Client, options: argparse.Namespace) -> int:
    """The entities in texts."""
    given = texts.each(options)
    found = client.entities(
        given,
        model=options.model,
        aggregation_strategy=options.aggregation,
        truncate=options.truncate,
        batch_size=options.batch_size,
    )

    def show(item: Any) -> str:
        return f"{item.score:.4f}  {item.entity:<8} {item.start}-{item.end} {item.word}"

    return _print_records(options, given, found, "entities", show)


def rank(client: Client, options: argparse.Namespace) -> int:
    """Passages, the best first."""
    given = texts.each(options)
    found = _ranked(client, options, given)[: options.top_k]
    if options.jsonl:
        output.rows({**output.plain(item), "text": given[item.index]} for item in found)
    elif options.json:
        output.document([found])
    else:
        for item in found:
            output.show(f"{item.score:.4f}  [{item.index}] {given[item.index][:_SHOWN]}")
    return Exit.DONE


def _ranked(client: Client, options: argparse.Namespace, given: Sequence[str]) -> list[Any]:
    found: list[Any] = client.rank(
        options.query,
        given,
        model=options.model,
        prompt_name=options.prompt_name,
        truncate=options.truncate,
        batch_size=options.batch_size,
    )
    return found


def answer(client: Client, options: argparse.Namespace) -> int:
    """Answers that a text holds."""
    found = client.answer(
        options.question,
        texts.whole(options),
        model=options.model,
        top_k=options.top_k,
        max_answer_len=options.max_answer_len,
        handle_impossible_answer=options.may_be_none,
    )
    if options.jsonl:
        output.rows(output.plain(item) for item in found)
    elif options.json:
        output.document([found])
    else:
        for item in found:
            output.show(f"{item.score:.4f}  {item.start}-{item.end} {item.answer}")
    return Exit.DONE


def fill_mask(client: Client, options: argparse.Namespace) -> int:
    """Tokens for each mask."""
    text = texts.whole(options)
    found = client.fill_mask(text, model=options.model, top_k=options.top_k)

    def show(item: Any) -> str:
        return f"{item.score:.4f}  {item.token_str}: {item.sequence}"

    return _print_records(options, [text] * len(found), found, "fillings", show)


def _print_records(
    options: argparse.Namespace,
    given: Sequence[str],
    found: Sequence[Sequence[Any]],
    name: str,
    show: Callable[[Any], str],
    of: str = "text",
) -> int:
    """A list of records for each text, or file: as JSON, or a line each, under the text where there are several."""
    if options.jsonl:
        output.rows({of: text, name: output.plain(row)} for text, row in zip(given, found, strict=True))
    elif options.json:
        output.document(found)
    else:
        for text, row in zip(given, found, strict=True):
            if len(given) > 1:
                output.show(text[:_SHOWN])
            for item in row:
                output.show(show(item))
    return Exit.DONE


def text_to_text(client: Client, options: argparse.Namespace) -> int:
    """Translations and summaries."""
    call = client.summarize if options.command == "summarize" else client.translate
    asked = {"model": options.model, **chosen(options, TRANSLATION)}
    found = call(texts.each(options), **asked) if options.lines else [call(texts.whole(options), **asked)]
    if options.json and not options.lines:
        output.document(_without_log_probs(found[0]))
    elif options.json:
        output.document([_without_log_probs(each) for each in found])
    elif options.jsonl:
        output.rows(_without_log_probs(each) for each in found)
    else:
        for each in found:
            output.show(each.text)
    return Exit.DONE


def transcribe(client: Client, options: argparse.Namespace) -> int:
    """What is said in recordings."""
    texts.check_once(options.audio)
    asked = {"model": options.model, **chosen(options, TRANSCRIPTION)}
    if options.stream:
        return _stream_transcriptions(client, options, asked)
    found = []
    for name in options.audio:
        content = _content(name)
        found.append(client.transcribe(content, **asked))
    if options.jsonl:
        output.rows({"file": name, **output.plain(each)} for name, each in zip(options.audio, found, strict=True))
    elif options.json:
        output.document(found[0] if len(found) == 1 else found)
    else:
        for each in found:
            for segment in each.segments:
                output.show(_timed(segment))
            if not each.segments:
                output.show(each.text)
    return Exit.DONE


def _stream_transcriptions(client: Client, options: argparse.Namespace, asked: dict[str, Any]) -> int:
    """The same as it comes: text, segments where their times are wanted, or an object a chunk."""
    if options.json:
        raise InputError("--stream prints text as it comes, or chunks with --jsonl: --json is one document")
    for name in options.audio:
        content = _content(name)
        with contextlib.closing(client.stream_transcription(content, **asked)) as chunks:
            if options.jsonl:
                output.rows({"file": name, **output.plain(chunk)} for chunk in chunks)
            elif asked["timestamps"]:
                for chunk in chunks:
                    for segment in chunk.segments:
                        output.show(_timed(segment), flush=True)
            else:
                for chunk in chunks:
                    output.show(chunk.text, end="", flush=True)
                print()
    return Exit.DONE


def _content(name: str) -> bytes:
    """The bytes of a file, or of standard input.

    Raises:
        OSError, ValueError: it can't be read.
    """
    return sys.stdin.buffer.read() if name == texts.STDIN else _files.content_of(name)


def _timed(segment: Segment) -> str:
    return f"[{segment.start:8.2f} - {segment.end:8.2f}] {segment.text.strip()}"


def explain(client: Client, options: argparse.Namespace) -> int:
    """Which words answers rest on."""
    text = texts.whole(options)
    asked = {"model": options.model, **chosen(options, EXPLANATION)}
    if options.html:
        options.html.write_text(client.explain_page(text, **asked), encoding="utf-8")
        return Exit.DONE
    found = client.explain(text, **asked)
    if options.jsonl:
        output.rows(output.plain(each) for each in found)
    elif options.json:
        output.document(found)
    else:
        for each in found:
            output.show(f"{each.of} ({each.measure} {each.score:.4g})")
            for one in sorted(each.attributions, key=lambda one: -abs(one.value)):
                output.show(f"  {one.value:+10.4g}  {one.text}")
    return Exit.DONE


def embed_images(client: Client, options: argparse.Namespace) -> int:
    """Embeddings of images."""
    names, files = options.images, _read_files(options.images)
    vectors = client.embed_images(files, model=options.model, batch_size=options.batch_size)
    found = ({"file": name, "embedding": row.tolist()} for name, row in zip(names, vectors, strict=True))
    heads = (", ".join(f"{value:+.4f}" for value in row[:6]) for row in vectors)
    lines = (f"[{head}, ...] {vectors.shape[1]} numbers  {name[:60]}" for head, name in zip(heads, names, strict=True))
    output.results(options, found, lines)
    return Exit.DONE


def classify_images(client: Client, options: argparse.Namespace) -> int:
    """The likeliest classes of images."""
    files = _read_files(options.images)
    found = client.classify_images(files, top_k=options.top_k, model=options.model, batch_size=options.batch_size)
    return _print_records(options, options.images, found, "labels", _label, of="file")


def zero_shot_images(client: Client, options: argparse.Namespace) -> int:
    """Which labels fit images."""
    found = client.classify_images_zero_shot(
        _read_files(options.images),
        options.labels,
        hypothesis_template=options.template,
        model=options.model,
        batch_size=options.batch_size,
    )
    return _print_records(options, options.images, found, "labels", _label, of="file")


def _read_files(names: list[str]) -> list[bytes]:
    texts.check_once(names)
    return [_content(name) for name in names]


def add_images(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads images."""
    command.add_argument("images", nargs="+", metavar="FILE", help="PNG, JPEG or WebP; -: from standard input")
    command.add_argument("--batch-size", type=number(1), default=8, help="images in a request (default %(default)s)")


def add_explain(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    command.add_argument("--model", required=True, help="whose table in models.toml has explain")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with the marked text instead")
    texts.add(command)
    add_flags(command, EXPLANATION)


def add_transcribe(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `transcribe`."""
    command.add_argument("audio", nargs="+", metavar="FILE", help="WAV, FLAC, MP3 or Ogg; -: from standard input")
    command.add_argument("--stream", action="store_true", help="print the text as it comes; with --jsonl, chunks")
    add_flags(command, TRANSCRIPTION)


def _without_log_probs(translation: Any) -> dict[str, Any]:
    return {name: value for name, value in output.plain(translation).items() if name != "log_probs"}


def add_text_to_text(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `translate` and `summarize`."""
    command.add_argument("--lines", action="store_true", help="each argument, or each line, is a text of its own")
    texts.add(command)
    add_flags(command, TRANSLATION)


def add_reading(command: argparse.ArgumentParser, what: str, *, size: bool = True) -> None:
    """Add the arguments of a command that reads many texts.

    Args:
        what: what the texts are.
        size: whether the texts of a request can be counted.
    """
    command.add_argument("--truncate", action=argparse.BooleanOptionalAction, help="cut texts that are too long")
    if size:
        command.add_argument(
            "--batch-size", type=number(1), default=32, help="texts in a request (default %(default)s)"
        )
    texts.add(command, what)
