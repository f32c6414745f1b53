"""Dashboards and rules are well formed, and ask only for metrics that the server and the gateway have.

tests/integration/test_gateway_watched.py runs every query.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import keys, watching
from deploy.watching import DASHBOARDS, PROMETHEUS, names, selectors
from tests.conftest import ROOT
from trident_gateway.keys import KeyRing
from trident_gateway.metrics import Metrics
from trident_serving.triton.metrics import COUNTERS, GAUGES, HISTOGRAMS, PREFIX

OF_PROMETHEUS = {"up", "ALERTS"}


def documented(page: str) -> dict[str, str]:
    """Kinds by name, from the tables of a reference page."""
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+) \|", text, re.MULTILINE)
    return {name: kind for cell, kind in rows for name in re.findall(r"`(\w+)`", cell)}


def exported() -> set[str]:
    """The names of all series of the documented metrics."""
    found = set()
    for name, kind in {**documented("metrics.md"), **documented("gateway.md")}.items():
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + end for end in ends}
    return found


def recorded() -> set[str]:
    return {rule["record"] for rule in watching.rules() if "record" in rule}


def test_the_reference_has_every_metric_of_the_server_and_no_other() -> None:
    kinds = {"histogram": HISTOGRAMS, "counter": COUNTERS, "gauge": GAUGES}
    ours = {PREFIX + entry[0]: kind for kind, entries in kinds.items() for entry in entries.values()}
    assert {name: kind for name, kind in documented("metrics.md").items() if name.startswith(PREFIX)} == ours


def test_the_reference_has_every_metric_of_the_gateway_and_no_other() -> None:
    families = {family.name: family.type for family in Metrics().registry.collect()}
    ours = {name + "_total" * (kind == "counter"): kind for name, kind in families.items()}
    table = documented("gateway.md")
    assert {name: kind for name, kind in table.items() if name.startswith("trident_gateway_")} == ours


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('up{job="trident"} == 0', ['up{job="trident"}']),
        (
            "histogram_quantile(0.99, sum by (le, model) (rate(a_bucket[$__rate_interval])))",
            ["a_bucket"],
        ),
        ('sum by (model) (a:b_total:rate5m{x=~"5.."} > 0) or 0 * b', ['a:b_total:rate5m{x=~"5.."}', "b"]),
        ("a == 0 and on (server) b == 1 unless c offset 5m", ["a", "b", "c"]),
        ("sum(rate(a[5m])) / 1e6", ["a"]),
    ],
)
def test_what_a_query_asks_for(expression: str, found: list[str]) -> None:
    assert selectors(expression) == found


def test_dashboards_ask_for_what_there_is() -> None:
    known = exported() | recorded() | OF_PROMETHEUS
    for board in watching.dashboards():
        for query in watching.queries(board):
            assert names(query.expression), query
            assert names(query.expression) <= known, query


def test_rules_ask_for_what_there_is() -> None:
    known = exported() | recorded() | OF_PROMETHEUS
    for rule in watching.rules():
        assert names(rule["expr"]), rule
        assert names(rule["expr"]) <= known, rule


def test_every_dashboard_is_one_that_grafana_takes() -> None:
    boards = watching.dashboards()
    assert [board["title"].removeprefix("Trident / ") for board in boards] == [
        "Overview",
        "Encoders",
        "Gateway",
        "Generation",
    ]
    assert len({board["uid"] for board in boards}) == len(boards)
    for board in boards:
        assert (DASHBOARDS / f"{board['uid'].removeprefix('trident-')}.json").is_file()
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        sources = [panel["datasource"] for panel in panels]
        sources += [target["datasource"] for panel in panels for target in panel["targets"]]
        assert {json.dumps(source) for source in sources} == {'{"type": "prometheus", "uid": "${datasource}"}'}
        for panel in panels:
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
        assert used == set(variables)
        assert not overlaps([panel["gridPos"] for panel in panels])


def overlaps(places: list[dict[str, int]]) -> bool:
    """Whether two panels share a cell of the grid, which is 24 wide, or one leaves it."""
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    return len(set(cells)) < len(cells) or any(x >= 24 for x, _ in cells)


def test_every_recording_is_used() -> None:
    asked = {
        name for board in watching.dashboards() for query in watching.queries(board) for name in names(query.expression)
    }
    asked |= {name for rule in watching.rules() if "alert" in rule for name in names(rule["expr"])}
    assert recorded() <= asked


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    page = (ROOT / "docs/how-to/watch-a-server.md").read_text(encoding="utf-8")
    tests = [
        entry for file in (PROMETHEUS / "tests").glob("*.yml") for entry in yaml.safe_load(file.read_text())["tests"]
    ]
    checks = [check for entry in tests for check in entry.get("alert_rule_test", [])]
    fired = {check["alertname"] for check in checks if check.get("exp_alerts")}
    alerts = [rule for rule in watching.rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == fired
    for rule in alerts:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"| `{rule['alert']}` |" in page


def test_a_grafana_finds_its_files() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards/trident.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = {volume["target"]: volume["source"] for volume in compose["grafana"]["volumes"]}
    assert (ROOT / mounted[provider["options"]["path"]]).resolve() == DASHBOARDS
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / mounted[str(home.parent)] / home.name).is_file()


def test_prometheus_asks_whom_the_stack_has() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    targets = {name: job["static_configs"][0]["targets"] for name, job in jobs.items()}
    assert targets == {"trident": ["server:8002"], "gateway": ["server:8080"], "collector": ["collector:8888"]}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "server" in compose["trident"]["networks"]["default"]["aliases"]
    mounted = {volume["target"]: volume["source"] for volume in compose["prometheus"]["volumes"]}
    key = Path(jobs["gateway"]["authorization"]["credentials_file"])
    assert (mounted[str(key.parent)], key.name) == ("./deploy/keys/prometheus", "key")
    asked = {rule for file in config["rule_files"] for rule in PROMETHEUS.glob(file)}
    assert asked == set((PROMETHEUS / "rules").iterdir())


def test_the_keys_of_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(tmp_path) == 0
    printed = capsys.readouterr().out
    first = re.search(r"trident-\S{43}", printed)
    assert first is not None
    hashes, scraping = tmp_path / "gateway/keys.json", tmp_path / "prometheus/key"

    def scopes(key: str) -> Any:
        found = KeyRing(hashes).find(key)
        return found and found.scopes

    assert scopes(first[0]) == ("inference",)
    assert scopes(scraping.read_text()) == ("admin",)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (hashes, scraping)} == {0o644}
    before = hashes.read_text(), scraping.read_text()
    assert keys.main(tmp_path) == 0  # the second `make up`
    assert (hashes.read_text(), scraping.read_text()) == before
    assert capsys.readouterr().out == ""
    scraping.unlink()
    assert keys.main(tmp_path) == 0
    assert scraping.read_text() != before[1]
    assert scopes(scraping.read_text()) == ("admin",)
    assert scopes(before[1]) is None
    assert scopes(first[0]) == ("inference",)
    hashes.unlink()
    assert keys.main(tmp_path) == 0
    assert scopes(scraping.read_text()) == ("admin",)
    assert "first API key" in capsys.readouterr().out
