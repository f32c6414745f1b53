"""What a server's metrics say of its models: two samples of the page make a row a model. docs/reference/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trident_client import UnavailableError
from trident_client._settings import is_loopback
from trident_client.cli import extras
from trident_client.cli.exits import InputError

_Bounds = dict[float, float]  # how many observations lie at or below each bound
_CALLS = "trident_request_duration_seconds"


@dataclass(frozen=True)
class Sample:
    """The metrics at one time.

    Attributes:
        at: seconds, of a clock that only runs forward.
        values: by metric, without the `_total` of counters, and model; "" for a metric of the whole server.
        histograms: by metric and model.
    """

    at: float
    values: Mapping[tuple[str, str], float] = field(default_factory=dict)
    histograms: Mapping[tuple[str, str], _Bounds] = field(default_factory=dict)

    def models(self) -> list[str]:
        """Every model that has metrics."""
        return sorted({model for _, model in (*self.values, *self.histograms) if model})


@dataclass(frozen=True)
class Quantiles:
    """Of a latency, in seconds; None where nothing was observed. Buckets bound how exact they are."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True)
class Generator:
    """A model that generates, translates or summarizes.

    Attributes:
        slots_used, slots: in use, and all of them where that is known.
        requests_per_second: that ended.
        prompt_tokens_per_second, tokens_per_second: read and generated.
        first_token, inter_token, request, queue: latencies.
        kv_cache_tokens: that running sequences may grow to, and those kept for reuse.
        prefix_reused: share of the prompts' tokens that the cache already held; None without prompts.
        drafts_accepted: share of the drafted tokens; None without drafts.
        failed, rejected, cancelled: requests since the server started.
        loop_restarts: should be 0.
    """

    model: str
    requests_running: int
    requests_waiting: int
    slots_used: int
    slots: int | None
    requests_per_second: float
    prompt_tokens_per_second: float
    tokens_per_second: float
    first_token: Quantiles
    inter_token: Quantiles
    request: Quantiles
    queue: Quantiles
    kv_cache_tokens: int
    prefix_reused: float | None
    drafts_accepted: float | None
    failed: int
    rejected: int
    cancelled: int
    loop_restarts: int


@dataclass(frozen=True)
class Reader:
    """A model that answers each request at once, such as an embedder.

    Attributes:
        waiting: requests that wait to be run.
        texts_per_second: in those requests.
        batch: texts in one run of the model; None without a run.
        mean_request, mean_queue: seconds; None without a request.
        failed: requests since the server started.
    """

    model: str
    waiting: int
    requests_per_second: float
    texts_per_second: float
    batch: float | None
    mean_request: float | None
    mean_queue: float | None
    failed: int


@dataclass(frozen=True)
class Snapshot:
    """All models.

    Attributes:
        seconds: over which rates are counted.
        cpu: share of the machine's processors; None where it isn't told.
        gpu: the same of each GPU, by its UUID.
    """

    seconds: float
    generators: Sequence[Generator]
    readers: Sequence[Reader]
    cpu: float | None
    gpu: Mapping[str, float]


def fetch(url: str, headers: Mapping[str, str], ca: str | None = None, seconds: float = 10.0) -> str:
    """The page of metrics.

    Args:
        ca: file of the certificates that may sign the server's; None: those of the system.
        seconds: it may take.

    Raises:
        UnavailableError: it can't be had.
        InputError: the address is none.
    """
    import ssl
    import urllib.error
    import urllib.parse
    import urllib.request  # here, because other commands need not wait for their imports

    try:
        host = urllib.parse.urlsplit(url).netloc
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
        if url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca)))
        request = urllib.request.Request(url, headers=dict(headers))
        with urllib.request.build_opener(*handlers).open(request, timeout=seconds) as response:
            text: str = response.read().decode("utf-8", "replace")
            return text
    except urllib.error.HTTPError as error:
        error.close()
        raise UnavailableError(f"there are no metrics at {url}: status {error.code}") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(
            f"there are no metrics at {url}: {getattr(reason, 'strerror', None) or reason}"
        ) from None
    except ValueError as error:
        raise InputError(f"{url} is no address of metrics: {error}") from None


def read(text: str, at: float) -> Sample:
    """A page of metrics; those of a model's versions are added up.

    Raises:
        InputError: it is no page of metrics.
    """
    with extras.installed("trident top"):
        from prometheus_client.parser import text_string_to_metric_families
    values: dict[tuple[str, str], float] = {}
    histograms: dict[tuple[str, str], _Bounds] = {}
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"that is no page of metrics: {error}") from None
    if not samples:
        raise InputError("that is no page of metrics: it has none")
    for sample in samples:
        model = sample.labels.get("model", sample.labels.get("gpu_uuid", ""))
        if bound := sample.labels.get("le"):
            bounds = histograms.setdefault((sample.name.removesuffix("_bucket"), model), {})
            bounds[float(bound)] = bounds.get(float(bound), 0.0) + sample.value
        else:
            name = sample.name.removesuffix("_total")  # the parser gives it to Triton's counters, which have none
            values[name, model] = values.get((name, model), 0.0) + sample.value
    return Sample(at, values, histograms)


