"""`python -m trident_serving`: serve a model repository until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.errors import StartError
from trident_serving.integrity import TRUSTED_KEYS
from trident_serving.launcher import installation
from trident_serving.launcher.failures import Failure
from trident_serving.launcher.gateway import Gateway
from trident_serving.launcher.server import Server, ServerOptions, check_machine
from trident_serving.launcher.supervisor import Orders, Policy, Supervisor

# Set in our images.
CONTAINER = "TRIDENT_CONTAINER"
READY = "Trident is ready."


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status, 0 if no request was cut off."""
    options = _parse(arguments)
    orders = Orders()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (orders.stop_now if orders.stop.is_set() else orders.stop).set())
    server_options = ServerOptions(
        repository=options.repository.resolve(),
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        admin_key_file=options.admin_key_file,
        verbose=options.verbose,
        gateway_port=options.gateway_port,
        trusted_keys=options.trusted_keys,
    )
    try:
        found = installation.find()
        gateway = None
        if options.gateway_port:
            gateway = Gateway(server_options, options.gateway_port, options.gateway_keys, options.grace)
        if options.check:
            check_machine(server_options)
            print("trident: a server can start on this machine: Python, the packages and the ports are right")
            return 0
        with Server(found, server_options) as server:
            if options.until_stdin_closes:
                threading.Thread(target=_end_with_stdin, args=(orders,), daemon=True).start()
            return Supervisor(
                server,
                Policy(grace=options.grace, restarts=options.restarts, notice=options.notice),
                orders,
                lambda failed: print(welcome(server_options, failed), flush=True),
                gateway,
            ).run()
    except StartError as error:
        print(f"trident: {error}", file=sys.stderr)
        return 1


def _end_with_stdin(orders: Orders) -> None:
    """End at once when standard input ends, because the program that held its other end is gone."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    orders.stop.set()
    orders.stop_now.set()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trident-serve", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument(
        "--gateway-port", type=int, default=0, help="port of the gateway with OpenAI's API; 0 (default): there is none"
    )
    parser.add_argument("--gateway-keys", type=Path, help="its file of API keys, made by 'trident-gateway key add'")
    parser.add_argument(
        *("--grace", "--drain-seconds"),
        type=_seconds,
        default=Policy.grace,
        help="seconds that running requests get after a signal to end (default %(default)g)",
    )
    parser.add_argument(
        "--notice",
        type=_seconds,
        default=Policy.notice,
        help="seconds before that in which the server is not ready and still takes requests (default %(default)g)",
    )
    parser.add_argument(
        "--restarts",
        type=_count,
        default=Policy.restarts,
        help="how often tritonserver is started again in five minutes, if it dies (default %(default)s)",
    )
    parser.add_argument("--admin-key-file", type=Path, help="file for the admin key (docs/reference/security.md)")
    parser.add_argument(
        "--trusted-keys",
        type=Path,
        default=Path(os.environ[TRUSTED_KEYS]) if os.environ.get(TRUSTED_KEYS) else None,
        metavar="FILE",
        help="public keys: load only models that one of them has signed ('trident-export sign')",
    )
    parser.add_argument("--check", action="store_true", help="start nothing, say whether a server could start here")
    parser.add_argument("--verbose", action="store_true", help="show all that tritonserver logs")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end when standard input closes, as when its holder ends"
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0 seconds, or no number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def welcome(options: ServerOptions, failed: Sequence[Failure]) -> str:
    """What `make serve` prints when the models are loaded.

    Args:
        failed: models that are not served.
    """
    lines = ["", READY, ""]
    manifests = artefacts.read_manifests(options.repository)
    width = max([20, *(len(manifest.task) for manifest in manifests)])
    for manifest in manifests:
        default, *others = manifest.public_models
        models = [f"{manifest.public_models[default]} ({default})"]
        models += [manifest.public_models[variant] for variant in others]
        lines.append(f"  {manifest.task:<{width}} {', '.join(models)}")
        lines += [
            f"  {'UNVERIFIED':<{width}} {manifest.public_models[variant]}: {reason}"
            for variant, reason in manifest.unverified.items()
        ]
    if plain := artefacts.plain_models(options.repository):
        lines.append(f"  {'plain models':<{width}} {', '.join(plain)}")
    if missing := artefacts.unexported(options.repository):
        lines.append(f"  not exported: {', '.join(missing)} (make export MODEL=name)")
    lines += [f"  {'NOT SERVED':<{width}} {one.sentence(options.repository)}" for one in failed]
    exports = artefacts.read_failures(options.repository).items()
    lines += [f"  {'EXPORT FAILED':<{width}} {name}: {why}" for name, why in exports]
    host = options.own_host
    published = " (where the container's ports are published so)" if in_container() else ""
    lines += [
        "",
        f"  HTTP     http://{host}:{options.http_port}{published}",
        f"  gRPC     {host}:{options.grpc_port}",
        f"  metrics  http://{host}:{options.metrics_port}/metrics",
        *([f"  OpenAI   http://{host}:{options.gateway_port}/v1"] if options.gateway_port else []),
        "",
        "Try:",
    ]
    lines += [f"  {command}" for command in examples(options, manifests)]
    return "\n".join([*lines, ""])


def in_container() -> bool:
    """Whether this runs in one of our images, whose users type commands outside of it."""
    return CONTAINER in os.environ


def examples(options: ServerOptions, manifests: Sequence[Manifest]) -> list[str]:
    """Up to three commands that work with these models, as a user types them in the current folder."""
    names = {manifest.task: manifest.name for manifest in reversed(manifests)}
    host = options.own_host
    url = "" if (host, options.grpc_port) == ("127.0.0.1", 8001) else f" --url {host}:{options.grpc_port}"
    trident = _client_command()
    commands = []
    if generator := names.get("text-generation"):
        commands.append(f'{trident} generate{url} --model {generator} "The capital of France is"')
        body = '{"text_input": "Once upon a time", "max_tokens": 40}'
        commands.append(f"curl -s http://{host}:{options.http_port}/v2/models/{generator}/generate -d '{body}'")
    if embedder := names.get("feature-extraction"):
        commands.append(f'{trident} embed{url} --model {embedder} "A text to compare with others"')
    return commands


def _client_command() -> str:
    """The `trident` of this installation as its user types it: from the checkout, or from the PATH."""
    own = Path(sys.executable).with_name("trident")
    if in_container() or not own.exists():
        return "trident"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
