"""Every command of `trident`, with its flags."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from typing import Any

from trident_client import Client
from trident_client.cli import batch, bench, completion, connection, control, generation, output, tasks, texts, top

_LINES = "one an argument, or one a line of --file or standard input"
_EXITS = "exit status: 0 done, 1 refused or failed, 2 wrong input, 3 no server or no answer in time, 130 Ctrl-C"


def build() -> argparse.ArgumentParser:
    """The parser of the whole command line; `options.run(options)` runs the command and gives its exit status."""
    parser = argparse.ArgumentParser(
        prog="trident", description="Talk to a Trident server.", epilog=_EXITS, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"trident {_version()}")
    connection.add(parser, repeated=False)
    commands = _Commands(parser)
    _add_generators(commands)
    _add_readers(commands)
    _add_control(commands)
    _add_tools(commands)
    return parser


class _Commands:
    """Adds commands to the parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def plain(self, name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        """A command that opens connections by itself, or none."""
        command = self._commands.add_parser(name, help=help, description=_sentence(help), allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    def calling(self, name: str, help: str, call: Callable[[Client, argparse.Namespace], int], **more: Any) -> Any:
        """A command that calls a server.

        Args:
            more: see `output.add`.
        """

        def run(options: argparse.Namespace) -> int:
            with connection.client(options) as client, connection.named(options):
                return call(client, options)

        command = self.plain(name, help, run)
        output.add(command, **more)
        connection.add(command, repeated=True)
        return command

    def task(self, *given: Any, **more: Any) -> Any:
        """A command that calls a model."""
        command = self.calling(*given, **more)
        command.add_argument("--model", help="default: the server's only model of the task")
        return command


def _add_generators(commands: _Commands) -> None:
    generate = commands.task("generate", "continue a text, streamed to the terminal", generation.generate, lines=True)
    chat = commands.task(
        "chat",
        "answer a message through the model's chat template, streamed; without a text, on a terminal, a conversation",
        generation.chat,
        lines=True,
    )
    generation.add(generate, chat)


def _add_readers(commands: _Commands) -> None:
    def reader(name: str, help: str, call: Any, what: str = "the texts", **more: Any) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.task(name, f"{help}: {_LINES}", call, lines=True)
        tasks.add_reading(command, what, **more)
        return command

    embed = reader("embed", "embed texts", tasks.embed)
    sparse = reader("embed-sparse", "sparse embeddings of texts", tasks.embed_sparse)
    similarity = reader("similarity", "how near the embeddings of texts are to that of --to", tasks.similarity)
    similarity.add_argument("--to", required=True, metavar="TEXT", help="the text that they are compared with")
    similarity.add_argument("--to-prompt-name", metavar="NAME", help="its prompt (default: that of the texts)")
    for command in (embed, similarity):
        command.add_argument("--dimensions", type=int, help="numbers in an embedding (default: all)")
    classify = reader("classify", "the likeliest classes of texts", tasks.classify)
    classify.add_argument("--top-k", type=int, default=1, help="classes of each text (default %(default)s)")
    classify.add_argument(
        "--pair", action="append", dest="pairs", metavar="TEXT", help="a second text for each, in their order"
    )
    zero_shot = reader("zero-shot", "which of the labels fit texts", tasks.zero_shot, size=False)
    zero_shot.add_argument("--label", action="append", required=True, dest="labels", help="give it several times")
    zero_shot.add_argument("--template", help='the sentence for a label (default "This example is {}.")')
    zero_shot.add_argument("--multi-label", action="store_true", default=None, help="score each label by itself")
    entities = reader("entities", "the entities in texts", tasks.entities)
    entities.add_argument("--aggregation", choices=("none", "simple", "first", "average", "max"))
    rank = reader("rank", "passages by how well they answer --query, the best first", tasks.rank, "the passages")
    rank.add_argument("--top-k", type=connection.number(1), help="passages (default: all)")
    score = reader("score", "how well passages answer --query, in their order", tasks.score, "the passages")
    for command in (rank, score):
        command.add_argument("--query", required=True)
    for command in (embed, sparse, similarity, rank, score):
        command.add_argument("--prompt-name", help="which of the model's prompts goes before each text")

    tokenize = commands.calling("tokenize", f"the tokens of texts, by their ids: {_LINES}", tasks.tokenize, lines=True)
    tokenize.add_argument("--model", required=True)
    tasks.add_reading(tokenize, "the texts", size=False)
    answer = commands.task("answer", "answer --question from a text", tasks.answer, lines=True)
    answer.add_argument("--question", required=True)
    answer.add_argument("--top-k", type=int, default=1, help="answers (default %(default)s)")
    answer.add_argument("--max-answer-len", type=int, metavar="TOKENS", help="of an answer (default 15)")
    answer.add_argument("--may-be-none", action="store_true", default=None, help="allow that the text holds no answer")
    fill = commands.task(
        "fill-mask", "the likeliest tokens for the masks ([MASK], <mask>) of a text", tasks.fill_mask, lines=True
    )
    fill.add_argument("--top-k", type=int, help="tokens for a mask (default 5)")
    for command in (answer, fill):
        texts.add(command)
    for name, help in (("translate", "translate a text"), ("summarize", "summarize a text")):
        tasks.add_text_to_text(commands.task(name, help, tasks.text_to_text, lines=True))
    tasks.add_transcribe(commands.task("transcribe", "what is said in a recording", tasks.transcribe, lines=True))
    tasks.add_explain(
        commands.calling("explain", "which words the answer of a model rests on", tasks.explain, lines=True)
    )
    _add_images(commands)


def _add_images(commands: _Commands) -> None:
    def reader(name: str, help: str, call: Any) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.task(name, help, call, lines=True)
        tasks.add_images(command)
        return command

    reader("embed-images", "embed images", tasks.embed_images)
    classify = reader("classify-images", "the likeliest classes of images", tasks.classify_images)
    classify.add_argument("--top-k", type=int, default=1, help="classes of each image (default %(default)s)")
    zero_shot = reader("zero-shot-images", "which of the labels fit images", tasks.zero_shot_images)
    zero_shot.add_argument("--label", action="append", required=True, dest="labels", help="give it several times")
    zero_shot.add_argument("--template", help='the sentence for a label (default "This is a photo of {}.")')


def _add_control(commands: _Commands) -> None:
    commands.calling("models", "list the server's models, those that failed to load too", control.models, lines=True)
    served = commands.calling("served", "list the models that are loaded, with their tasks", control.served, lines=True)
    served.add_argument("--all", action="store_true", help="the stages and variants, too")
    for name, help, call in (
        ("info", "a model's task, limits and adapters", control.info),
        ("adapters", "list the adapters of a model, which --lora-name chooses from", control.adapters),
        ("load", "load a model that was exported, or exported again, since the server started", control.load),
        ("unload", "unload a model from the server", control.unload),
    ):
        commands.calling(name, help, call).add_argument("model")
    commands.calling("health", "say whether the server is ready; the exit status says it too", control.health)


def _add_tools(commands: _Commands) -> None:
    many = commands.plain(
        "batch", "ask for each line of a file, many at a time; resumes where it was interrupted", batch.run
    )
    batch.add(many)
    live = commands.plain("top", "what the models of a server do now, from its metrics", top.run)
    top.add(live)
    quick = commands.plain("bench", "measure what a server does now for one model, in some seconds", bench.run)
    bench.add(quick)
    for command in (many, live, quick):
        connection.add(command, repeated=True)
    completion.add(commands.plain("completion", "print a script that completes commands in a shell", completion.run))


def _sentence(help: str) -> str:
    return f"{help[0].upper()}{help[1:]}."


def _version() -> str:
    try:
        return importlib.metadata.version("trident-serving")
    except importlib.metadata.PackageNotFoundError:  # a folder that is on the path without being installed
        return "unknown"
