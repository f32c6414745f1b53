"""Generation in `make bench`: throughput, latency and fidelity of every peer, and the gain of the engine's features.

Decode throughput counts the time in which every stream runs: from the last stream's first token to the first stream's
end. Tokens that arrive together were made since the stream's previous response, so each stream counts from its first
to its last response in that time. Figures are medians over interleaved rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from benchmarks import first_token, processor
from benchmarks.peers.environments import Environment, PeerError
from benchmarks.peers.interface import Peer, Prompts, Times
from benchmarks.peers.process import started
from benchmarks.peers.trident import TridentEngine, TridentServer
from trident_client import Client
from trident_export import corpora, models_file
from trident_export.huggingface import sources
from trident_export.measure import fidelity
from trident_serving.runtime.tokenizer import TextTokenizer

MODEL = "smollm2"
REFERENCE = "transformers fp32"
CONCURRENCY = (1, 4, 8, 16, 32)
WARM_UP = (1, 8)  # streams of the round that is not counted: with all of them, ten peers take five minutes
TOKENS = 48
PREFILL_TOKENS = 512
Figures = dict[str, Any]
P = TypeVar("P")
PAUSE = 0.3  # threads of torch and of others spin for so long behind a run
COPIES = 8  # of the texts, so that there are enough for all streams


@dataclass(frozen=True)
class Measured:
    """One run: rates in tokens a second, times in milliseconds."""

    decode: float
    first_token: float
    gap_p50: float
    gap_p99: float


def summarize(times: Times) -> Measured:
    """The figures of one run."""
    begin, end = max(row[0] for row in times), min(row[-1] for row in times)
    inside = [[moment for moment in row if begin <= moment <= end] for row in times]
    gaps = np.concatenate([np.diff(row) for row in times]) * 1e3
    return Measured(
        decode=sum(stream_rate(row) for row in inside),
        first_token=1e3 * statistics.median(row[0] for row in times),
        gap_p50=float(np.percentile(gaps, 50)),
        gap_p99=float(np.percentile(gaps, 99)),
    )


def stream_rate(moments: Sequence[float]) -> float:
    """Tokens a second after the first response, from the time of each token, in seconds."""
    later = [moment for moment in moments if moment > moments[0]]
    return len(later) / (later[-1] - moments[0]) if later else 0.0


def measure(
    client: Client,
    models: Path,
    repository: Path,
    reports: Path,
    rounds: int,
    environments: Sequence[Environment],
) -> Figures:
    """Every peer at every concurrency, and the engine's features."""
    spec = models_file.as_installed(models_file.select(models_file.load(models), MODEL)[0], repository)
    base = models.resolve().parent
    source = sources.fetch(spec, base, base / ".cache", lambda message: print(message, file=sys.stderr)).path
    tokenizer = TextTokenizer.load(repository / MODEL / "1")
    texts = [text[:240] for text in corpora.held_out() if len(text) > 200]
    prompts = [tokenizer.encode(text) for text in texts]
    prompts, texts = (prompts * COPIES)[: max(CONCURRENCY)], (texts * COPIES)[: max(CONCURRENCY)]
    long = (tokenizer.encode("\n".join(corpora.held_out())) * 2)[:PREFILL_TOKENS]
    known = {tuple(ids): text for ids, text in zip(prompts, texts, strict=True)}
    known[tuple(long)] = tokenizer.decode(long)
    with contextlib.ExitStack() as stack:
        failed: dict[str, str] = {}
        peers = _trident(client, spec, repository, known)
        file = sources.package_file(spec.source)
        sources_of = {"llama.cpp-Q4_1": file}
        for process in started(
            environments, "generators", lambda name: sources_of.get(name, source), base / ".cache", reports, failed
        ):
            stack.callback(process.close)
            peers.append(process)
        divergence = divergences(peers, tokenizer, failed)
        runs: dict[str, dict[str, list[Measured]]] = {peer.name: {} for peer in peers}
        prefill: dict[str, list[float]] = {peer.name: [] for peer in peers}

        def run(peer: Peer, prompts: Prompts, tokens: int) -> Times | None:
            if peer.name in failed:
                return None
            time.sleep(PAUSE)
            try:
                return peer.generate(prompts, tokens)
            except PeerError as error:
                failed[peer.name] = str(error)
                return None

        for number in range(rounds + 1):  # the first one warms up
            print(f"bench: generation, round {number} of {rounds}", file=sys.stderr)
            for streams in CONCURRENCY if number else WARM_UP:
                for peer in peers:
                    if (times := run(peer, prompts[:streams], TOKENS)) and number:
                        runs[peer.name].setdefault(str(streams), []).append(summarize(times))
            for peer in peers:
                if (times := run(peer, [long], 2)) and number:
                    prefill[peer.name].append(len(long) / times[0][0])
        bandwidth = memory_bandwidth()
        figures: Figures = {"processor": processor.sentence(), "bandwidth_bytes_per_second": bandwidth, "peers": {}}
        for peer in peers:
            if peer.name in failed:
                continue
            by_streams = {
                streams: {key: statistics.median(getattr(run, key) for run in found) for key in asdict(found[0])}
                for streams, found in runs[peer.name].items()
            }
            figures["peers"][peer.name] = {
                "kl": divergence.get(peer.name),
                "weights_bytes": bytes_of(peer.weights),
                "prefill": statistics.median(prefill[peer.name]),
                "bandwidth_share": by_streams["1"]["decode"] * bytes_read(peer.weights) / bandwidth,
                "streams": by_streams,
            }
        figures["failed"] = failed
        figures["first_token"] = {}
        made = first_token.prompts(tokenizer)
        for served, engine in zip(_of(TridentServer, peers), _of(TridentEngine, peers), strict=True):
            waits = first_token.first_tokens(client, served.model, engine, made, rounds)
            figures["first_token"][served.model] = {side: statistics.median(values) for side, values in waits.items()}
        figures["features"] = features(client, rounds)
    return figures


