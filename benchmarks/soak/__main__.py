"""`make soak`: starts its own server, sends it mixed traffic, ends it, writes reports/soak.{md,json,svg}.

The exit status is 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from benchmarks.soak import faults, report, session
from benchmarks.soak.answers import RELOADED
from benchmarks.soak.calls import Address, CallError
from benchmarks.soak.session import Outcome
from trident_serving.errors import StartError
from trident_serving.launcher import http, local
from trident_serving.launcher.local import LocalServer

IDLE_AT_THE_END = 10


def main() -> int:
    """Run the soak; returns the exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of traffic (default %(default)g)")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--reload", nargs="*", choices=sorted(RELOADED), default=sorted(RELOADED), metavar="MODEL")
    options = parser.parse_args()
    options.reports.mkdir(exist_ok=True)
    try:
        (port,) = local.free_ports(1)
        flags = ("--gateway-port", str(port))
        server = local.start(options.repository, options.reports / "soak-server.log", flags=flags)
    except StartError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    try:
        wait_for_gateway(port)
        outcome = session.run(server, 60 * options.minutes, options.reload, _say, gateway_port=port)
        stop(server, outcome)
    except CallError as error:
        print(f"soak: the server does not answer before there is any traffic: {error}", file=sys.stderr)
        return 1
    finally:
        if server.launcher.poll() is None:
            server.stop()
    report.write(outcome, options.reports)
    found = report.findings(outcome)
    for line in found:
        _say(line)
    _say(f"{len(outcome.entries)} calls, {len(found)} findings: {options.reports / 'soak.md'}")
    return 1 if found else 0


def wait_for_gateway(port: int) -> None:
    """Wait until it answers; the launcher starts it once the server is ready.

    Raises:
        CallError: it does not answer within 30 s.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), http.open(f"http://127.0.0.1:{port}/ready", timeout=2):
            return
        time.sleep(0.1)
    raise CallError("timeout", "the gateway is not ready")


def stop(server: LocalServer, outcome: Outcome) -> None:
    """End the server, while idle connections are open, and note how long it takes."""
    address = Address(server.http_port, server.grpc_port, server.metrics_port)
    idle = faults.silent_connections(address, IDLE_AT_THE_END) if server.launcher.poll() is None else []
    since = time.monotonic()
    server.stop()
    outcome.stop_seconds = time.monotonic() - since
    outcome.stop_status = server.launcher.returncode
    for connection in idle:
        connection.close()


def _say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
