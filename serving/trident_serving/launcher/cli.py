"""`python -m trident_serving`: serve a model repository until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.launcher import installation
from trident_serving.launcher.preflight import StartError
from trident_serving.launcher.server import Server, ServerOptions, check_machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status."""
    options = _parse(arguments)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    server_options = ServerOptions(
        repository=options.repository.resolve(),
        models=tuple(artefacts.loadable(options.repository)) if options.repository.is_dir() else (),
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        drain_seconds=options.drain_seconds,
        verbose=options.verbose,
    )
    try:
        found = installation.find()
        if options.check:
            check_machine(server_options)
            return 0
        server = Server(found, server_options)
    except StartError as error:
        print(f"trident: {error}", file=sys.stderr)
        return 1
    manifests = artefacts.read_manifests(options.repository)
    with server:
        loading = threading.Thread(target=_announce, args=(server, manifests, stopping), daemon=True)
        loading.start()
        while not stopping.is_set() and server.process.poll() is None:
            stopping.wait(0.2)
        if stopping.is_set():
            print("trident: draining", file=sys.stderr, flush=True)
        server.stop()
    loading.join(timeout=5)
    if not stopping.is_set():
        print(f"trident: tritonserver ended with status {server.process.returncode}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trident_serving", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--drain-seconds", type=int, default=30, help="how long requests in flight may take at the end")
    parser.add_argument("--check", action="store_true", help="start nothing, say whether a server could start here")
    parser.add_argument("--verbose", action="store_true", help="let tritonserver log what it loads and does")
    return parser.parse_args(arguments)


def _announce(server: Server, manifests: Sequence[Manifest], stopping: threading.Event) -> None:
    try:
        server.wait_ready()
    except StartError as error:
        if not stopping.is_set():
            print(f"trident: {error}", file=sys.stderr, flush=True)
            server.process.terminate()
        return
    print(welcome(server.options, manifests), flush=True)


def welcome(options: ServerOptions, manifests: Sequence[Manifest]) -> str:
    """What `make serve` prints when every model is ready."""
    lines = ["", "Trident is ready.", ""]
    for manifest in manifests:
        default, *others = manifest.public_models
        models = [f"{manifest.public_models[default]} ({default})"]
        models += [manifest.public_models[variant] for variant in others]
        lines.append(f"  {manifest.task:<20} {', '.join(models)}")
        lines += [
            f"  {'UNVERIFIED':<20} {manifest.public_models[variant]}: {reason}"
            for variant, reason in manifest.unverified.items()
        ]
    if plain := artefacts.plain_models(options.repository):
        lines.append(f"  {'plain models':<20} {', '.join(plain)}")
    if missing := artefacts.unexported(options.repository):
        lines.append(f"  not exported: {', '.join(missing)} (make export MODEL=name)")
    lines += [
        "",
        f"  HTTP     http://{options.host}:{options.http_port}",
        f"  gRPC     {options.host}:{options.grpc_port}",
        f"  metrics  http://{options.host}:{options.metrics_port}/metrics",
        "",
        "Try:",
    ]
    lines += [f"  {command}" for command in examples(options, manifests)]
    return "\n".join([*lines, ""])


def examples(options: ServerOptions, manifests: Sequence[Manifest]) -> list[str]:
    """Up to three commands that work on these models."""
    names = {manifest.task: manifest.name for manifest in reversed(manifests)}
    url = "" if options.grpc_port == 8001 else f" --url {options.host}:{options.grpc_port}"
    commands = []
    if generator := names.get("text-generation"):
        commands.append(f'.venv/bin/trident generate{url} --model {generator} "The capital of France is"')
        body = '{"text_input": "Once upon a time", "max_tokens": 40}'
        commands.append(f"curl -s http://{options.host}:{options.http_port}/v2/models/{generator}/generate -d '{body}'")
    if embedder := names.get("feature-extraction"):
        commands.append(f'.venv/bin/trident embed{url} --model {embedder} "A text to compare with others"')
    return commands
