"""A peer in a process of its own. A library that crashes, hangs or fails is a sentence in the table, and no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import Environment, PeerError, python_of
from benchmarks.peers.interface import THREADS, Floats, Prompts, Times

ROOT = Path(__file__).parents[2]
STARTING = 1800  # seconds: some convert the model first
ANSWERING = 600


class PeerProcess:
    """Runs a peer of `benchmarks.peers.child`.

    Args:
        python: the interpreter of the peer's environment.
        peer: its name there.
        source: the Hugging Face folder, or the file that the peer reads.
        work: where it keeps what it converts.
        log: what the library prints.

    Raises:
        PeerError: it does not start.
    """

    def __init__(self, python: Path, peer: str, source: Path, work: Path, log: Path) -> None:
        self._lock = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="trident-peer-")
        self._log = log
        work.mkdir(parents=True, exist_ok=True)
        threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.peers.child", peer, str(source.resolve()), str(work.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=ROOT,
                env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            )
        try:
            told = self._reply(STARTING)
        except PeerError:
            self.close()
            raise
        self.name = str(told["name"])
        self.weights = Path(told["weights"])

    def generate(self, prompts: Prompts, tokens: int) -> Times:
        """See `Peer.generate`.

        Raises:
            PeerError: the library failed, or its process has ended; here and below.
        """
        times: Times = self._ask(call="generate", prompts=[list(prompt) for prompt in prompts], tokens=tokens)["times"]
        return times

    def logits(self, ids: Sequence[int]) -> Floats:
        """See `Peer.logits`."""
        return self._array(call="logits", ids=list(ids))

    def embed(self, texts: Sequence[str], batch_size: int) -> Floats:
        """See `Embedder.embed`."""
        return self._array(call="embed", texts=list(texts), batch_size=batch_size)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def _array(self, **request: Any) -> Floats:
        file = Path(self._scratch.name) / "array.npy"
        self._ask(**request, file=str(file))
        found: Floats = np.load(file)
        return found

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except OSError:
                raise PeerError(self._end()) from None
            return self._reply(ANSWERING)

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late = not watchdog.is_alive()
            watchdog.cancel()
        if not line:
            raise PeerError(f"no answer within {seconds:.0f} s" if late else self._end())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def _end(self) -> str:
        status = self._process.wait()
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process ended with status {status}{': ' + lines[-1] if lines else ''}"


def started(
    environments: Sequence[Environment],
    kind: str,
    source_of: Callable[[str], Path],
    cache: Path,
    logs: Path,
    failed: dict[str, str],
) -> Iterator[PeerProcess]:
    """The peers of some environments, each in its process; who can't be installed or started is noted.

    Args:
        kind: "generators" or "embedders".
        source_of: a peer's model, by the peer's name.
        logs: a folder.
        failed: reasons by name, which this adds to.
    """
    for environment in environments:
        names: tuple[str, ...] = getattr(environment, kind)
        try:
            python = python_of(environment, cache) if names else Path()
        except PeerError as error:
            failed |= dict.fromkeys(names, str(error))
            continue
        for name in names:
            print(f"bench: starting {name}", file=sys.stderr)
            try:
                work = cache / "peers" / "models" / environment.name
                yield PeerProcess(python, name, source_of(name), work, logs / f"bench-{name}.log")
            except PeerError as error:
                failed[name] = str(error)
