"""What watches the stack, as data: the dashboards, the rules, all their queries, and a Prometheus to run them.

The tests and tools/dashboard_pictures.py use it. Prometheus itself is the program of that name on the PATH.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trident_serving.launcher.local import free_ports

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
PROMETHEUS = ROOT / "deploy" / "prometheus"
_WORDS = frozenset({"and", "or", "unless", "bool", "offset"})
_START_SECONDS = 30.0
_ASK_SECONDS = 10.0


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        dashboard: its title.
        panel: the panel's title.
        expression: PromQL, with Grafana's variables in it.
        legend: what a series is called, with names of labels in double braces.
    """

    dashboard: str
    panel: str
    expression: str
    legend: str


def dashboards() -> list[dict[str, Any]]:
    """All dashboards, as Grafana reads them, the overview first."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(DASHBOARDS.glob("*.json"))]
    return sorted(found, key=lambda board: board["uid"] != "trident-overview")


def queries(board: Mapping[str, Any]) -> list[Query]:
    """The queries of a dashboard's panels."""
    return [query for panel in board["panels"] for query in panel_queries(board, panel)]


def panel_queries(board: Mapping[str, Any], panel: Mapping[str, Any]) -> list[Query]:
    """The queries of one panel."""
    title = (str(board["title"]), str(panel["title"]))
    return [Query(*title, target["expr"], target.get("legendFormat", "")) for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def filled(expression: str, window: str, model: str = ".*") -> str:
    """A query as Grafana sends it.

    Args:
        expression: with variables.
        window: what `$__rate_interval` is.
        model: the regular expression that `$model` is.
    """
    return expression.replace("$__rate_interval", window).replace("$model", model)


def selectors(expression: str) -> list[str]:
    """The series that a query asks for, such as `up{job="trident"}`, without ranges."""
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expression)
    found = re.finditer(r"""(?<![\w:"$.])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|[\w:])""", _without_windows(text))
    return [match[1] + (match[2] or "") for match in found if match[1] not in _WORDS]


def names(expression: str) -> set[str]:
    """The names of the metrics and recordings that a query asks for."""
    return {selector.partition("{")[0] for selector in selectors(expression)}


def _without_windows(expression: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", expression)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs.

    Attributes:
        url: of its API.
        folder: its configuration, data and log.
    """

    url: str
    folder: Path

    def ask(self, path: str, **arguments: str | float) -> Any:
        """The `data` of an answer of its API.

        Raises:
            ValueError: it refuses the question, with its reason.
            OSError: it does not answer.
        """
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(address, timeout=_ASK_SECONDS) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{arguments}: {error.read().decode()}") from None

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What a query gives now: labels and value of each series; those that are not numbers are left out."""
        data = self.ask("query", query=expression)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        found = [(series["metric"], float(series["value"][1])) for series in data["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]

    def series(
        self, expression: str, begin: float, end: float, step: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """What a query gave from `begin` to `end`, every `step` seconds: labels, and pairs of time and value."""
        data = self.ask("query_range", query=expression, start=begin, end=end, step=step)
        return [
            (series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in data["result"]
        ]

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """The labels of the alerts that fire, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in self.ask("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found


def configured(folder: Path, targets: Mapping[str, str], key: Path, interval: str) -> Path:
    """Prometheus's configuration of the stack for servers elsewhere, with its rules beside it.

    Args:
        folder: where it is written.
        targets: host and port by job.
        key: the file with the key that the gateway's metrics need.
        interval: between two scrapes, and two evaluations of the rules.
    """
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(config["global"], interval)
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        if "authorization" in job:
            job["authorization"] = {"credentials_file": str(key)}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(PROMETHEUS / "rules", folder / "rules", dirs_exist_ok=True)
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@contextlib.contextmanager
def running(folder: Path, targets: Mapping[str, str], key: Path, interval: str = "1s") -> Iterator[Prometheus]:
    """A real Prometheus with the stack's rules, for the time of a `with` block.

    Args:
        folder: for what it writes.
        targets, key, interval: see `configured`. The target of the job `collector` may be "", for Prometheus itself.

    Raises:
        RuntimeError: it is not installed, or does not start; the message has its log.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise RuntimeError("prometheus is not installed (Debian: apt-get install prometheus)")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    config = configured(folder, {job: target or address for job, target in targets.items()}, key, interval)
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"prometheus does not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield Prometheus(f"http://{address}", folder)
    finally:
        process.terminate()
        process.wait(30)
