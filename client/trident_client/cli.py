"""`trident`: the client on the command line.

Text comes from the arguments, from --file, or from standard input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trident_client import Client, TridentError
from trident_client._options import GENERATION, TRANSLATION, Option


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with Client(options.url, timeout=options.timeout) as client:
            status: int = options.run(client, options)
    except TridentError as error:
        print(f"trident: {error}", file=sys.stderr)
        return 1
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone, which is no error
            return 0
        print(f"trident: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trident", description="Talk to a Trident server.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("--url", default="localhost:8001", help="gRPC endpoint (default %(default)s)")
        command.add_argument(
            "--timeout",
            type=float,
            default=60.0,
            help="seconds that the call may take; a streamed answer may take longer, but not be silent for so long "
            "(default %(default)g)",
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    generate = add("generate", _generate, "continue a text, streamed to the terminal")
    chat = add("chat", _chat, "answer a message through the model's chat template, streamed to the terminal")
    chat.add_argument("--system", help="the system message")
    embed = add("embed", _embed, "embed texts: one an argument, or one a line of --file or standard input")
    embed.add_argument("--dimensions", type=int, help="numbers in an embedding (default: all)")
    sparse = add("embed-sparse", _embed_sparse, "sparse embeddings of texts: one an argument, or one a line")
    classify = add("classify", _classify, "the likeliest classes of texts: one an argument, or one a line")
    classify.add_argument("--top-k", type=int, default=1, help="classes of each text (default %(default)s)")
    zero_shot = add("zero-shot", _zero_shot, "which of the labels fit texts: one an argument, or one a line")
    zero_shot.add_argument("--label", action="append", required=True, dest="labels", help="give it several times")
    zero_shot.add_argument("--template", help='the sentence for a label (default "This example is {}.")')
    zero_shot.add_argument("--multi-label", action="store_true", default=None, help="score each label by itself")
    entities = add("entities", _entities, "the entities in texts: one an argument, or one a line")
    entities.add_argument("--aggregation", choices=("none", "simple", "first", "average", "max"))
    rank = add("rank", _rank, "passages by how well they answer --query: one an argument, or one a line")
    rank.add_argument("--query", required=True)
    for command in (embed, sparse, rank):
        command.add_argument("--prompt-name", help="which of the model's prompts goes before each text")
    answer = add("answer", _answer, "answer --question from a text")
    answer.add_argument("--question", required=True)
    answer.add_argument("--top-k", type=int, default=1, help="answers (default %(default)s)")
    answer.add_argument("--may-be-none", action="store_true", default=None, help="allow that the text holds no answer")
    fill = add("fill-mask", _fill_mask, "the likeliest tokens for the masks ([MASK], <mask>) of a text")
    fill.add_argument("--top-k", type=int, help="tokens for a mask (default 5)")
    translate = add("translate", _translate, "translate a text")
    summarize = add("summarize", _translate, "summarize a text")
    for command in (translate, summarize):
        _add_flags(command, TRANSLATION)
    for command in (embed, sparse, classify, zero_shot, entities, rank):
        command.add_argument("--truncate", action="store_true", default=None, help="cut texts that are too long")
    reading = (embed, sparse, classify, zero_shot, entities, rank, answer, fill)
    for command in (generate, chat, *reading, translate, summarize):
        command.add_argument("--model", help="default: the server's only model of the task")
        command.add_argument("--file", type=Path, help="read the text from a file")
        command.add_argument("text", nargs="*", help="the text; standard input where there is none")
    for command in (generate, chat):
        _add_flags(command, GENERATION)
    add("models", _models, "list the server's models")
    for name, run, help in (
        ("load", _load, "load a model that was exported, or exported again, since the server started"),
        ("unload", _unload, "unload a model from the server"),
    ):
        add(name, run, help).add_argument("model")
    add("health", _health, "say whether the server is ready; the exit status says it too")
    return parser


def _add_flags(command: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Add a flag for each option; a list's may be given several times, a bool's has a --no- form."""
    for name, option in options.items():
        flags = [f"--{name.replace('_', '-')}"]
        more: dict[str, Any] = {}
        if option.many:
            flags.append(f"--{name.split('_')[0]}")  # --stop, as most tools have it
            more["action"] = "append"
        elif option.dtype == "BOOL":
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = {"BYTES": str, "FP32": float}.get(option.dtype, int)
            more["choices"] = option.choices or None
        if option.flag:
            command.add_argument(*flags, help=option.help.replace("%", "%%"), **more)


def _chosen(options: argparse.Namespace, known: Mapping[str, Option]) -> dict[str, Any]:
    return {name: getattr(options, name) for name, option in known.items() if option.flag}


def _text(options: argparse.Namespace) -> str:
    if options.text and options.file:
        raise ValueError("give the text as arguments or with --file, not both")
    if options.text:
        return " ".join(options.text)
    if options.file:
        text: str = options.file.read_text(encoding="utf-8")
        return text
    return sys.stdin.buffer.read().decode("utf-8")


def _generate(client: Client, options: argparse.Namespace) -> int:
    return _print_stream(client, options, _text(options))


