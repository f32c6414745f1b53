"""Slow work while a server is watched: models that are loaded again, failed loads that are cleared."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from functools import partial

from trident_serving import artefacts
from trident_serving.errors import ControlError, Refused
from trident_serving.launcher import failures, processes
from trident_serving.launcher.failures import IndexEntry
from trident_serving.launcher.leftovers import Leftovers
from trident_serving.launcher.liveness import Liveness, say
from trident_serving.launcher.server import Server

CARE_SECONDS = 1.0
# A model that dies often, or can't be loaded, stays unloaded for this long, so that it does not keep the machine busy.
PAUSE_SECONDS = 20.0
# The launcher makes a server unready with a failed load of this model, when it shuts down.
NOT_READY = "shutting-down"


class Care:
    """A thread for slow work: models that are loaded again, failed loads and unloads that are cleared.

    Attributes:
        liveness: whether the server answers.
        broken: why the server can't go on; "" while it can.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._orders: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
        self._due: dict[str, float] = {}
        # Models whose failed load was cleared; an ensemble among them failed with one of its stages.
        self._cleared: set[str] = set()
        self._later: set[str] = set()  # models that wait for HTTP
        self._leftovers = Leftovers()
        self._refused = dict(server.view.refused)  # those of the start have been told
        self.broken = ""
        self._stopping = threading.Event()
        self.liveness = Liveness(server.control, server.options.grpc_address)
        threading.Thread(target=self._tend, name="care", daemon=True).start()

    def reload(self, model: str, pause: float = 0.0) -> None:
        """Unload a model, and load it `pause` seconds later."""
        self._orders.put((model, pause))

    def stop(self) -> None:
        """Tell the threads to end; they begin nothing new."""
        self.liveness.stop()
        self._stopping.set()
        self._orders.put(None)

    def _tend(self) -> None:
        while not self._stopping.is_set():
            try:
                order = self._orders.get(timeout=CARE_SECONDS)
            except queue.Empty:
                self._clear_failures()
            else:
                if order is not None:
                    self._unload(*order)
            for model in [model for model, due in self._due.items() if due <= time.monotonic()]:
                self._load(model)

    def _unload(self, model: str, pause: float) -> None:
        try:
            if self._is_unwanted(model):
                say(f"{model} was unloaded meanwhile, so it is not loaded again")
                return
            self._server.control.unload(model)
        except ControlError as error:
            if self._is_later(model):
                self._orders.put((model, pause))
                return
            self._give_up(model, error)
        self._due[model] = time.monotonic() + pause

    def _is_unwanted(self, model: str) -> bool:
        """Whether a client unloads the model; Triton still reports READY for a model whose process has died."""
        states = {entry.name: entry for entry in self._server.control.index()}
        entry = states.get(model, failures.IndexEntry(model))
        return entry.state == "UNLOADING" or entry.reason == "unloaded"

    def _load(self, model: str) -> None:
        del self._due[model]
        try:
            self._server.view.refresh()
            self._server.control.load(model, self._server.options.ready_seconds)
            for ensemble in self._ensembles_of(model):
                self._cleared.discard(ensemble)
                self._server.control.load(ensemble, self._server.options.ready_seconds)
            self._later.discard(model)
            say(f"{model} answers again")
        except Refused as error:  # only this model failed; the others are served
            say(f"{model} can't be loaded: {failures.one_line(str(error))}; it is tried again in {PAUSE_SECONDS:.0f} s")
            self._due[model] = time.monotonic() + PAUSE_SECONDS
        except (ControlError, OSError) as error:
            if self._is_later(model):
                self._due[model] = time.monotonic()
            else:
                self._give_up(model, error)

    def _ensembles_of(self, model: str) -> list[str]:
        """The public models that failed with a stage; Triton does not load them again by itself."""
        manifests = artefacts.read_manifests(self._server.options.repository)
        owners = [manifest for manifest in manifests if model in manifest.triton_models]
        public = {name for manifest in owners for name in manifest.called}
        return sorted((public & self._cleared) - {model})

    def _is_later(self, model: str) -> bool:
        """Whether the server only takes no orders now, which come over HTTP, and answers all the same."""
        if not self.liveness.grpc_only:
            return False
        if model not in self._later:
            self._later.add(model)
            say(f"{model} is loaded again once HTTP answers")
        self._stopping.wait(CARE_SECONDS)
        return True

    def _give_up(self, model: str, error: Exception) -> None:
        if not self._stopping.is_set():
            self.broken = f"{model} could not be loaded again ({error})"

    def _clear_failures(self) -> None:
        """Update the links to the repository, and clear failed loads and unloads, so that the server stays ready."""
        try:
            self._server.view.refresh()
            for name, why in self._server.view.refused.items():
                if self._refused.get(name) != why:
                    say(f"{name} is not loaded: {why}")
            self._refused = dict(self._server.view.refused)
            index = self._server.control.index()
            for entry in index:
                # Clearing loads another model under the name: a version that answers would go.
                if entry.failed and not entry.served and entry.name != NOT_READY:
                    say(f"{entry.name} could not be loaded: {failures.one_line(entry.reason)}")
                    self._server.control.clear_failure(entry.name, entry.version)
                    self._cleared.add(entry.name)
            self._free(index)
        except (ControlError, OSError):
            return  # the health check finds out whether the server is well

    def _free(self, index: Sequence[IndexEntry]) -> None:
        """End processes that serve nothing any more, and finish the unloads that Triton can't finish."""
        known = {entry.name: entry for entry in index}
        unloading = {(entry.name, version) for entry in index for version in entry.unloading}
        present = {e.name for e in index if e.served or e.unloading or e.state not in ("", "UNAVAILABLE")}
        shared = partial(artefacts.named_by_plain_models, self._server.options.repository)
        processes_left, models = self._leftovers.find(unloading, self._server.runtime.records(), present, shared)
        for record in processes_left:
            record.path.unlink(missing_ok=True)  # first, so that it does not count as one that has died
            processes.kill(record.pid)
            say(f"a backend process of {record.model} served nothing any more and did not end by itself; it was ended")
        if not models:
            return
        manifests = artefacts.read_manifests(self._server.options.repository)
        ours = {model for manifest in manifests for model in manifest.triton_models}
        for name, version in models:
            # As above: of a model that answers in another version, this one stays as it is, without a process.
            if name in ours and name not in self._due and not known[name].served:
                self._server.control.clear_failure(name, version)
                say(f"{name} is unloaded: tritonserver still held a request of a client that had gone")
