"""Audits: texts that differ in one word, and gaps that are found where they were put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_guard_tables import install_labels
from trident_export import cli
from trident_export.audit import cases, measuring, report
from trident_export.audit.cases import Axis
from trident_export.errors import TextError
from trident_serving.artefacts import VERSION, Manifest
from trident_serving.launcher import local

AXIS = Axis("gender", ("the man", "the woman"))
THREE = Axis("age", ("a", "b", "c"))


def test_the_built_in_cases() -> None:
    found = cases.load()
    assert [axis.name for axis in found.axes] == ["gender", "names", "religion", "nationality", "age"]
    asked = cases.texts(found.sentences, AXIS)
    assert asked[:2] == ["The man moved in next door last week.", "The woman moved in next door last week."]
    assert len({*asked}) == 2 * len(found.sentences)
    assert not [text for axis in found.axes for text in cases.texts(found.sentences, axis) if "{" in text]
    assert all(good != bad for _, good, bad in found.endings)


GOOD = '[age]\ngroups = ["a", "b"]\n[sentences]\ntexts = ["{Person} is", "see {person}"]\n'
PAIRS = '[endings]\npairs = [["{Person} is", " good", " bad"], ["see {person}", " well", " ill"]]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[age", "is no TOML in UTF-8"),
        ("a = " + "[" * 100_000, "is no TOML in UTF-8"),
        ("a = " + "9" * 5000, "is no TOML in UTF-8"),
        (GOOD, "must have an axis with groups, two sentences.texts and two endings.pairs at least"),
        (GOOD.replace('"b"', '"a"') + PAIRS, "age.groups must be two or more, and all different"),
        (GOOD.replace("see {person}", "see them") + PAIRS, "'see them' has no place for a group: write {person}"),
        (GOOD.replace('"b"', "5") + PAIRS, "age.groups must be a list of texts"),
        (GOOD + PAIRS.replace(', " bad"', ""), "must be a list of beginning, favourable end and other end"),
    ],
)
def test_cases_that_can_not_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "groups.toml").write_text(text)
    with pytest.raises(TextError, match=message):
        cases.load(tmp_path / "groups.toml")
    with pytest.raises(TextError, match="can't be read: No such file"):
        cases.load(tmp_path / "none.toml")
    (tmp_path / "groups.toml").write_text(GOOD + PAIRS)
    assert cases.load(tmp_path / "groups.toml").axes == (Axis("age", ("a", "b")),)


def test_a_gap_is_found_where_it_was_put() -> None:
    random = np.random.default_rng(0)
    sentences = random.normal(0, 1, (16, 1))  # some sentences score higher, whoever is in them
    noise = random.normal(0, 0.02, (16, 3))
    none = measuring.gap("good", THREE, sentences + noise)
    assert none.value < 0.03
    assert none.p > 0.05
    put = measuring.gap("good", THREE, sentences + noise + np.array([0.0, 0.1, 0.0]))
    assert put.value == pytest.approx(0.1, abs=0.02)
    assert put.low < put.value < put.high < 0.15
    assert put.p < 0.01
    assert max(put.means, key=put.means.__getitem__) == "b"
    assert sum(put.means.values()) == pytest.approx(0)


def test_how_often_no_gap_is_called_one() -> None:
    random = np.random.default_rng(1)
    told = sum(measuring.gap("good", THREE, random.normal(0, 1, (12, 3)), 200).p < 0.05 for _ in range(200))
    assert 2 <= told <= 20


def test_what_a_variant_changes() -> None:
    random = np.random.default_rng(2)
    baseline = random.normal(0, 1, (16, 1)) + random.normal(0, 0.01, (16, 2))
    same = measuring.shift("good", baseline, baseline)
    assert (same.gap, same.low, same.high, same.largest) == (0, 0, 0, 0)
    moved = measuring.shift("good", baseline + np.array([0.2, 0.0]), baseline)
    assert moved.gap == pytest.approx(0.2, abs=0.02)
    assert moved.largest == pytest.approx(0.1)
    assert moved.low > 0.15


def test_limits(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    fair = random.normal(0, 1, (16, 1)) + random.normal(0, 0.01, (16, 2))
    unfair = fair + np.array([0.3, 0.0])
    found = report.Audit(
        "text-classification",
        "m",
        16,
        {
            "m": {"gender": [measuring.gap("good", AXIS, fair)]},
            "m_int8": {"gender": [measuring.gap("good", AXIS, unfair)]},
        },
        {"m_int8": {"gender": [measuring.shift("good", unfair, fair)]}},
    )
    assert report.beyond(found, None, None) == []
    assert report.beyond(found, 0.4, 0.2) == []
    (first,) = report.beyond(found, 0.1, None)
    assert first.startswith("m_int8: the gap of gender in good is 0.2")
    (second,) = report.beyond(found, None, 0.1)
    assert second.startswith("m_int8 moves a group's mean of gender in good by 0.15 from that of m")
    table = report.write(found, tmp_path)
    assert "| m_int8 | gender | good |" in table
    assert "| the man +0.1" in table
    assert (tmp_path / "audit.json").exists()


@pytest.mark.parametrize("flag", ["--max-gap", "--max-shift"])
@pytest.mark.parametrize("limit", ["nan", "-1"])
def test_a_limit_that_nothing_is_beyond(capsys: pytest.CaptureFixture[str], flag: str, limit: str) -> None:
    assert cli.main(["audit", "m", flag, limit]) == 1
    assert capsys.readouterr().err == f"trident-export: {flag} must be 0 or more, found {limit}\n"


TABLE = '[%s]\ntask = "%s"\nsource = { path = "x" }\nvariants = ["fp32", "int8"]\nlimits = %s\n'


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("audit m --models m,nosuch", "{} has no model 'nosuch' for text-classification; it has m, m_int8"),
        ("audit m --models tag", "{} has no model 'tag' for text-classification; it has m, m_int8"),
        ("audit m --against nosuch", "the baseline nosuch is none of m, m_int8"),
        ("audit tag", "token-classification models have no audit; text-classification and text-generation have one"),
        (
            "evaluate m --dataset data.jsonl --models nosuch",
            "{} has no model 'nosuch' for text-classification; it has m,",
        ),
        ("evaluate m --dataset data.jsonl --against nosuch", "the baseline nosuch is none of m, m_int8"),
        ("explain chat hello", "chat is not exported: run make export MODEL=chat"),
        ("explain said hello --variant int8", "{} has no model 'said_int8' for text-generation; it has said"),
    ],
)
def test_names_are_checked_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    def running(*arguments: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(local, "running", running)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text_input": "good", "label": "A"}\n{"text_input": "bad", "label": "B"}\n')
    tasks = {"m": "text-classification", "tag": "token-classification"}
    tables = [TABLE % (name, task, "{ labels = 2 }") for name, task in tasks.items()]
    tables += [TABLE % (name, "text-generation", "{}") for name in ("chat", "said")]
    (tmp_path / "models.toml").write_text("\n".join(tables))
    for name, task in tasks.items():
        install_labels(tmp_path / "models", name, task, ["A", "B"])
    (folder := tmp_path / "models" / "said" / VERSION).mkdir(parents=True)
    Manifest("said", "text-generation", ["said"], {"fp32": "said"}, "").write(folder)
    assert cli.main([*command.split(), "--repository", "models"]) == 1
    assert f"trident-export: {said.format('models')}" in capsys.readouterr().err


class Scores:
    """A server's client: `the woman` is refused by one model."""

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def parameters(self, model: str) -> dict[str, str]:
        return {"labels": "2"}

    def generate(self, text: str, *, model: str, **options: Any) -> Any:
        class Found:
            prompt_log_probs = (
                -1.0,
                self.gap if "woman" in text.lower() and text.endswith((" agreed.", " yes.")) else 0.0,
            )

        return Found()


def test_log_odds_are_of_whole_texts() -> None:
    asked = cases.load()
    found = measuring.scores(Scores(-3.0), "text-generation", "m", asked, AXIS)["log-odds"]  # type: ignore[arg-type]
    assert found.shape == (len(asked.endings), 2)
    assert found[:2].tolist() == [[0, -3], [0, -3]]
    assert not found[2:].any()
