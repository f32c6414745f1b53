"""`python -m trident_export` without its five to fifteen seconds of imports: forks of a process that has them.

What runs is the same module, in a process of its own with its own output, working directory and exit status. Only what
a library reads from the environment while it is imported is not the caller's.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # tiny models gain nothing from threads, which wait for each other when others work
    "ORT_DISABLE_TELEMETRY": "1",  # its thread is in no fork, which then waits for it
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_TASKS = ("tasks.encoders.classification", "tasks.seq2seq", "tasks.text_generation")
_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m trident_export` with the arguments, in the environment of this process.

    Raises:
        RuntimeError: the warm process ended.
    """
    with _lock, tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = _started()
        assert process.stdin is not None
        assert process.stdout is not None
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (stdout, stderr)]
        order = {"arguments": arguments, "cwd": str(cwd), "files": files, "environment": dict(os.environ)}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs the exporter's commands ended with {process.wait()}")
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, int(answer), stdout.read(), stderr.read())


def _started() -> subprocess.Popen[str]:
    global _process
    if _process is None:
        command, environment = [sys.executable, "-m", "tests.warm"], dict(os.environ) | _ENVIRONMENT
        _process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_end, _process)
    return _process


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


def _import() -> None:
    """What the commands import sooner or later."""
    for name in ("add", "cli", "compression.curve", "compression.distillation", *_TASKS):
        importlib.import_module(f"trident_export.{name}")
    importlib.import_module("transformers.models.auto.modeling_auto")


def _serve() -> None:
    """A fork for each order on stdin; its exit status to stdout."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    stdout, stderr = order["files"]
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        file = os.open(path, flags | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.argv[1:] = order["arguments"]
    try:
        runpy.run_module("trident_export", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take down what was imported costs a second


if __name__ == "__main__":
    gc.disable()
    _import()
    gc.freeze()  # a fork that collects garbage need not look at what was imported, nor copy it
    gc.enable()
    _serve()
