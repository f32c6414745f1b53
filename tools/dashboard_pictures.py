"""Draws docs/images/dashboard-*.png: the panels of deploy/grafana/dashboards, from what a real Prometheus answers.

python -m tools.dashboard_pictures [--repository model_repository] [--minutes 2]  needs prometheus, smollm2, minilm

A server with its gateway gets a load that rises and falls, and a Prometheus with the stack's rules scrapes them. The
pictures are matplotlib's, not Grafana's: the same queries, numbers, titles and places, and a plainer look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from deploy import keys as stack_keys
from deploy import watching
from deploy.watching import Prometheus
from trident_gateway import keys
from trident_serving.launcher import local

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WINDOW = "10s"
STEP_SECONDS = 1.0
CALLERS = 12  # at the peak
BACKGROUND, PANEL, TEXT, GRID = "#111217", "#181b1f", "#ccccdc", "#2c3235"
GREEN, RED = "#73bf69", "#f2495c"
COLUMN_INCHES, ROW_INCHES, DPI = 0.62, 0.36, 72
LEGEND_LINES = 6


class Load:
    """Callers of the gateway; the n-th comes when the load has risen so far, and goes when it has fallen.

    Args:
        url: of the gateway.
        key: of it.
        seconds: of the whole load.
    """

    def __init__(self, url: str, key: str, seconds: float) -> None:
        self._url, self._key = url, key
        self._begin, self._seconds = time.monotonic(), seconds
        self._callers = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]
        for caller in self._callers:
            caller.start()

    def wait(self) -> None:
        """Until the load is over."""
        for caller in self._callers:
            caller.join()

    def _call(self, number: int) -> None:
        for turn, request in enumerate(self._requests(number)):
            done = (time.monotonic() - self._begin) / self._seconds
            if done >= 1:
                return
            if number > CALLERS * math.sin(math.pi * done):
                time.sleep(0.2)
                continue
            path, body = request
            if turn % 40 == 39:
                body = {**body, "model": "none"}
            self._ask(path, body)

    def _requests(self, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        turn = 0
        while True:
            turn += 1
            question = f"What is the capital of {('France', 'Spain', 'Italy', 'Greece')[turn % 4]}?"
            if number % 3 == 2:
                yield "/v1/embeddings", {"model": "minilm", "input": [question, f"a text of turn {turn}"] * 4}
                continue
            messages = [
                {"role": "system", "content": "You answer in one sentence."},
                {"role": "user", "content": question},
            ]
            yield "/v1/chat/completions", {"model": "smollm2", "messages": messages, "max_tokens": 40, "stream": True}

    def _ask(self, path: str, body: Mapping[str, Any]) -> None:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                response.read()
        except urllib.error.HTTPError as error:
            error.close()


def draw(prometheus: Prometheus, board: Mapping[str, Any], begin: float, end: float) -> Path:
    """The picture of one dashboard."""
    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(24 * COLUMN_INCHES, rows * ROW_INCHES + 0.5), facecolor=BACKGROUND)
    height = rows + 0.5 / ROW_INCHES
    figure.text(0.01, 1 - 0.25 / ROW_INCHES / height, board["title"], color=TEXT, fontsize=13, va="center")
    for panel in panels:
        place = panel["gridPos"]
        top = height - 0.5 / ROW_INCHES - place["y"]
        left, bottom = place["x"] / 24, (top - place["h"]) / height
        box = figure.add_axes((left + 0.003, bottom + 0.006, place["w"] / 24 - 0.006, place["h"] / height - 0.012))
        box.set(facecolor=PANEL, xticks=[], yticks=[])
        box.text(
            0.015, 1 - 0.45 / place["h"], panel["title"], color=TEXT, fontsize=9, va="center", transform=box.transAxes
        )
        for spine in box.spines.values():
            spine.set_color(GRID)
        _KINDS[panel["type"]](box, prometheus, board, panel, begin, end)
    file = IMAGES / f"dashboard-{board['uid'].removeprefix('trident-')}.png"
    figure.savefig(file, dpi=DPI, facecolor=BACKGROUND)
    pyplot.close(figure)
    return file


def _inside(box: Axes, panel: Mapping[str, Any], legend: int = 0) -> Axes:
    """Axes within a panel, above so many lines of legend."""
    inches = panel["gridPos"]["h"] * ROW_INCHES
    wide = panel["gridPos"]["w"] * COLUMN_INCHES
    low = (0.32 + 0.15 * legend) / inches
    axes = box.inset_axes((0.55 / wide, low, 1 - 0.7 / wide, 1 - low - 0.4 / inches))
    axes.set_facecolor(PANEL)
    axes.tick_params(colors=TEXT, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _series(
    prometheus: Prometheus, board: Mapping[str, Any], panel: Mapping[str, Any], begin: float, end: float
) -> list[tuple[str, list[tuple[float, float]]]]:
    """The name and the values of each series, of time in minutes."""
    found = []
    for query in watching.panel_queries(board, panel):
        for labels, values in prometheus.series(watching.filled(query.expression, WINDOW), begin, end, STEP_SECONDS):
            name = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), query.legend)  # noqa: B023
            found.append((name, [((at - begin) / 60, value) for at, value in values if math.isfinite(value)]))
    return found


def _timeseries(box: Axes, prometheus: Prometheus, board: Any, panel: Any, begin: float, end: float) -> None:
    found = [(name, values) for name, values in _series(prometheus, board, panel, begin, end) if values]
    # Those that say most, where they are many.
    shown = sorted(found, key=lambda entry: -max(value for _, value in entry[1]))[: 2 * LEGEND_LINES]
    axes = _inside(box, panel, -(-min(len(shown), LEGEND_LINES) // 2))
    for name, values in shown:
        axes.plot(*zip(*values, strict=True), linewidth=1.1, label=name)
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_xlim(0, (end - begin) / 60)
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # so that a line at 0 is seen
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_locator(pyplot.MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: written(value, unit))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    if shown:
        handles, names = axes.get_legend_handles_labels()
        style = {
            "fontsize": 6.5,
            "labelcolor": TEXT,
            "frameon": False,
            "ncols": 2,
            "handlelength": 1.2,
            "borderpad": 0.1,
        }
        box.legend(handles[:LEGEND_LINES], names[:LEGEND_LINES], loc="lower left", labelspacing=0.25, **style)
    else:
        axes.text(0.5, 0.5, "no data", color=TEXT, ha="center", transform=axes.transAxes)


def _stat(box: Axes, prometheus: Prometheus, board: Any, panel: Any, begin: float, end: float) -> None:
    found = _series(prometheus, board, panel, begin, end)
    value = found[0][1][-1][1] if found else 0.0
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    colors = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    color = {"green": GREEN, "red": RED}[colors[-1]] if colors else GREEN
    box.text(0.5, 0.4, f"{value:g}", color=color, fontsize=22, ha="center", va="center", transform=box.transAxes)


def _states(box: Axes, prometheus: Prometheus, board: Any, panel: Any, begin: float, end: float) -> None:
    found = _series(prometheus, board, panel, begin, end)
    wide = panel["gridPos"]["w"] * COLUMN_INCHES
    axes = _inside(box, panel)
    for row, (_, values) in enumerate(reversed(found)):
        for at, value in values:
            axes.barh(row, STEP_SECONDS / 60, left=at, height=0.7, color=GREEN if value >= 1 else RED)
    # The names stand on the bars, as they are too long for the margin.
    for row, (name, _) in enumerate(reversed(found)):
        axes.text(
            0.01,
            row,
            name[: int(wide * 14)],
            color=BACKGROUND,
            fontsize=7,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    axes.set_yticks([])
    axes.set_xlim(0, (end - begin) / 60)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")


def _table(box: Axes, prometheus: Prometheus, board: Any, panel: Any, begin: float, end: float) -> None:
    (query,) = watching.panel_queries(board, panel)
    lines = []
    for labels, _ in prometheus.values(query.expression):
        shown = {name: value for name, value in labels.items() if name not in ("__name__", "alertstate")}
        lines.append("   ".join(f"{name}: {value}" for name, value in shown.items()))
    text = "\n".join(lines) or "none"
    box.text(0.015, 0.7, text, color=TEXT, fontsize=8, va="top", linespacing=1.6, transform=box.transAxes)


_KINDS = {"timeseries": _timeseries, "stat": _stat, "state-timeline": _states, "table": _table}


def written(value: float, unit: str) -> str:
    """A number of an axis as Grafana writes it, roughly."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1000:.3g} ms"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / 2**30:.3g} GiB"
    return f"{value / 1000:.3g} k" if value >= 1000 else f"{value:.3g}"


def main() -> int:
    """Start everything, load it, and draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--minutes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(None):  # it shows a key
            stack_keys.main(folder / "keys")
        hashes = folder / "keys/gateway/keys.json"
        key = keys.add(hashes, "pictures", [keys.INFERENCE])
        (port,) = local.free_ports(1)
        server = local.start(
            options.repository, folder / "log", flags=["--gateway-port", str(port), "--gateway-keys", str(hashes)]
        )
        try:
            targets = {"trident": f"127.0.0.1:{server.metrics_port}", "gateway": f"127.0.0.1:{port}", "collector": ""}
            with watching.running(folder / "prometheus", targets, folder / "keys/prometheus/key") as prometheus:
                while len([value for _, value in prometheus.values("up") if value]) < len(targets):
                    time.sleep(0.5)
                begin = time.time()
                Load(f"http://127.0.0.1:{port}", key, options.minutes * 60).wait()
                time.sleep(2)
                for board in watching.dashboards():
                    print(draw(prometheus, board, begin, time.time()))
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
