"""`make load` measures the served models under load and writes reports/load.{json,md,svg}.

Over gRPC, over HTTP and at the gateway: with so many requests at a time, and with random (Poisson) arrivals. Our driver
compares every answer with that of a lone request; perf_analyzer and aiperf measure beside it. `--check` compares ratios
of throughput with stored ones. It starts a server and a gateway of its own, unless `--url` names others.

The exit status is 1 if an answer is wrong or missing, or a ratio is another one, and 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from benchmarks.load import ratios, report, session
from benchmarks.load.doors import DOORS, GATEWAY, GRPC, HTTP, SECONDS, Door, GatewayDoor, TridentDoor
from benchmarks.load.figures import Limits, Run
from benchmarks.load.others import AIPERF, PERF_ANALYZER, AiPerf, DriverError, PerfAnalyzer
from benchmarks.load.session import DRIVER, Found, Settings
from benchmarks.load.workloads import Generation, Workload
from trident_client import AsyncClient, TridentError
from trident_gateway.catalog import Model, catalog
from trident_serving.errors import StartError
from trident_serving.launcher import local

DRIVERS = (PERF_ANALYZER, AIPERF)  # beside ours
STORED = Path(__file__).parents[1] / "load_ratios.json"
TOLERANCE = 0.25
# Of `--check`, where the command line says nothing else: no random arrivals, since a ratio needs none.
CHECK = Settings(seconds=4.0, streams=(1, 16), rates=(), rounds=5)


class UsageError(Exception):
    """Nothing can be measured as it was asked for; the message says why."""


@dataclass(frozen=True)
class Addresses:
    """Where the doors are; "": there is none.

    Attributes:
        grpc: host and port.
        http: a base URL; `gateway` too.
        repository: with the tokenizers of the models; None: it is not known.
    """

    grpc: str
    http: str = ""
    gateway: str = ""
    repository: Path | None = None

    def of(self, door: str) -> str:
        """The address of a door."""
        return {GRPC: self.grpc, HTTP: self.http, GATEWAY: self.gateway}[door]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the reports, compare; returns the exit status."""
    options = parser().parse_args(arguments)
    settings = settings_of(options)
    try:
        with started(options) as addresses, tempfile.TemporaryDirectory(prefix="trident-load-") as scratch:
            machine = report.Machine.here()
            if machine.busy > machine.cores / 2:
                say(f"this machine is busy: {machine.busy:.1f} processes run or wait on its {machine.cores} cores")
            doors = chosen(options.doors, [door for door in DOORS if addresses.of(door)], "door")
            found = asyncio.run(measured(addresses, doors, options, settings))
            beside(found, addresses, doors, options, settings, Path(scratch))
    except (UsageError, StartError) as error:
        say(str(error))
        return 2
    report.write(found, settings, machine, options.reports)
    for sentence in found.left_out:
        say(f"left out: {sentence}")
    for sentence in found.faults:
        say(sentence)
    say(f"{options.reports / 'load.md'} has the results")
    if not found.runs:
        return 2
    status = 1 if found.faults else 0
    return max(status, checked(found, options, settings)) if options.check else status


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="load", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--repository", type=Path, default=Path("model_repository"))
    made.add_argument("--reports", type=Path, default=Path("reports"))
    made.add_argument("--cache", type=Path, default=Path(".cache"), help="where perf_analyzer is downloaded to")
    made.add_argument("--url", help="gRPC endpoint of a server that runs, in place of one that is started")
    made.add_argument("--http-url", default="", help="its HTTP endpoint")
    made.add_argument("--gateway-url", default="", help="its gateway")
    made.add_argument("--tokenizer", type=Path, help="a tokenizer.json for aiperf, where --url is given")
    made.add_argument("--models", type=names, help="some, separated by commas (default: all; --check: no variants)")
    made.add_argument("--doors", type=names, help=f"some of {','.join(DOORS)}")
    made.add_argument("--drivers", type=names, help=f"some of {','.join(DRIVERS)} beside ours (--check: none)")
    made.add_argument("--seconds", type=positive, help="of each measurement (10; --check: 4)")
    made.add_argument("--streams", type=counts, help="requests at a time, such as 1,4,16 (--check: 1,16)")
    made.add_argument(
        "--rate",
        type=rates,
        help=f"requests a second of random arrivals, such as 2,5; 0: none ({session.SHARE:.0%} of what gRPC answers)",
    )
    made.add_argument("--rounds", type=int, help="of each measurement (1; --check: 5)")
    made.add_argument("--tokens", type=int, default=Settings.tokens, help="of a generated answer (%(default)s)")
    limits = Limits()
    for name, value in vars(limits).items():
        flag = f"--{name.replace('_', '-')}-ms"
        made.add_argument(flag, type=positive, default=value, help="for goodput (default %(default)g)")
    made.add_argument("--check", action="store_true", help="compare ratios of throughput with stored ones")
    made.add_argument("--update", action="store_true", help="with --check: store this machine's ratios instead")
    made.add_argument("--ratios", type=Path, default=STORED, help="the file that stores them")
    made.add_argument("--tolerance", type=positive, default=TOLERANCE, help="share of a ratio (default %(default)g)")
    return made


def names(text: str) -> list[str]:
    """Parts between commas."""
    return [part for part in text.split(",") if part]


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def counts(text: str) -> list[int]:
    """Whole numbers above 0, rising."""
    values = sorted({int(part) for part in names(text)})
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers above 0")
    return values


def rates(text: str) -> list[float]:
    """Numbers; 0 is none."""
    values = [float(part) for part in names(text)]
    if min(values, default=0.0) < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be below 0")
    return [value for value in values if value]


def settings_of(options: argparse.Namespace) -> Settings:
    """What the command line says, or else what a measurement or a check has."""
    given = {name: getattr(options, name) for name in ("seconds", "streams", "rounds")} | {"rates": options.rate}
    limits = Limits(options.first_token_ms, options.inter_token_ms, options.latency_ms)
    base = replace(CHECK if options.check else Settings(), tokens=options.tokens, limits=limits)
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def chosen(asked: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """Those of the known ones that are asked for; all of them where nothing is said.

    Raises:
        UsageError: one is not known.
    """
    if asked is None:
        return list(known)
    for name in asked:
        if name not in known:
            raise UsageError(f"there is no {what} {name}, but there are {', '.join(known) or 'none'}")
    return [name for name in known if name in asked]


@contextlib.contextmanager
def started(options: argparse.Namespace) -> Iterator[Addresses]:
    """The server and the gateway: those that are named, or some of our own for the time of a `with` block.

    Raises:
        StartError: one of them does not get ready.
    """
    if options.url:
        yield Addresses(options.url, options.http_url, options.gateway_url)
        return
    options.reports.mkdir(exist_ok=True)
    (port,) = local.free_ports(1)
    say("starting a server and a gateway")
    server = local.start(options.repository, options.reports / "load-server.log", flags=("--gateway-port", str(port)))
    try:
        gateway = f"http://127.0.0.1:{port}"
        wait(gateway, server)
        yield Addresses(server.grpc_url, server.http_url, gateway, options.repository)
    finally:
        server.stop()


def wait(gateway: str, server: local.LocalServer, seconds: float = 60.0) -> None:
    """Until the gateway answers.

    Raises:
        StartError: it does not; the message holds the log.
    """
    until = time.monotonic() + seconds
    with httpx2.Client(base_url=gateway, trust_env=False) as client:
        while time.monotonic() < until and server.launcher.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if client.get("/ready").status_code == httpx2.codes.OK:
                    return
            time.sleep(0.1)
    raise StartError(f"the gateway was not ready within {seconds:g} s:\n{server.log.read_text()}")


async def measured(
    addresses: Addresses, names_: Sequence[str], options: argparse.Namespace, settings: Settings
) -> Found:
    """What our own driver measures.

    Raises:
        UsageError: the server does not answer, or has no such model.
    """
    found = Found()
    async with (
        AsyncClient(addresses.grpc, timeout=SECONDS, wait_if_full=False) as client,
        opened(addresses, names_) as doors,
    ):
        try:
            parameters = {name: await client.parameters(name) for name in await client.served()}
        except TridentError as error:
            raise UsageError(f"the server at {addresses.grpc} does not answer: {error}") from None
        models = select(catalog(parameters), options.models, options.check)
        for name in models:
            await session.measure(name, parameters[name], TridentDoor(GRPC, client), doors, settings, found, say)
    return found


def select(known: dict[str, Model], asked: Sequence[str] | None, check: bool) -> list[str]:
    """The models to measure: all, or without variants for a check, unless some are asked for.

    Raises:
        UsageError: one is not served.
    """
    every = sorted(known)
    return chosen(asked, every, "model") if asked or not check else [name for name in every if "_" not in name]


@contextlib.asynccontextmanager
async def opened(addresses: Addresses, names_: Sequence[str]) -> AsyncIterator[list[Door]]:
    """The doors of these names, with connections of their own."""
    async with contextlib.AsyncExitStack() as stack:
        doors: list[Door] = []
        for name in names_:
            address = addresses.of(name)
            if name == GATEWAY:
                limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
                web = httpx2.AsyncClient(base_url=address, timeout=SECONDS, limits=limits, trust_env=False)
                doors.append(GatewayDoor(await stack.enter_async_context(web)))
            else:
                client = AsyncClient(address, timeout=SECONDS, wait_if_full=False)
                doors.append(TridentDoor(name, await stack.enter_async_context(client)))
        yield doors


def beside(
    found: Found,
    addresses: Addresses,
    doors: Sequence[str],
    options: argparse.Namespace,
    settings: Settings,
    scratch: Path,
) -> None:
    """What the other drivers measure: with the most requests at a time, and with the first rate of random arrivals.

    Raises:
        UsageError: a driver is not known.
    """
    asked = [] if options.check and options.drivers is None else options.drivers
    for name in chosen(asked, DRIVERS, "driver"):
        try:
            driver = driver_of(name, addresses, doors, options, scratch)
        except DriverError as error:
            found.left_out.append(f"{name}: {error}")
            continue
        for model, workload in found.workloads.items():
            for door in [door for door in driver.doors(workload) if door in doors]:
                for own in owned(found, model, door):
                    drive(driver, replace(own, driver=name), own, workload, found, settings)


def driver_of(
    name: str, addresses: Addresses, doors: Sequence[str], options: argparse.Namespace, scratch: Path
) -> PerfAnalyzer | AiPerf:
    """One of the other drivers.

    Raises:
        DriverError: it can't be set up.
    """
    if name == PERF_ANALYZER:
        places = {GRPC: addresses.grpc, HTTP: addresses.http.removeprefix("http://")}
        return PerfAnalyzer(options.cache.resolve(), {door: places[door] for door in doors if door != GATEWAY}, scratch)

    def tokenizer_of(model: str) -> Path | None:
        if options.tokenizer or addresses.repository is None:
            file: Path | None = options.tokenizer
            return file
        base = model.partition("_")[0]
        files = [addresses.repository / folder / "1/tokenizer.json" for folder in (model, f"{base}_tokenizer")]
        return next((file for file in files if file.is_file()), None)

    return AiPerf(addresses.gateway, tokenizer_of, scratch)


def owned(found: Found, model: str, door: str) -> list[Run]:
    """The measurements of our driver that others repeat."""
    mine = [run for run in found.runs if (run.model, run.door, run.driver) == (model, door, DRIVER)]
    most = max((run.streams for run in mine if run.streams is not None), default=None)
    return [run for run in mine if run.streams == most and most] + [run for run in mine if run.streams is None][:1]


def drive(
    driver: PerfAnalyzer | AiPerf,
    run: Run,
    own: Run,
    workload: Workload | Generation,
    found: Found,
    settings: Settings,
) -> None:
    """One measurement by another driver; one that fails is left out."""
    count = round((found.speed(own) or 0.0) * settings.seconds)
    try:
        figures = driver.measure(run, workload, settings.seconds, count, settings.limits)
        found.add(run, figures)
        say(f"{run.told()}: {figures.requests_per_second:.1f} requests/s")
        if isinstance(driver, AiPerf) and isinstance(workload, Generation):
            chat = replace(run, driver=f"{AIPERF} chat")
            found.add(chat, driver.chats(chat, workload, settings.seconds, settings.limits))
    except DriverError as error:
        found.left_out.append(f"{run.told()}: {error}")


def checked(found: Found, options: argparse.Namespace, settings: Settings) -> int:
    """Compare the ratios with the stored ones, or store them; returns the exit status."""
    now = ratios.ratios(found.runs)
    if options.update:
        if found.faults:
            say("nothing is stored, because not all answers were right")
            return 1
        ratios.store(options.ratios, now, settings.tokens)
        say(f"stored in {options.ratios}")
        return 0
    try:
        stored = ratios.load(options.ratios)
    except FileNotFoundError:
        say(f"{options.ratios} does not exist: make load-check UPDATE=1 writes it, where nothing else runs")
        return 1
    except ValueError as error:
        say(str(error))
        return 1
    if not stored.on_this_machine():
        say(f"the ratios are those of another machine: {stored.processor}, {stored.cores} cores")
    if stored.tokens != settings.tokens:
        say(f"the ratios are those of answers of {stored.tokens} tokens, not of {settings.tokens}")
        return 1
    told = ratios.differences(wanted(stored.ratios, now, options), now, options.tolerance)
    for sentence in told:
        say(sentence)
    say("the ratios are those that are stored" if not told else f"differences: {len(told)}")
    return 1 if told else 0


def wanted(stored: ratios.Ratios, now: ratios.Ratios, options: argparse.Namespace) -> ratios.Ratios:
    """The stored ratios that this run should have: with flags that leave something out, those that it has."""
    if options.models is None and options.doors is None and options.streams is None:
        return stored
    return {
        model: {name: value for name, value in names_.items() if name in now.get(model, {})}
        for model, names_ in stored.items()
        if model in now
    }


def say(text: str) -> None:
    """Tell on standard error."""
    print(f"load: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
