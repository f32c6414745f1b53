"""`trident-export`: models.toml to a model repository.

export [MODEL]     export what is missing or out of date
evaluate [MODEL]   what each exported variant gets wrong and what it costs, or, with --dataset, how well it answers
audit MODEL        whether a model treats people alike who differ in one word
audit-guard GUARD  what a guard of models.toml finds, misses, and takes for what it should find
detect MODEL       whether a text carries a model's watermark
explain MODEL TEXT which words an answer rests on
sensitivity MODEL  which layers a recipe hurts, and the recipe that keeps those in float32
prune MODEL        fewer weights, and the curve of what that costs
distill TEACHER    a smaller student that learns to answer as its teacher
compress MODEL     pruned to a budget and trained, with the curve of what that costs
train-head MODEL   a classifier, or question answering, out of an encoder and examples
configs [--check]  write config.pbtxt files, or say which are out of step
pin                write the hub's commit ids into models.toml
add MODEL          look at a model and write its table into models.toml
doctor             what is wrong with a repository, without a server or the network

versions [MODEL]   the versions of a model, and which one is served
promote MODEL      serve another version, in a running server, too; rollback MODEL: the version before
verify [MODEL]     compare files with their manifests; keygen, sign: signatures of manifests
sbom [MODEL]       what a model, or this Python environment, is made of
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trident_export import (
    configs,
    corpora,
    disk,
    doctor,
    install,
    models_file,
    pin,
    progress,
    quiet,
    recipes,
    releases,
    report,
    tasks,
)
from trident_export.compression.methods import Method
from trident_export.errors import ExportError, SourceError, TextError, UsageError
from trident_export.huggingface import adapters, sources
from trident_export.huggingface.folder import HuggingFaceFolder, check_files
from trident_export.measure import quality, sensitivity
from trident_export.measure.sensitivity import Grouping
from trident_export.store import commands as store
from trident_serving import artefacts
from trident_serving.explanation.units import By

if TYPE_CHECKING:
    from trident_client import Client

# An id on the hub: a name, mostly behind that of an owner.
_HUB_ID = re.compile(r"(?!.*\.gguf)\w[\w.-]*(/\w[\w.-]*)?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that staging folders are removed
    if not options.verbose:
        quiet.hush()
    folders = [value for value in vars(options).values() if isinstance(value, Path)]
    with progress.bars():
        return report.guarded(lambda: _run(options), *folders, Path(tempfile.gettempdir()))


def _run(options: argparse.Namespace) -> int:
    if reports := getattr(options, "reports", None):
        disk.require_folder(reports)  # they are written last, when hours may have been spent
    return int(options.run(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trident-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="export what is missing or out of date")
    export.add_argument("model", nargs="?", help="one model of models.toml (default: all but on-demand ones)")
    export.add_argument(
        "--force",
        action="store_true",
        help="install variants that the gate refuses (served as unverified), and begin where memory is short",
    )
    export.add_argument(
        "--variants",
        default="",
        metavar="NAMES",
        help="with a model: which of its more_variants are exported too, parted by commas, or all",
    )
    export.add_argument("--source", type=Path, help="a local copy of the model, in place of its source")
    export.add_argument("--adapter", type=Path, help="a local copy of its adapter, in place of that one")
    export.add_argument(
        "--keep-going", action="store_true", help="end with status 0 although models failed; the launcher names them"
    )
    export.add_argument(
        "--beside",
        action="store_true",
        help="put a new version beside the one that is served, which stays as it is (then: promote)",
    )
    export.set_defaults(run=_export)
    evaluate = commands.add_parser("evaluate", help="what every exported variant gets wrong, and what it costs")
    evaluate.add_argument("model", nargs="?", help="one model of models.toml (default: all that are exported)")
    evaluate.add_argument("--text", type=Path, help="your own text, paragraphs parted by blank lines")
    evaluate.add_argument("--reports", type=Path, default=Path("reports"))
    _add_references(evaluate)
    evaluate.set_defaults(run=_evaluate)
    sensitive = commands.add_parser("sensitivity", help="which layers a recipe hurts")
    sensitive.add_argument("model", help="one model of models.toml; it need not be exported")
    sensitive.add_argument("--variant", default="", help="whose recipe is applied (default: the model's last)")
    sensitive.add_argument(
        "--by",
        type=Grouping,
        choices=list(Grouping),
        default=Grouping.LAYER,
        metavar="GROUP",
        help="what is quantized at a time: layer (default), kind or matmul",
    )
    sensitive.add_argument("--keep", type=int, default=2, help="groups that the printed recipe keeps (default 2)")
    sensitive.add_argument("--text", type=Path, help="your own text, paragraphs parted by blank lines")
    sensitive.add_argument("--reports", type=Path, default=Path("reports"))
    sensitive.set_defaults(run=_sensitivity)
    audit = _add_audit(commands)
    guarding, detecting = _add_guard_audit(commands), _add_detection(commands)
    explained = _add_explanation(commands)
    pruned, distilled, trained = _add_pruning(commands), _add_distillation(commands), _add_head(commands)
    compressed = _add_compression(commands)
    check = commands.add_parser("configs", help="write config.pbtxt files from models.toml")
    check.add_argument("--check", action="store_true", help="write nothing, fail where a file is out of step")
    check.set_defaults(run=_configs)
    pinning = commands.add_parser("pin", help="write the hub's commit ids into models.toml")
    pinning.set_defaults(run=_pin)
    adding = commands.add_parser("add", help="look at a model and write its table into models.toml")
    adding.add_argument("source", help="an id on the hub, a local Hugging Face folder, or a GGUF file")
    adding.add_argument(
        "--adapter", default="", help="a PEFT adapter of the model, merged at export: a folder, or an id on the hub"
    )
    adding.add_argument("--name", default="", help="of the table (default: from the source)")
    adding.add_argument("--dry-run", action="store_true", help="print the table, and write no file of yours")
    adding.set_defaults(run=_add)
    examining = commands.add_parser("doctor", help="what is wrong with a repository")
    examining.set_defaults(run=_doctor)
    store.add(commands)
    every = (
        export,
        evaluate,
        audit,
        guarding,
        detecting,
        explained,
        sensitive,
        pruned,
        distilled,
        compressed,
        trained,
        check,
        pinning,
        adding,
    )
    for command in (*every, examining):
        command.add_argument("--models-file", type=Path, default=Path("models.toml"))
        command.add_argument("--verbose", action="store_true", help="show every warning of the libraries")
    for command in (export, evaluate, audit, guarding, detecting, explained, check, examining):
        command.add_argument("--repository", type=Path, default=Path("model_repository"))
    for command in (export, evaluate, sensitive, pruned, distilled, compressed, trained):
        command.add_argument("--cache", type=Path, help="converted sources (default: .cache beside the models file)")
    return parser.parse_args(arguments)


def _add_server(command: argparse.ArgumentParser, when: str = "") -> None:
    """The options of a command that asks a server."""
    command.add_argument("--url", default="", help=f"{when}a server that runs (default: one of its own)")
    command.add_argument(
        "--against",
        default="",
        metavar="MODEL",
        help=f"{when}what the others are compared with (default: the float32 variant, or else the first)",
    )
    command.add_argument(
        "--models",
        default="",
        metavar="NAMES",
        help=f"{when}public names, parted by commas (default: the model's exported variants)",
    )


def _add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    audit = commands.add_parser("audit", help="whether a model treats people alike who differ in one word")
    audit.add_argument("model", help="one model of models.toml: a classifier or a text generator")
    _add_server(audit)
    audit.add_argument("--groups", type=Path, help="your own groups, sentences and endings (default: those built in)")
    audit.add_argument("--max-gap", type=float, help="of any axis, in probabilities or nats; beyond: exit status 1")
    audit.add_argument("--max-shift", type=float, help="of a group's mean, from the baseline's; beyond: exit status 1")
    audit.add_argument("--reports", type=Path, default=Path("reports"))
    audit.set_defaults(run=_audit)
    return audit


def _add_guard_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    guarding = commands.add_parser("audit-guard", help="what a guard finds, misses, and takes for what it should find")
    guarding.add_argument("guard", help="one guard of models.toml")
    guarding.add_argument(
        "--cases", type=Path, help="your own texts: tables with flagged and harmless ones (default: those built in)"
    )
    guarding.add_argument(
        "--stage", choices=("input", "output"), default="input", help="whose rules read the texts (default input)"
    )
    guarding.add_argument(
        "--url", default="", help="a server that runs, for rules that ask models (default: one of its own)"
    )
    guarding.add_argument("--reports", type=Path, default=Path("reports"))
    guarding.set_defaults(run=_audit_guard)
    return guarding


def _add_detection(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    detecting = commands.add_parser("detect", help="whether a text carries a model's watermark")
    detecting.add_argument("model", help="the public name of an exported text generator, whose tokens count")
    detecting.add_argument("text", nargs="?", type=Path, help="a file, without the prompt (default: standard input)")
    detecting.add_argument("--greenlist-ratio", type=float, default=0.25, help="as in the request (default 0.25)")
    detecting.add_argument("--hashing-key", type=int, default=15485863, help="as in the request (default 15485863)")
    detecting.add_argument("--unique", action="store_true", help="count each pair of neighbours once")
    detecting.add_argument("--z", type=float, default=3.0, help="the z-score above which a text is marked (default 3)")
    detecting.set_defaults(run=_detect)
    return detecting


def _add_explanation(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    explained = commands.add_parser("explain", help="which words an answer rests on")
    explained.add_argument("model", help="one model of models.toml: of texts, an encoder or a text generator")
    explained.add_argument("texts", nargs="+", metavar="TEXT", help="each is explained; of a ranker: passages")
    explained.add_argument("--query", default="", help="of a ranker")
    explained.add_argument("--question", default="", help="of question answering; the texts are contexts")
    explained.add_argument(
        "--pair", default="", dest="text_pair", metavar="TEXT", help="the second text of a classifier of pairs"
    )
    explained.add_argument(
        "--label", default="", help="the class, or token, that is explained (default: the likeliest)"
    )
    explained.add_argument(
        "--candidate",
        action="append",
        default=[],
        dest="candidate_labels",
        metavar="LABEL",
        help="of zero-shot classification: a label that may fit; give it several times",
    )
    explained.add_argument(
        "--template", default="", dest="hypothesis_template", help='the sentence for one ("This example is {}.")'
    )
    explained.add_argument("--multi-label", action="store_true", help="score each of them by itself")
    explained.add_argument("--answer", default="", metavar="TEXT", help="of a generator (default: what it answers)")
    explained.add_argument("--chat", action="store_true", help="of a generator: the text is a message")
    explained.add_argument("--max-tokens", type=int, default=0, help="of a generator's answer (default 64)")
    explained.add_argument(
        "--by",
        choices=[unit.value for unit in By],
        default=By.WORD.value,
        metavar="UNIT",
        help="word (default), sentence or token",
    )
    explained.add_argument("--variant", default="", help="which is asked (default: the model's default variant)")
    explained.add_argument(
        "--url", default="", help="a server that runs and serves the repository's model (default: a generator gets one)"
    )
    explained.add_argument("--json", action="store_true", help="print JSON")
    explained.add_argument("--html", type=Path, metavar="FILE", help="write a page with the marked texts")
    explained.set_defaults(run=_explain)
    return explained


def _add_references(evaluate: argparse.ArgumentParser) -> None:
    """The options of an evaluation against references."""
    evaluate.add_argument(
        "--dataset",
        type=Path,
        help="examples with references, a JSON object in each line: they are compared with what is served",
    )
    _add_server(evaluate, "with --dataset: ")
    evaluate.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default 2000)")


def _add_pruning(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    pruned = commands.add_parser("prune", help="fewer weights, and the curve of what that costs")
    pruned.add_argument("model", help="one model of models.toml; it need not be exported")
    pruned.add_argument(
        "--method",
        type=Method,
        required=True,
        choices=list(Method),
        metavar="METHOD",
        help=f"{', '.join(Method.standard())}; with --experimental also {', '.join(Method.experimental())}",
    )
    pruned.add_argument(
        "--experimental",
        action="store_true",
        help="allow methods that set single weights to zero, which makes no graph smaller or faster",
    )
    pruned.add_argument("--sparsity", required=True, type=float, nargs="+", metavar="S", help="shares to take away")
    pruned.add_argument("--output", type=Path, default=Path("pruned"), help="for the Hugging Face folders")
    pruned.add_argument("--variant", default="", help="exported to be measured (default: the model's default variant)")
    pruned.add_argument("--text", default="", help="representative text, paragraphs parted by blank lines")
    pruned.add_argument("--reports", type=Path, default=Path("reports"))
    pruned.set_defaults(run=_prune)
    return pruned


def _add_distillation(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    distilled = commands.add_parser("distill", help="a smaller student that learns to answer as its teacher")
    distilled.add_argument("model", metavar="teacher", help="one model of models.toml; it need not be exported")
    distilled.add_argument("--student", required=True, help="number of layers, a Hugging Face folder, or a config.json")
    distilled.add_argument("--text", type=Path, required=True, help="to learn from, paragraphs parted by blank lines")
    distilled.add_argument("--output", type=Path, help="the student's folder (default: distilled/TEACHER-STUDENT)")
    _add_learning(distilled)
    distilled.add_argument("--temperature", type=float, default=2.0)
    distilled.add_argument("--hidden-weight", type=float, default=1.0, help="of hidden states beside the distribution")
    _add_run(distilled)
    distilled.add_argument("--reports", type=Path, default=Path("reports"))
    distilled.set_defaults(run=_distill)
    return distilled


def _add_compression(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    compressed = commands.add_parser(
        "compress", help="pruned to a budget and trained, and the curve of what that costs"
    )
    compressed.add_argument("model", help="one model of models.toml; it need not be exported")
    budget = compressed.add_mutually_exclusive_group(required=True)
    budget.add_argument("--parameters", metavar="N", help="the most, as 110M, or 80%% of the model's own")
    budget.add_argument(
        "--latency", metavar="MS", help="the most for a step of eight, in ms, or 80%% of the model's own"
    )
    compressed.add_argument(
        "--method",
        type=Method,
        default=Method.LAYERS,
        choices=Method.standard(),
        metavar="METHOD",
        help=f"{', '.join(Method.standard())} (default: layers)",
    )
    compressed.add_argument("--text", type=Path, required=True, help="to learn from, paragraphs parted by blank lines")
    compressed.add_argument("--points", type=int, default=2, help="of the curve, each with a student (default 2)")
    compressed.add_argument("--output", type=Path, default=Path("compressed"), help="for the Hugging Face folders")
    compressed.add_argument("--variant", default="", help="exported to be measured (default: the default variant)")
    _add_learning(compressed)
    compressed.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (default 200)")
    compressed.add_argument("--seed", type=int, default=0)
    compressed.add_argument("--reports", type=Path, default=Path("reports"))
    compressed.set_defaults(run=_compress)
    return compressed


def _add_learning(learning: argparse.ArgumentParser) -> None:
    """How a student learns."""
    learning.add_argument("--steps", type=int, default=0, help="of each student (default: once through the text)")
    learning.add_argument("--minutes", type=float, default=0.0, help="after which a student ends, whatever is left")
    learning.add_argument("--batch-size", type=int, default=8)
    learning.add_argument("--length", type=int, default=128, help="tokens in a chunk (default 128)")
    learning.add_argument("--learning-rate", type=float, default=2e-4)


def _add_run(trained: argparse.ArgumentParser) -> None:
    """The options of whatever trains in one process or several."""
    trained.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (default 200)")
    trained.add_argument("--seed", type=int, default=0)
    trained.add_argument("--deepspeed", default="", metavar="FILE", help="a DeepSpeed configuration file")


def _add_head(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    trained = commands.add_parser("train-head", help="a classifier, or question answering, out of an encoder")
    trained.add_argument("model", help="an encoder of models.toml; it need not be exported")
    trained.add_argument(
        "--task",
        required=True,
        choices=("text-classification", "question-answering"),
        metavar="TASK",
        help="text-classification or question-answering",
    )
    trained.add_argument("--data", type=Path, required=True, help="examples, an object of JSON a line")
    trained.add_argument("--output", type=Path, help="for the Hugging Face folder (default: trained/MODEL-TASK)")
    trained.add_argument("--epochs", type=float, default=3.0, help="how often each example is seen (default 3)")
    trained.add_argument("--batch-size", type=int, default=16)
    trained.add_argument("--length", type=int, default=128, help="tokens of an example at most (default 128)")
    trained.add_argument("--learning-rate", type=float, default=1e-4)
    _add_run(trained)
    trained.set_defaults(run=_train_head)
    return trained


def _export(options: argparse.Namespace) -> int:
    specs = _specs(options)
    for name, value in (("source", options.source), ("adapter", options.adapter)):
        if value is not None and not options.model:
            raise UsageError(f"--{name} is for one model: name it")
    specs = [dataclasses.replace(spec, source=_copies(spec.source, options)) for spec in specs]
    base = options.models_file.resolve().parent
    quiet.hush_onnxruntime(options.verbose)
    cache = options.cache or base / ".cache"
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        progress.say(message)

    try:
        install.export(specs, options.repository, base, cache, say, force=options.force, beside=options.beside)
    except ExportError as error:
        if not options.keep_going:
            raise
        progress.say(str(error))
        return 0
    if options.model and not said:
        progress.say(f"{options.model} is up to date")
    return 0


def _copies(source: models_file.Source, options: argparse.Namespace) -> models_file.Source:
    """A source with the local copies that the command line names."""
    if options.source is not None:
        source = models_file.Source(
            path=str(options.source.resolve()), adapter=source.adapter, adapter_revision=source.adapter_revision
        )
    if options.adapter is not None:
        source = dataclasses.replace(source, adapter=str(options.adapter.resolve()), adapter_revision="")
    return source


def _evaluate(options: argparse.Namespace) -> int:
    if options.dataset:
        return _evaluate_answers(options)
    for name in ("url", "against", "models"):
        if getattr(options, name):
            raise UsageError(f"--{name} is for an evaluation against references: name a --dataset")
    base = options.models_file.resolve().parent
    quiet.hush_onnxruntime(options.verbose)
    texts = corpora.read(options.text) if options.text else None
    report: dict[str, quality.Measures] = {}
    for spec in _specs(options, on_demand=True):
        if spec.template:
            continue  # its generator has the measures
        if artefacts.read_manifest(options.repository, spec.name) is None:
            if options.model:
                raise UsageError(f"{spec.name} is not exported: run make export MODEL={spec.name}")
            progress.say(f"{spec.name} is not exported: skipped")
            continue
        progress.say(f"{spec.name}: comparing with Hugging Face")
        source = sources.fetch(spec, base, options.cache or base / ".cache", progress.say)
        with releases.served_as_first(spec.name, options.repository) as root:
            report[spec.name] = {
                variant: {**measured, **quality.cost(spec, variant, root)}
                for variant, measured in tasks.evaluate(spec, source, root, texts, thorough=True).items()
            }
    print(quality.write(report, options.reports), end="")
    return 0


def _evaluate_answers(options: argparse.Namespace) -> int:
    """What served variants answer, against references."""
    from trident_export.evaluation import datasets, report

    if not options.model:
        raise UsageError("--dataset is for one model: name it")
    if options.text:
        raise UsageError("--text is for what variants get wrong against Hugging Face, --dataset for references: choose")
    if options.resamples < 100:
        raise UsageError(f"--resamples is {options.resamples}: an interval needs 100 at least")
    (spec,) = _specs(options, on_demand=True)
    data = datasets.read(options.dataset, spec.task)
    with _served(options, spec) as (client, models, against):
        print(
            report.write(report.evaluate(client, spec.task, models, data, against, options.resamples), options.reports)
        )
    return 0


@contextlib.contextmanager
def _served(options: argparse.Namespace, spec: models_file.ModelSpec) -> Iterator[tuple[Client, list[str], str]]:
    """A client of the server that has a model, the public names that are asked, and which the others are compared with.

    The server is the one that the command line names, or one for the time of the `with` block.

    Raises:
        UsageError: a name is not one that it serves.
        TextError: the server that is named does not serve one.
    """
    from trident_client import TridentError

    models = [name.strip() for name in options.models.split(",") if name.strip()] or [
        spec.public_name(each) for each in spec.variants
    ]
    exact = spec.public_name("fp32")
    against = options.against or (exact if exact in models else models[0])
    if against not in models:
        raise UsageError(f"the baseline {against} is none of {', '.join(models)}")
    with _client(options, spec, models) as client:
        try:
            for name in models if options.url else ():
                client.parameters(name)  # before hours are spent on the first of them
        except TridentError as error:
            raise TextError(f"{options.url}: {error}") from error
        yield client, models, against


@contextlib.contextmanager
def _client(options: argparse.Namespace, spec: models_file.ModelSpec, models: Sequence[str]) -> Iterator[Client]:
    """A client of the server that the command line names, or of one for the time of the `with` block.

    Args:
        models: public names that it will be asked for, of the model's task.
    """
    from trident_client import Client
    from trident_serving.launcher import local

    with contextlib.ExitStack() as stack:
        url = options.url
        if not url:
            _check_exported(options, spec)
            known = _exported(options.repository, spec.task)
            if unknown := [name for name in models if name not in known]:
                raise UsageError(
                    f"{options.repository} has no model {unknown[0]!r} for {spec.task}; it has {', '.join(known)}"
                )
            progress.say("starting a server")
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
            url = stack.enter_context(local.running(options.repository, log)).grpc_url
        yield stack.enter_context(Client(url, timeout=600))


def _exported(repository: Path, task: str = "") -> list[str]:
    """Public names of what a repository serves.

    Args:
        task: of these models; "": of any.
    """
    manifests = artefacts.read_manifests(repository)
    return [name for each in manifests if task in ("", each.task) for name in each.public_models.values()]


def _check_exported(options: argparse.Namespace, spec: models_file.ModelSpec) -> None:
    if artefacts.read_manifest(options.repository, spec.name) is None:
        raise UsageError(f"{spec.name} is not exported: run make export MODEL={spec.name}")


def _audit(options: argparse.Namespace) -> int:
    from trident_export.audit import cases, report

    for name in ("max_gap", "max_shift"):
        limit = getattr(options, name)
        if limit is not None and not limit >= 0:  # nothing is beyond a limit that is no number
            raise UsageError(f"--{name.replace('_', '-')} must be 0 or more, found {limit:g}")
    (spec,) = _specs(options, on_demand=True)
    report.check(spec.task)
    asked = cases.load(options.groups) if options.groups else cases.load()
    with _served(options, spec) as (client, models, against):
        found = report.audit(client, spec.task, models, asked, against)
    print(report.write(found, options.reports), end="")
    told = report.beyond(found, options.max_gap, options.max_shift)
    for sentence in told:
        progress.say(sentence)
    return 1 if told else 0


def _audit_guard(options: argparse.Namespace) -> int:
    from trident_export.audit import guards
    from trident_serving.guard import labels
    from trident_serving.guard.rules import Stage
    from trident_serving.launcher import local

    guard, stage = models_file.load_guard(options.models_file, options.guard), Stage(options.stage)
    kinds = guards.load(options.cases) if options.cases else guards.load()
    if not guard.of(stage):
        raise UsageError(f"the guard {guard.name} has no rules for the {stage}")
    for rule in guard.of(stage) if not options.url else ():
        if rule.model and rule.model not in _exported(options.repository):
            raise UsageError(f"{rule.model}, which rule {rule.name} asks, is not exported: see make export")
        known = labels.of_model(options.repository, rule.model) if rule.labels else None
        if known is not None and (said := labels.unknown(rule, known)):
            raise UsageError(f"rule {rule.name}: {said}")
    with contextlib.ExitStack() as stack:
        url = options.url
        if not url and any(rule.model for rule in guard.of(stage)):
            progress.say("starting a server")
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
            url = stack.enter_context(local.running(options.repository, log)).grpc_url
        found = guards.measure(guard, kinds, stage, url)
    print(guards.write(found, options.reports), end="")
    return 0


def _detect(options: argparse.Namespace) -> int:
    from trident_export import detection

    if not math.isfinite(options.z):
        raise UsageError(f"--z must be a number, found {options.z}")
    try:
        text = options.text.read_text(encoding="utf-8") if options.text else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text can't be read: {error}") from None
    settings = {"greenlist_ratio": options.greenlist_ratio, "hashing_key": options.hashing_key}
    found = detection.examine(options.repository / options.model, text, settings, unique=options.unique)
    verdict = "marked" if found.z_score > options.z else "not marked"
    share, usual = found.green / found.scored, options.greenlist_ratio
    print(
        f"{verdict}: {found.green} of {found.scored} tokens are on their lists ({share:.0%}; unmarked {usual:.0%}), "
        f"z {found.z_score:.2f}, p {found.p_value:.2g}"
    )
    return 0


def _explain(options: argparse.Namespace) -> int:
    from trident_export.explanation import asking
    from trident_serving.explanation import report
    from trident_serving.explanation.asking import Options

    quiet.hush_onnxruntime(options.verbose)
    (spec,) = _specs(options, on_demand=True)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    asked = Options(**{**given, "by": By(options.by), "candidate_labels": tuple(options.candidate_labels)})
    asking.check(spec, options.texts, asked)
    if options.html and options.html.is_dir():
        raise UsageError(f"--html must name a file, and {options.html} is a folder")
    variant = options.variant or spec.default_variant
    if variant not in spec.variants:
        raise UsageError(f"{spec.name} has no variant {variant!r}; exported are {', '.join(spec.variants)}")
    with contextlib.ExitStack() as stack:
        client = None
        if options.url or spec.generation:
            client = stack.enter_context(_client(options, spec, [spec.public_name(variant)]))
        if not spec.generation:
            _check_exported(options, spec)
        found = asking.explain(spec, variant, options.repository, options.texts, asked, client)
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(report.as_html(found), encoding="utf-8")
    print(report.as_json(found) if options.json else report.as_table(found), end="")
    if not found:
        progress.say("the model finds nothing in the text")
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    quiet.hush_onnxruntime(options.verbose)
    spec, source = _model(options)
    variant = options.variant or spec.variants[-1]
    recipe, kind = _recipe(options, spec, variant), spec.kind
    texts = corpora.read(options.text) if options.text else None
    losses = sensitivity.analyze(spec, source, recipe, options.by, progress.say, texts)
    options.reports.mkdir(parents=True, exist_ok=True)
    table = f"## {spec.name}, {variant}\n\n{sensitivity.as_table(losses)}"
    (options.reports / "sensitivity.md").write_text(table, encoding="utf-8")
    (options.reports / "sensitivity.json").write_text(sensitivity.as_json(losses), encoding="utf-8")
    print(table)
    print("# for recipes.toml beside the models file:")
    print(sensitivity.kept(variant, recipe, kind, losses, options.keep), end="")
    return 0


def _model(options: argparse.Namespace) -> tuple[models_file.ModelSpec, HuggingFaceFolder]:
    """The spec that a command is for, and its Hugging Face folder."""
    spec = _spec(options)
    return spec, _source(options, spec)


def _spec(options: argparse.Namespace) -> models_file.ModelSpec:
    """The spec that a command is for, which has a graph."""
    (spec,) = models_file.select(models_file.load(options.models_file), options.model)
    if spec.template:
        raise UsageError(f"{spec.name} is a template: ask for its generator, {spec.template.generator}")
    if spec.vllm_limits:
        raise UsageError(f"{spec.name} is computed by vLLM and has no graph: take engine out of its table for this")
    return spec


def _source(options: argparse.Namespace, spec: models_file.ModelSpec) -> HuggingFaceFolder:
    """The Hugging Face folder of a spec, fetched where it is not at hand."""
    base = options.models_file.resolve().parent
    return sources.fetch(spec, base, options.cache or base / ".cache", progress.say)


def _recipe(options: argparse.Namespace, spec: models_file.ModelSpec, variant: str) -> recipes.Recipe:
    known = recipes.load(options.models_file.resolve().parent)
    if variant not in known:
        raise UsageError(f"there is no recipe {variant!r}; known are {', '.join(known)}")
    known[variant].check(variant, spec.kind, getattr(spec.limits, "device", "cpu"))
    return known[variant]


def _prune(options: argparse.Namespace) -> int:
    from trident_export.compression import curve, models  # torch takes seconds to import

    quiet.hush_onnxruntime(options.verbose)
    if options.method in Method.experimental() and not options.experimental:
        raise UsageError(
            f"{options.method} sets single weights to zero, which makes no graph smaller or faster: "
            f"choose {', '.join(Method.standard())}, or add --experimental"
        )
    spec, source = _model(options)
    variant = options.variant or spec.default_variant
    recipe = _recipe(options, spec, variant)
    rows, folders = curve.prune(
        spec,
        source,
        options.method,
        options.sparsity,
        options.output / spec.name,
        variant,
        recipe,
        options.text or spec.calibration,
        progress.say,
    )
    print(curve.write(f"{spec.name}, {variant}, {options.method}", options.method, rows, options.reports))
    print("# for models.toml:")
    for folder in folders:
        print(models.table(spec, f"{spec.name}-{folder.name}".replace("_", "-"), folder, variant))
    return 0


def _distill(options: argparse.Namespace) -> int:
    from trident_export.compression import distillation, models  # torch takes seconds to import
    from trident_export.training import run

    quiet.hush_onnxruntime(options.verbose)
    spec = _spec(options)
    names = [field.name for field in dataclasses.fields(distillation.Settings)]
    settings = distillation.Settings(**{name: getattr(options, name) for name in names})
    name = f"{spec.name}-{Path(options.student).stem.lower().replace('_', '-')}"
    output = options.output or Path("distilled") / name
    distillation.check_student(options.student)
    texts = corpora.read(options.text)
    models.check_output(output)
    source = _source(options, spec)  # last: it may be fetched, and dequantized
    report = distillation.distill(spec, source, options.student, texts, output, settings, progress.say)
    if not report:  # another process than the first
        return run.end()
    print(distillation.write(f"{spec.name}, student {options.student}", report, options.reports))
    print(f"# for models.toml:\n{models.table(spec, name, output, spec.default_variant)}", end="")
    return run.end()


def _compress(options: argparse.Namespace) -> int:
    from trident_export.compression import budget, distillation, models  # torch takes seconds to import

    quiet.hush_onnxruntime(options.verbose)
    what = "latency" if options.parameters is None else "parameters"
    asked = budget.Budget.read(what, getattr(options, what))
    names = ("steps", "minutes", "batch_size", "length", "learning_rate", "save_every", "seed")
    settings = distillation.Settings(**{name: getattr(options, name) for name in names})
    texts = corpora.read(options.text)
    spec, source = _model(options)
    variant = options.variant or spec.default_variant
    rows, folder = budget.compress(
        spec,
        source,
        options.method,
        asked,
        options.points,
        texts,
        options.output / spec.name,
        settings,
        variant,
        _recipe(options, spec, variant),
        progress.say,
    )
    print(budget.write(f"{spec.name}, {variant}, {options.method}", rows, options.reports))
    print(f"# for models.toml:\n{models.table(spec, f'{spec.name}-{folder.name}', folder, variant)}", end="")
    return 0


def _train_head(options: argparse.Namespace) -> int:
    from trident_export.training import examples, heads, run  # torch takes seconds to import

    settings = heads.Settings(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(heads.Settings)}
    )
    task = options.task
    asked = examples.labelled(options.data) if task == "text-classification" else examples.questions(options.data)
    spec, source = _model(options)
    if not spec.encoder:
        raise UsageError(f"{spec.name} is for {spec.task}: a head is trained on an encoder")
    name = f"{spec.name}-{task}"
    output = options.output or Path("trained") / name
    found = heads.train(task, source, asked, output, settings, progress.say)
    if found is None:  # another process than the first
        return run.end()
    print(f"on {found.held_out} examples that were held out: {heads.shown(found.measures)}")
    print(f"# for models.toml:\n{heads.table(task, name, output, settings.length, found.labels)}", end="")
    return run.end()


def _specs(options: argparse.Namespace, *, on_demand: bool = False) -> list[models_file.ModelSpec]:
    """The models that a command is for, each with the variants that the repository has of it."""
    specs = models_file.select(models_file.load(options.models_file), options.model or None, on_demand=on_demand)
    wanted = [name.strip() for name in getattr(options, "variants", "").split(",") if name.strip()]
    if wanted and not options.model:
        raise UsageError("--variants is for one model: name it")
    for spec in specs:
        known = [*spec.variants, *spec.more]
        if unknown := [name for name in wanted if name not in (*known, "all")]:
            raise UsageError(f"{spec.name} has no variant {unknown[0]!r}; {options.models_file} has {', '.join(known)}")
    return [
        models_file.as_installed(spec, options.repository, spec.more if "all" in wanted else wanted) for spec in specs
    ]


def _configs(options: argparse.Namespace) -> int:
    specs = [models_file.as_installed(spec, options.repository) for spec in models_file.load(options.models_file)]
    if not options.check:
        for spec in specs:
            if not spec.on_demand or artefacts.read_manifest(options.repository, spec.name) is not None:
                for path in configs.write(spec, options.repository):
                    print(f"wrote {path}")
        return 0
    problems = configs.drift(specs, options.repository, options.models_file)
    for problem in problems:
        print(f"{problem}: run trident-export configs", file=sys.stderr)
    return 1 if problems else 0


def _add(options: argparse.Namespace) -> int:
    from trident_export import add  # transformers takes seconds to import

    quiet.hush_onnxruntime(options.verbose)
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = _looked_at(options, Path(scratch))
        if options.adapter:
            source |= _adapter(options.adapter, folder, source.get("hub", ""))
        proposal = add.propose(folder, source, options.name)
    print(proposal.as_toml(), end="")
    for reason in proposal.reasons:
        print(f"trident-export: {reason}", file=sys.stderr)
    if not options.dry_run:
        add.append(options.models_file, proposal)
        command = f"make export MODEL={proposal.name}"
        if options.models_file != Path("models.toml"):
            command += f" MODELS_FILE={shlex.quote(str(options.models_file))}"
        print(f"trident-export: written to {options.models_file}; {command} exports it", file=sys.stderr)
    return 0


def _looked_at(options: argparse.Namespace, scratch: Path) -> tuple[Path, dict[str, str]]:
    """The folder that `add` looks at, and the source that its table names."""
    local = sources.path_of(options.source)
    source = {"path": str(local.resolve())}
    if local.is_dir():
        check_files(local)
        if (local / "config.json").is_file():
            sources.check_weights(local)
        return local, source
    if local.is_file() and local.suffix != ".gguf":
        raise SourceError(f"{local} is no GGUF file: name one, a Hugging Face folder, or a model on the hub")
    if local.is_file() and options.dry_run:
        return sources.gguf_settings(local.resolve(), scratch), source
    if local.is_file():
        cache = options.models_file.resolve().parent / ".cache"
        return sources.from_gguf(local.resolve(), cache, progress.say), source
    commit = _commit(options.source)
    return sources.fetch_settings(options.source, commit), {"hub": options.source, "revision": commit}


def _commit(named: str) -> str:
    """The commit of a model on the hub, whose id can be a path's, too."""
    if not _HUB_ID.fullmatch(named):
        raise SourceError(f"{named} does not exist: name a Hugging Face folder, a GGUF file, or a model on the hub")
    try:
        return pin.resolve(named)
    except SourceError as error:
        raise SourceError(f"there is no folder {named} here, and {error}") from None


def _adapter(named: str, base: Path, hub: str) -> dict[str, str]:
    """What a table's source says of an adapter, which must be the base's."""
    local = sources.path_of(named)
    found = {"adapter": str(local.resolve())} if local.is_dir() else {"adapter": named, "adapter_revision": ""}
    if not local.is_dir():
        found["adapter_revision"] = _commit(named)
    source = models_file.Source(adapter=found["adapter"], adapter_revision=found.get("adapter_revision", ""))
    adapters.check_base(sources.fetch_adapter(source, Path()), base, hub)
    return found


def _doctor(options: argparse.Namespace) -> int:
    specs = [models_file.as_installed(spec, options.repository) for spec in models_file.load(options.models_file)]
    found = doctor.examine(specs, options.repository, options.models_file.resolve().parent, options.models_file)
    for finding in found:
        print(f"{'problem' if finding.problem else 'warning'}: {finding.text}")
    problems = sum(finding.problem for finding in found)
    print(f"trident-export: {problems} problems, {len(found) - problems} warnings", file=sys.stderr)
    return 1 if problems else 0


def _pin(options: argparse.Namespace) -> int:
    commits = pin.pin(options.models_file, models_file.load(options.models_file))
    for name, commit in commits.items():
        print(f"{name} {commit}")
    return 0