def _chat(client: Client, options: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": options.system}] if options.system else []
    return _print_stream(client, options, [*messages, {"role": "user", "content": _text(options)}])


def _print_stream(client: Client, options: argparse.Namespace, prompt: Any) -> int:
    chunks = []
    for chunk in client.stream(prompt, model=options.model, **_chosen(options, GENERATION)):
        chunks.append(chunk)
        if not options.json:
            print(chunk.text, end="", flush=True)
    if options.json:
        told = ("finish_reason", "num_input_tokens", "num_output_tokens")  # the rest no flag can ask for
        result = {"text": "".join(chunk.text for chunk in chunks)} | {name: getattr(chunks[-1], name) for name in told}
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
    return 0


def _lines(options: argparse.Namespace) -> list[str]:
    return options.text or [line for line in _text(options).splitlines() if line]


def _embed(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    vectors = client.embed(
        texts,
        model=options.model,
        prompt_name=options.prompt_name,
        dimensions=options.dimensions,
        truncate=options.truncate,
    )
    if options.json:
        print(json.dumps([{"text": text, "embedding": row.tolist()} for text, row in zip(texts, vectors, strict=True)]))
        return 0
    for text, row in zip(texts, vectors, strict=True):
        head = ", ".join(f"{value:+.4f}" for value in row[:6])
        print(f"[{head}, ...] {len(row)} numbers  {text[:60]}")
    return 0


def _embed_sparse(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    found = client.embed_sparse(texts, model=options.model, prompt_name=options.prompt_name, truncate=options.truncate)
    if options.json:
        rows = zip(texts, found, strict=True)
        print(json.dumps([{"text": text, **dataclasses.asdict(row)} for text, row in rows], ensure_ascii=False))
        return 0
    for text, row in zip(texts, found, strict=True):
        head = ", ".join(
            f"{index}: {weight:.4f}" for index, weight in list(zip(row.indices, row.weights, strict=True))[:6]
        )
        print(f"[{head}, ...] {len(row.indices)} tokens  {text[:60]}")
    return 0


def _classify(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    found = client.classify(texts, model=options.model, top_k=options.top_k, truncate=options.truncate)
    return _print_records(options, texts, found, lambda item: f"{item.score:.4f}  {item.label}")


def _zero_shot(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    found = client.classify_zero_shot(
        texts,
        options.labels,
        hypothesis_template=options.template,
        multi_label=options.multi_label,
        model=options.model,
        truncate=options.truncate,
    )
    return _print_records(options, texts, found, lambda item: f"{item.score:.4f}  {item.label}")


def _entities(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    found = client.entities(
        texts, model=options.model, aggregation_strategy=options.aggregation, truncate=options.truncate
    )
    return _print_records(
        options, texts, found, lambda item: f"{item.score:.4f}  {item.entity:<8} {item.start}-{item.end} {item.word}"
    )


def _rank(client: Client, options: argparse.Namespace) -> int:
    texts = _lines(options)
    found = client.rank(
        options.query, texts, model=options.model, prompt_name=options.prompt_name, truncate=options.truncate
    )
    return _print_records(
        options, [options.query], [found], lambda item: f"{item.score:.4f}  [{item.index}] {texts[item.index][:90]}"
    )


def _answer(client: Client, options: argparse.Namespace) -> int:
    found = client.answer(
        options.question,
        _text(options),
        model=options.model,
        top_k=options.top_k,
        handle_impossible_answer=options.may_be_none,
    )
    return _print_records(
        options, [options.question], [found], lambda item: f"{item.score:.4f}  {item.start}-{item.end} {item.answer}"
    )


def _fill_mask(client: Client, options: argparse.Namespace) -> int:
    text = _text(options)
    found = client.fill_mask(text, model=options.model, top_k=options.top_k)
    return _print_records(
        options, [text] * len(found), found, lambda item: f"{item.score:.4f}  {item.token_str}: {item.sequence}"
    )


def _translate(client: Client, options: argparse.Namespace) -> int:
    call = client.summarize if options.command == "summarize" else client.translate
    found = call(_text(options), model=options.model, **_chosen(options, TRANSLATION))
    if options.json:
        result = dataclasses.asdict(found)
        del result["log_probs"]
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(found.text)
    return 0


def _print_records(
    options: argparse.Namespace, texts: Sequence[str], found: Sequence[Sequence[Any]], show: Callable[[Any], str]
) -> int:
    """A list of records for each text: as JSON, or a line each under the text where there are several."""
    if options.json:
        rows = [[dataclasses.asdict(item) for item in row] for row in found]
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    for text, row in zip(texts, found, strict=True):
        if len(texts) > 1:
            print(text[:90])
        for item in row:
            print(show(item))
    return 0


def _models(client: Client, options: argparse.Namespace) -> int:
    statuses = client.models()
    refused = {status.name: client.unverified(status.name) if status.state == "READY" else "" for status in statuses}
    if options.json:
        print(json.dumps([dataclasses.asdict(status) | {"unverified": refused[status.name]} for status in statuses]))
        return 0
    for status in statuses:
        remark = f"unverified: {refused[status.name]}" if refused[status.name] else status.reason
        print(f"{status.name:<28} {status.version:>3}  {status.state} {remark}".rstrip())
    return 0


def _load(client: Client, options: argparse.Namespace) -> int:
    return _print_names(options, "loaded", client.load(options.model))


def _unload(client: Client, options: argparse.Namespace) -> int:
    return _print_names(options, "unloaded", client.unload(options.model))


def _print_names(options: argparse.Namespace, what: str, names: list[str]) -> int:
    print(json.dumps(names) if options.json else f"{what} {', '.join(names)}")
    return 0


def _health(client: Client, options: argparse.Namespace) -> int:
    health = client.health()
    if options.json:
        print(json.dumps(dataclasses.asdict(health)))
    else:
        print("ready" if health.ready else "live, not ready" if health.live else "not reachable")
    return 0 if health.ready else 1


if __name__ == "__main__":
    sys.exit(main())