def _of(kind: type[P], peers: Sequence[Peer]) -> list[P]:
    return [peer for peer in peers if isinstance(peer, kind)]


def _trident(
    client: Client, spec: models_file.ModelSpec, repository: Path, texts: dict[tuple[int, ...], str]
) -> list[Peer]:
    """The server and the engine, of each exported variant but float32."""
    peers: list[Peer] = []
    for variant in spec.variants:
        if variant != "fp32":
            model = spec.public_name(variant)
            engine = TridentEngine(repository / model / "1", variant)
            peers += [TridentServer(client, model, variant, texts, engine), engine]
    return peers


def divergences(peers: Sequence[Peer], tokenizer: TextTokenizer, failed: dict[str, str]) -> dict[str, float]:
    """KL of each peer's next-token distributions against transformers in float32, in nats; who fails is noted."""
    samples = [tokenizer.encode(text)[:64] for text in corpora.held_out()][::2]
    exact = next(peer for peer in peers if peer.name == REFERENCE)
    reference = [exact.logits(ids) for ids in samples]
    found = {}
    for peer in peers:
        try:
            rows = [peer.logits(ids)[:, : reference[0].shape[1]] for ids in samples]
            found[peer.name] = fidelity.compare_logits(reference, rows)["kl"]
        except PeerError as error:
            failed[peer.name] = str(error)
    return found


def features(client: Client, rounds: int) -> Figures:
    """The gain of drafts and of prefix reuse, and how long running streams wait for a long prompt."""
    texts = [text for text in corpora.held_out() if text.isascii()]
    articles = ["\n".join(texts[start : start + 5])[:1500] for start in range(0, len(texts) - 4, 3)]
    tasks: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "quoting": ([f"{text}\n\nThe same text once more:\n\n{text[:120]}" for text in articles], {}),
        "summarizing": ([[{"role": "user", "content": f"Summarize this text:\n\n{text}"}] for text in articles], {}),
        # The penalty keeps a small model from repeating itself, so that drafts find nothing.
        "new words": (["Write about rivers, trains and winter:"] * 3, {"repetition_penalty": 1.5}),
    }
    article = "\n".join(texts)[:1500]
    system = "You are a careful assistant. " + article
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def rate(prompts: list[Any], options: dict[str, Any], lookup: bool) -> float:
        options = {"max_tokens": 160, "min_tokens": 160, "prompt_lookup": lookup} | options
        tokens, seconds = 0, 0.0
        for prompt in prompts:
            stream = client.stream(prompt, model=MODEL, **options)
            first = next(stream)
            started, last = time.perf_counter(), first
            for last in stream:  # noqa: B007
                pass
            seconds += time.perf_counter() - started
            tokens += last.num_output_tokens - first.num_output_tokens
        return tokens / seconds

    def first_token(prompt: str) -> float:
        started = time.perf_counter()
        stream = client.stream(prompt, model=MODEL, max_tokens=2)
        next(stream)
        seconds = time.perf_counter() - started
        stream.close()  # type: ignore[attr-defined]
        return seconds

    for number in range(rounds):
        for name, (prompts, options) in tasks.items():
            for lookup in (True, False) if number % 2 else (False, True):
                note(f"{name}, tokens/s with{'' if lookup else 'out'} drafts", rate(prompts, options, lookup))
        note("400-token beginning, new: first token, ms", 1e3 * first_token(f"{number} {system} What is a river?"))
        note("the same, shared: first token, ms", 1e3 * first_token(f"{number} {system} Where do trains go?"))
        undisturbed, disturbed = longest_pauses(client, f"{number} {article}" * 4)
        note("4 streams: longest pause, ms", undisturbed)
        note("4 streams with a prompt of 1,800 tokens: longest pause, ms", disturbed)
    return {name: statistics.median(values) for name, values in found.items()}