def compare(
    new: Sample, old: Sample, slots: Mapping[str, int], *, latencies: Sample | None = None, stages: bool = False
) -> Snapshot:
    """What happened between two samples.

    Args:
        slots: of models, where they are known.
        latencies: the sample since which latencies and shares count; None: `old`.
        stages: whether the stages and variants of models are told, too.
    """
    since = latencies or old
    models = [model for model in new.models() if stages or "_" not in model]
    gpus = {name for metric, name in new.values if metric == "nv_gpu_utilization"}
    generators = [model for model in models if (_CALLS, model) in new.histograms]
    readers = [
        model for model in models if model not in {*generators, *gpus} and ("nv_inference_count", model) in new.values
    ]
    return Snapshot(
        seconds=new.at - old.at,
        generators=[_generator(new, old, since, model, slots.get(model)) for model in generators],
        readers=[_reader(new, old, since, model) for model in readers],
        cpu=new.values.get(("nv_cpu_utilization", "")),
        gpu={name: new.values["nv_gpu_utilization", name] for name in sorted(gpus)},
    )


def _generator(new: Sample, old: Sample, since: Sample, model: str, slots: int | None) -> Generator:
    def gauge(name: str) -> int:
        return int(new.values.get((f"trident_{name}", model), 0))

    def rate(name: str) -> float:
        return _rate(new, old, f"trident_{name}", model)

    def share(part: str, whole: str) -> float | None:
        parts, total = (_rise(new, since, f"trident_{name}", model) for name in (part, whole))
        return parts / total if total > 0 else None

    def latency(name: str) -> Quantiles:
        return _quantiles(new, since, f"trident_{name}_seconds", model)

    return Generator(
        model=model,
        requests_running=gauge("requests_running"),
        requests_waiting=gauge("requests_waiting"),
        slots_used=gauge("slots_used"),
        slots=slots,
        requests_per_second=rate("request_duration_seconds_count"),
        prompt_tokens_per_second=rate("prompt_tokens"),
        tokens_per_second=rate("generated_tokens"),
        first_token=latency("time_to_first_token"),
        inter_token=latency("inter_token_latency"),
        request=latency("request_duration"),
        queue=latency("queue_time"),
        kv_cache_tokens=gauge("kv_cache_tokens"),
        prefix_reused=share("prefix_hit_tokens", "prompt_tokens"),
        drafts_accepted=share("draft_tokens_accepted", "draft_tokens"),
        failed=gauge("requests_failed"),
        rejected=gauge("requests_rejected"),
        cancelled=gauge("requests_cancelled"),
        loop_restarts=gauge("loop_restarts"),
    )


def _reader(new: Sample, old: Sample, since: Sample, model: str) -> Reader:
    def rise(name: str) -> float:
        return _rise(new, since, f"nv_inference_{name}", model)

    requests = rise("request_success")
    runs = rise("exec_count")
    return Reader(
        model=model,
        waiting=int(new.values.get(("nv_inference_pending_request_count", model), 0)),
        requests_per_second=_rate(new, old, "nv_inference_request_success", model),
        texts_per_second=_rate(new, old, "nv_inference_count", model),
        batch=rise("count") / runs if runs else None,
        mean_request=rise("request_duration_us") / requests / 1e6 if requests else None,
        mean_queue=rise("queue_duration_us") / requests / 1e6 if requests else None,
        failed=int(new.values.get(("nv_inference_request_failure", model), 0)),
    )


def _rise(new: Sample, old: Sample, name: str, model: str) -> float:
    """By how much a counter rose; a server that was started again counts from 0."""
    now, before = new.values.get((name, model), 0.0), old.values.get((name, model), 0.0)
    return now - before if now >= before else now


def _rate(new: Sample, old: Sample, name: str, model: str) -> float:
    seconds = new.at - old.at
    return _rise(new, old, name, model) / seconds if seconds > 0 else 0.0


def _quantiles(new: Sample, old: Sample, name: str, model: str) -> Quantiles:
    now, before = new.histograms.get((name, model), {}), old.histograms.get((name, model), {})
    if before and max(before.values()) > max(now.values(), default=0.0):
        before = {}
    rises = {bound: count - before.get(bound, 0.0) for bound, count in sorted(now.items())}
    return Quantiles(quantile(rises, 0.5), quantile(rises, 0.99))


def quantile(bounds: Mapping[float, float], share: float) -> float | None:
    """A quantile of a histogram, between its bounds as Prometheus has it; None of an empty one.

    Args:
        bounds: how many observations lie at or below each bound, rising; the last is infinite.
        share: 0.99 for the 99th percentile.
    """
    total = max(bounds.values(), default=0.0)
    if total <= 0:
        return None
    wanted, lower, below = share * total, 0.0, 0.0
    for bound, count in bounds.items():
        if count >= wanted:
            if math.isinf(bound) or count == below:
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower
