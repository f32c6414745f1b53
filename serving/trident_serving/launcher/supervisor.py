"""Runs a server from its start to its end: restarts what has died, and finishes running requests before the end.

The record of a backend process (see `runtime_folder`) shows that it has died or hangs. Its model is then unloaded and
loaded again; the other models go on. Triton tells nothing to the callers whose answers the process held (2.51), so
their connections are closed. If the system does not allow that, or the server does not answer, the whole server is
restarted.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from trident_serving import artefacts
from trident_serving.errors import ControlError, ServerDied, StartError
from trident_serving.launcher import failures, processes
from trident_serving.launcher.care import NOT_READY, PAUSE_SECONDS, Care, say
from trident_serving.launcher.failures import Failure, IndexEntry
from trident_serving.launcher.gateway import Gateway
from trident_serving.launcher.process_watch import ProcessWatch
from trident_serving.launcher.server import END_SECONDS, Server
from trident_serving.runtime_folder import Record

TICK_SECONDS = 0.2
# A server that answers no health check for this long hangs.
SERVER_SILENT_SECONDS = 10.0
# Restarts of the server, and of a model, are counted over this time.
WINDOW_SECONDS = 300.0
MODEL_RESTARTS = 3
# tritonserver 2.51 aborts now and then while it loads Python backends (boost's lock_exception): it is started again, at
# most so often in a row. One that the system kills, for want of memory, would only be killed again.
LOAD_TRIES = 3
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)
# If no request is open in two looks this far apart, none is between two stages.
QUIET_SECONDS = 0.2


@dataclass(frozen=True)
class Policy:
    """How long a server drains, and how often it is restarted.

    Attributes:
        grace: seconds that running requests get when the server shuts down.
        restarts: of tritonserver in five minutes, before the launcher gives up.
        notice: seconds before that in which the server is not ready and still takes requests, so that whoever balances
            them between servers sees it in time.
    """

    grace: float = 45.0
    restarts: int = 3
    notice: float = 0.0


@dataclass
class Orders:
    """Orders to the launcher: to end, and to end at once."""

    stop: threading.Event = field(default_factory=threading.Event)
    stop_now: threading.Event = field(default_factory=threading.Event)


class Supervisor:
    """Runs one server until it is told to end.

    Args:
        server: not started yet.
        orders: set by another thread or a signal handler.
        announce: called once when the server is ready for the first time, with the models that are not served.
        gateway: started beside the server and ended before it; None: there is none.
    """

    def __init__(
        self,
        server: Server,
        policy: Policy,
        orders: Orders,
        announce: Callable[[list[Failure]], None],
        gateway: Gateway | None = None,
    ) -> None:
        self._server = server
        self._policy = policy
        self._orders = orders
        self._announce = announce
        self._gateway = gateway
        self._restarts: deque[float] = deque()
        self._reloads: dict[str, deque[float]] = {}
        self._watch = ProcessWatch()
        self._live = False
        self._announced = False

    def run(self) -> int:
        """Serve until the end.

        Returns:
            The exit status: 0 if no request was cut off.
        """
        tries = 1
        try:
            while True:
                self._live = False
                try:
                    return self._serve()
                except (ServerDied, ControlError) as died:
                    crashed = not self._live and self._server.status in CRASHES
                    self._server.end(0.0)
                    if crashed and tries < LOAD_TRIES and self._policy.restarts:
                        tries += 1
                    elif (self._live or self._announced) and self._may_restart():
                        tries = 1
                    else:
                        say(str(died))
                        return 1
                    say(f"{died}; it is started again")
        finally:
            if self._gateway is not None:
                self._gateway.end(0.0, self._orders.stop_now)

    def _may_restart(self) -> bool:
        return _within(self._restarts, self._policy.restarts)

    def _serve(self) -> int:
        wanted = self._server.start()
        failed = self._wait_loaded(wanted)
        if failed is None:
            self._server.end(0.0)
            return 0
        if self._announced:
            say("the server is ready again")
        else:
            self._announce(failed)
        self._announced = True
        care = Care(self._server)
        try:
            while not self._orders.stop.wait(TICK_SECONDS):
                if self._gateway is not None:
                    self._gateway.tend()
                self._check_server(care)
                self._server.close_shared_memory()
                for record, why in self._watch.fallen(self._server.runtime.records()):
                    self._restore(record, why, care)
        finally:
            care.stop()
        return self._drain()

    def _wait_loaded(self, wanted: list[str]) -> list[Failure] | None:
        """Wait until the models are loaded.

        Returns:
            The models that are not served; None if the launcher was told to end before.

        Raises:
            ServerDied: the server ended, or did not load its models in time.
            StartError: no model could be loaded.
        """
        control, seconds = self._server.control, self._server.options.ready_seconds
        deadline = time.monotonic() + seconds
        hidden = False
        while not control.live(seconds=2.0):
            if self._orders.stop.wait(0.05):
                return None
            if self._server.status is not None:
                raise ServerDied(
                    f"tritonserver {ending(self._server.status)} while it loaded the models: its messages above say why"
                )
            if time.monotonic() > deadline:
                raise ServerDied(f"the models were not ready within {seconds:.0f} s")
            # A server that has begun to load models has read its command line.
            if not hidden and processes.has_children(self._server.pid):
                self._server.hide_key()
                hidden = True
        self._live = True
        self._server.hide_key()
        self._server.close_shared_memory()
        self._server.view.refresh()  # a model may have gone while the others were loaded
        index = control.index()
        gone = [IndexEntry(name, "UNAVAILABLE", "its folder is missing") for name in sorted(self._server.view.missing)]
        manifests = artefacts.read_manifests(self._server.options.repository)
        failed = failures.find([*gone, *index], wanted, manifests)  # what was loaded before it went is served
        failed += [Failure(name, (name,), name, why) for name, why in self._server.view.refused.items()]
        if not failures.anything_ready(index, wanted):
            repository = self._server.options.repository
            raise StartError("no model could be loaded: " + "; ".join(one.sentence(repository) for one in failed))
        for entry in index:
            if entry.failed:
                control.clear_failure(entry.name, entry.version)
        while not control.ready():
            if self._orders.stop.wait(0.1):
                return None
            if self._server.status is not None or time.monotonic() > deadline:
                raise ServerDied("tritonserver loaded its models and did not become ready")
        return failed

    def _check_server(self, care: Care) -> None:
        status = self._server.status
        if status is not None:
            raise ServerDied(f"tritonserver {ending(status)}")
        state = processes.state(self._server.pid)
        if state.stopped or care.silent_seconds > SERVER_SILENT_SECONDS:
            raise ServerDied("tritonserver does not answer any more")
        if care.broken:
            raise ServerDied(care.broken)

    def _restore(self, record: Record, why: str, care: Care) -> None:
        """Load the model of a dead process again."""
        what = f"the backend process of {record.model} {why}"
        self._tell_callers(record, what)
        reloads = self._reloads.setdefault(record.model, deque())
        if _within(reloads, MODEL_RESTARTS):
            say(f"{what}; the model is loaded again")
            care.reload(record.model)
        else:
            say(f"{what}, again; the model is loaded in {PAUSE_SECONDS:.0f} s")
            care.reload(record.model, PAUSE_SECONDS)

    def _tell_callers(self, record: Record, what: str) -> None:
        """Close the connections of the callers whose answers the process held: Triton does not tell them."""
        options = self._server.options
        if record.held and not processes.close_connections(self._server.pid, {options.http_port, options.grpc_port}):
            raise ServerDied(f"{what} with {record.held} requests, whose callers only learn of it when the server ends")

    def _drain(self) -> int:
        """Finish the running requests, then end the server."""
        server, policy = self._server, self._policy
        if policy.notice:
            say(f"shutting down in {policy.notice:g} s: the server is not ready any more, and still takes requests")
            server.control.be_unready(NOT_READY)
            self._wait_notice()
        say("shutting down: running requests are finished, new ones are refused")
        asked = time.monotonic()
        deadline = asked + policy.grace
        if self._gateway is not None:  # first, so that what waits in it is still answered
            self._gateway.end(policy.grace, self._orders.stop_now)
        server.runtime.drain()
        if not policy.notice:
            server.control.be_unready(NOT_READY)
        quiet_since, cut = time.monotonic(), 0
        while not (self._orders.stop_now.is_set() or server.status is not None or processes.state(server.pid).stopped):
            records = server.runtime.records()
            for record, _ in self._watch.fallen(records):
                # Its callers learn of it when the server ends; closing connections now would cut off the others.
                cut += record.held
                records.remove(record)
            now = time.monotonic()
            if any(record.open for record in records):
                quiet_since = now
            if now - quiet_since >= QUIET_SECONDS or now >= deadline:
                break
            self._orders.stop_now.wait(TICK_SECONDS / 2)
        cut += sum(record.open for record in server.runtime.records())
        if server.status is not None or processes.state(server.pid).stopped:
            how = "does not answer" if server.status is None else ending(server.status)
            say(f"tritonserver {how} while it was shut down; running requests were cut off")
            server.end(0.0)
            return 1
        waited = time.monotonic() - asked
        server.end(0.0 if self._orders.stop_now.is_set() else END_SECONDS)
        if not cut:
            return 0
        why = "at once, as asked" if self._orders.stop_now.is_set() else f"after {waited:.0f} s"
        say(f"{cut} {'request was' if cut == 1 else 'requests were'} cut off: the server ended {why}")
        return 1

    def _wait_notice(self) -> None:
        """Go on answering while others learn that the server is not ready; ends early where nothing can answer."""
        until = time.monotonic() + self._policy.notice
        while time.monotonic() < until and self._server.status is None:
            if self._orders.stop_now.wait(min(TICK_SECONDS, self._policy.notice)):
                return


def ending(status: int) -> str:
    """How a process ended, by its status as `subprocess` has it."""
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _within(times: deque[float], limit: int) -> bool:
    """Whether the window allows one more event, which is then counted."""
    now = time.monotonic()
    while times and now - times[0] > WINDOW_SECONDS:
        times.popleft()
    if len(times) >= limit:
        return False
    times.append(now)
    return True
