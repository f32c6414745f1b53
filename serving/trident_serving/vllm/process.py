"""vLLM's worker as a child process: `worker.py` in vLLM's interpreter, lines of JSON both ways."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_serving.errors import LoadError
from trident_serving.vllm import interpreter

PROGRAM = Path(__file__).with_name("worker.py")
STOP_SECONDS = 5.0
# What the worker's environment has unless the server's says otherwise.
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    # vLLM binds its threads to processors; two models of one server would have the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class WorkerEnded(Exception):
    """The worker has ended; the message says how."""


@dataclass(frozen=True)
class Ready:
    """What the worker says once its engine is there.

    Attributes:
        version: vLLM's.
        vocabulary: tokens of the model.
        cache_tokens: tokens that its KV cache can hold.
    """

    version: str
    vocabulary: int
    cache_tokens: int


class WorkerProcess:
    """One worker, from the start of its engine to its end.

    Args:
        python: vLLM's interpreter.
        arguments: of vLLM's engine.
        threads: on a CPU.
        environment: the server's.

    Attributes:
        ready: what it said when its engine was there.

    Raises:
        LoadError: the engine can't be built; the message is vLLM's, and its log is on standard error.
    """

    def __init__(
        self,
        python: Path,
        arguments: Mapping[str, Any],
        threads: int,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [str(python), str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={"OMP_NUM_THREADS": str(threads)} | _DEFAULTS | interpreter.clean(environment),
            # A group of its own, so that vLLM's own processes can be ended with it.
            start_new_session=True,
        )
        # vLLM's processes hold the pipe, too: without them, the end of the worker is the end of its messages.
        threading.Thread(target=self._await_end, name="vllm-end", daemon=True).start()
        try:
            self._write({"arguments": dict(arguments)})
            first = next(self.messages(), {})
        except WorkerEnded:
            first = {}
        if "ready" not in first:
            self.close()
            why = first.get("failed") or f"its process {self.how()}"
            raise LoadError(f"vLLM can't serve this model: {why}; its log says more")
        self.ready = Ready(**first["ready"])

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def generate(self, number: int, asked: Mapping[str, Any]) -> None:
        """Ask for an answer; see `worker`.

        Raises:
            WorkerEnded: here and below.
        """
        self._write({"call": "generate", "id": number} | dict(asked))

    def cancel(self, number: int) -> None:
        """An answer is not wanted any more."""
        self._write({"call": "cancel", "id": number})

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the worker says, until it ends."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        for line in self._process.stdout:
            if line.endswith("\n"):  # it ended within another one
                message: dict[str, Any] = json.loads(line)
                yield message
        self._process.stdout.close()

    def how(self) -> str:
        """How the worker has ended, in words."""
        status = self._process.wait()
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def close(self) -> None:
        """End it, and pass over what it still says: for the thread that reads its messages."""
        self.stop()
        for _ in self.messages():
            pass

    def stop(self) -> None:
        """End it, with all that vLLM has started; another thread reads its messages to their end."""
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._kill()
        self._process.wait()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError):  # a closed file's
                raise WorkerEnded(f"vLLM's process {self.how()}") from None

    def _await_end(self) -> None:
        self._process.wait()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