def longest_pauses(client: Client, prompt: str) -> tuple[float, float]:
    """The longest time between two responses of four streams, in ms: before and while a long prompt runs."""
    moments: list[list[float]] = [[] for _ in range(4)]

    def run(row: int) -> None:
        for _ in client.stream(f"Count to a thousand, {row}:", model=MODEL, max_tokens=400, min_tokens=400):
            moments[row].append(time.perf_counter())

    threads = [threading.Thread(target=run, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    while not all(len(row) > 20 for row in moments):
        time.sleep(0.01)
    begin = time.perf_counter()
    client.generate(prompt[:6800], model=MODEL, max_tokens=1)
    end = time.perf_counter()
    for thread in threads:
        thread.join()

    def longest(since: float, until: float) -> float:
        return 1e3 * max(float(np.diff([m for m in row if since <= m <= until]).max()) for row in moments)

    settled = max(row[10] for row in moments)
    return longest(settled, begin), longest(begin, end)


def memory_bandwidth() -> float:
    """Bytes a second that all cores read together."""
    array = np.ones(50_000_000, np.float32)
    halves = np.array_split(array, 2)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        threads = [threading.Thread(target=half.sum) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - started)
    return array.nbytes / best


def bytes_of(weights: Path) -> int:
    """The weights' size on disk."""
    if weights.is_file():
        return weights.stat().st_size
    kinds = ("*.onnx", "*.data", "*.safetensors", "openvino_model.bin", "model.bin")
    return sum(file.stat().st_size for kind in kinds for file in weights.glob(kind))


def bytes_read(weights: Path) -> int:
    """The bytes of weights that a token reads: all but a separate table of embeddings, of which it reads one row."""
    size = bytes_of(weights)
    if not (weights / "model.onnx").exists():
        return size
    graph = onnx.load(str(weights / "model.onnx"), load_external_data=False).graph
    # If the table has eight bits, the lookup has its scales as a third input.
    lookup = next(node for node in graph.node if "Gather" in node.op_type and node.input[1] == "input_ids")
    tables = [tensor for tensor in graph.initializer if tensor.name in lookup.input]
    widths = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.UINT8: 1}
    return size - sum(int(np.prod(table.dims)) * widths[table.data_type] for table in tables)


def as_table(figures: Figures) -> str:
    """The figures in Markdown; ratios are to llama.cpp, or to transformers where it does not run."""
    peers = figures["peers"]
    base = next((name for name in peers if name.startswith("llama.cpp")), REFERENCE)
    lines = [
        f"{figures['processor']}. Ratios in brackets are to {base}. "
        f"One prompt of {PREFILL_TOKENS} tokens; decoding of {TOKENS} tokens.",
        "",
    ]
    heads = "".join(f" decode, {streams} streams |" for streams in CONCURRENCY)
    lines += [f"| tokens/s | KL | weights MiB | bandwidth | prefill |{heads}"]
    lines += ["|---|---:|---:|---:|---:|" + "---:|" * len(CONCURRENCY)]
    for name, peer in peers.items():
        cells = [f"{peer['kl']:.4f}", f"{peer['weights_bytes'] / 2**20:.0f}", f"{peer['bandwidth_share']:.0%}"]
        cells.append(f"{peer['prefill']:.0f} ({peer['prefill'] / peers[base]['prefill']:.1f})")
        for streams in map(str, CONCURRENCY):
            rate, other = (peers[who]["streams"][streams]["decode"] for who in (name, base))
            ratio = f" ({rate / other:.2f})" if other else ""
            cells.append(f"{rate:.0f}{ratio}" if rate else "never all at once")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | failed: {why} |" + " |" * (3 + len(CONCURRENCY)) for name, why in figures["failed"].items()]
    lines += ["", f"| first token ms / gap p50 / gap p99 |{''.join(f' {s} streams |' for s in CONCURRENCY)}"]
    lines += ["|---|" + "---:|" * len(CONCURRENCY)]
    for name, peer in peers.items():
        cells = [
            f"{run['first_token']:.0f} / {run['gap_p50']:.0f} / {run['gap_p99']:.0f}"
            for run in (peer["streams"][str(streams)] for streams in CONCURRENCY)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| first token of a lone request of {first_token.PROMPT_TOKENS} tokens, ms | served | in process |"]
    lines += ["|---|---:|---:|"]
    for name, waits in figures["first_token"].items():
        lines.append(f"| {name} | {waits['served']:.0f} | {waits['in process']:.0f} |")
    lines += ["", "| features of the engine, through the server | |", "|---|---:|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in figures["features"].items()]
    return "\n".join(lines) + "\n"


def plot(figures: Figures, path: Path) -> None:
    """Throughput of 16 streams against fidelity."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, peer in figures["peers"].items():
        kl = max(peer["kl"], 1e-4)
        axes.scatter(kl, peer["streams"]["16"]["decode"])
        axes.annotate(
            name, (kl, peer["streams"]["16"]["decode"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.axvline(0.02, linewidth=0.8, linestyle="--", color="grey")
    axes.set_xlabel("KL against float32, nats (float32 itself is drawn at 1e-4; the line is int8's gate)")
    axes.set_ylabel("tokens/s, 16 streams")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
