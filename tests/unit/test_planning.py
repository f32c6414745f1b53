"""How many replicas are enough: the model against known cases, and against replicas run request by request."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from trident_serving.errors import InvalidRequest
from trident_serving.planning import capacity, cli
from trident_serving.planning.capacity import load, plan
from trident_serving.planning.curve import Curve
from trident_serving.planning.simulation import simulate
from trident_serving.planning.traffic import KNOWN, Targets, Traffic

CURVE = Curve(
    "smollm2", "a processor", 32, ((1, 0.008), (4, 0.012), (16, 0.032), (32, 0.065)), 0.0009, 128, 2**31, 2**27, 20.0
)
CHAT = replace(KNOWN["chat"], prompt_tokens=300)


def test_a_step_lies_between_those_that_were_measured() -> None:
    assert [CURVE.step(number) for number in (0, 1, 4, 10, 32)] == pytest.approx([0.008, 0.008, 0.012, 0.022, 0.065])


@pytest.mark.parametrize(("offered", "places"), [(1, 2), (8, 10), (20, 30)])
def test_erlangs_formula(offered: int, places: int) -> None:
    """As its sum is written; with one of two places taken it is a third."""
    free = sum(Fraction(offered**taken, math.factorial(taken)) for taken in range(places))
    full = Fraction(offered**places, math.factorial(places)) * Fraction(places, places - offered)
    expected = full / (free + full)
    assert (offered, places) != (1, 2) or expected == Fraction(1, 3)
    assert capacity._no_slot(offered, places, 1, 1.0) == pytest.approx(float(expected), rel=1e-9)


def test_many_places_go_over_into_the_limit_without_a_jump() -> None:
    """Just below and just above the number from which the limit is taken."""
    below, above = (capacity._no_slot(places - 70, places, 1, 1.0) for places in (4999, 5001))
    assert 0.1 < below < 0.9
    assert below == pytest.approx(above, rel=0.03)


def test_bursts_find_fewer_slots() -> None:
    assert capacity._no_slot(20, 32, 1, 1.0) < capacity._no_slot(20, 32, 1, 3.0) / 3


@pytest.mark.parametrize("replicas", [8, 40])
def test_the_model_is_what_replicas_do(replicas: int) -> None:
    """At four fifths of the highest rate."""
    traffic = replace(CHAT, rate=0.8 * capacity.highest_rate(CURVE, CHAT) * replicas)
    expected = load(CURVE, traffic, Targets(), replicas)
    seen = simulate(CURVE, traffic, replicas, 1200 if replicas < 10 else 400)
    first = float(np.quantile(seen.first_token, 0.99))
    assert expected.first_token == pytest.approx(first, rel=0.15)
    assert float(seen.token.mean()) == pytest.approx(expected.token, rel=0.2)
    assert expected.busy == pytest.approx(0.8, abs=1e-6)


def test_what_a_plan_promises_is_kept_by_its_replicas_and_not_by_fewer() -> None:
    traffic, targets = replace(CHAT, rate=40.0), Targets(first_token=1.9)
    found = plan(CURVE, traffic, targets)
    kept = simulate(CURVE, traffic, found.replicas, 300)
    assert np.quantile(kept.first_token, targets.share) <= 1.05 * targets.first_token
    fewer = simulate(CURVE, traffic, int(0.7 * found.replicas), 300)
    assert np.quantile(fewer.first_token, targets.share) > 1.2 * targets.first_token
    assert load(CURVE, traffic, targets, found.replicas - 1).first_token > targets.first_token
    more = replace(traffic, rate=traffic.rate * (1 + found.spare) * 1.01)
    assert load(CURVE, more, targets, found.replicas).first_token > targets.first_token
    assert (found.memory_bytes, found.start_bytes) == (found.replicas * 2**31, found.replicas * 2**27)


def test_a_thousand_replicas() -> None:
    """Bursts of one service come to all of them, so none of them sees one."""
    traffic = Traffic(1500.0, 200, 60, burstiness=3.0)
    expected = load(CURVE, traffic, Targets(), 1000)
    seen = simulate(CURVE, traffic, 1000, 12)
    assert float(np.quantile(seen.first_token, 0.99)) == pytest.approx(expected.first_token, rel=0.25)


def test_a_replica_that_is_alone_is_answered_at_once() -> None:
    one = Traffic(0.001, 128, 10, 0.0, 0.0)
    assert load(CURVE, one, Targets(), 1).first_token == pytest.approx(128 * 0.0009, rel=0.01)
    seen = simulate(CURVE, one, 1, 50_000)
    assert seen.first_token.max() == pytest.approx(128 * 0.0009, rel=0.01)
    assert seen.token.mean() == pytest.approx(0.008, rel=0.01)


def test_too_much_for_one() -> None:
    full = load(CURVE, replace(CHAT, rate=50.0), Targets(), 1)
    assert (full.first_token, full.busy) == (math.inf, 1.0)


def test_targets_that_no_number_of_replicas_meets() -> None:
    with pytest.raises(InvalidRequest, match=r"the first token takes .* s even where nothing else runs, 0.1 s is"):
        plan(CURVE, CHAT, Targets(first_token=0.1))
    with pytest.raises(InvalidRequest, match=r"a token takes 0.008 s even where nothing else runs, 0.005 s is"):
        plan(CURVE, CHAT, Targets(first_token=9, token=0.005))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": math.inf}, "rate must be 1e\\+09 at most, found inf"),
        ({"prompt_tokens": 1e308}, "prompt_tokens must be 1e\\+09 at most"),
        ({"prompt_variation": 1e200}, "prompt_variation must be 1000 at most"),
        ({"answer_variation": math.inf}, "answer_variation must be 1000 at most"),
        ({"burstiness": 1e200}, "burstiness must be 1000 at most"),
        ({"answer_tokens": math.nan}, "answer_tokens must be more than 0, found nan"),
    ],
)
def test_traffic_that_can_not_be(change: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        replace(CHAT, **change)


def test_traffic_at_its_limits_is_answered() -> None:
    most = replace(CHAT, prompt_variation=1000.0, answer_variation=1000.0, burstiness=1000.0)
    assert plan(CURVE, replace(most, rate=0.001), Targets(first_token=900.0)).replicas == 1
    with pytest.raises(
        InvalidRequest, match="1e\\+09 requests a second are too many for 100000 replicas: one that is 80%"
    ):
        plan(CURVE, replace(CHAT, rate=1e9), Targets())


def test_noise_in_a_curve_gives_no_time_below_the_last_one() -> None:
    noisy = replace(CURVE, steps=((1, 0.01), (4, 0.002)))
    assert [noisy.step(number) for number in (2.5, 4, 32)] == pytest.approx([0.006, 0.002, 0.002])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "curve.json"
    CURVE.write(file)
    assert Curve.read(file) == CURVE
    asked = ["--curve", str(file), "--rate", "40", "--prompt-tokens", "300", "--first-token", "2.5"]
    assert cli.main([*asked, "--simulate", "60"]) == 0
    text = capsys.readouterr().out
    found = plan(CURVE, replace(CHAT, rate=40.0), Targets(first_token=2.5))
    assert f"replicas   {found.replicas}, each" in text
    assert "simulated  99% of " in text
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["replicas"], told["traffic"]["answer_tokens"]) == (found.replicas, 211)
    assert cli.main([*asked, "--token", "0.001"]) == 2
    assert "no number of replicas meets the targets" in capsys.readouterr().err
    assert cli.main([*asked, "--rate", "-1"]) == 2
    assert "rate must be more than 0, found -1" in capsys.readouterr().err
    for seconds in ("-5", "0", "nan", "inf", "1e15"):
        assert cli.main([*asked, "--simulate", seconds]) == 2
        assert "--simulate must be between 0 and 604800 s, found" in capsys.readouterr().err
    endless = json.dumps(json.loads(file.read_text()) | {"steps": [[1, 0.1], [math.inf, 0.2]]})
    for content in ('{"model": "x"}', "[" * 100_000, endless):
        file.write_text(content)
        assert cli.main(asked) == 2
        assert "is no curve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ((2, 0.1),)}, "steps must begin with 1 answer and rise"),
        ({"steps": ((1, 0.1), (1, 0.2))}, "steps must begin with 1 answer and rise"),
        ({"prefill_seconds": 0.0}, "more than 0"),
        ({"prefill_seconds": math.nan}, "more than 0, and numbers"),
        ({"steps": ((1, math.inf),)}, "more than 0, and numbers"),
        ({"start_seconds": -1.0}, "more than 0"),
        ({"slots": 0}, "slots must be a whole number of 1 or more, found 0"),
        ({"slots": 2.5}, "slots must be a whole number of 1 or more, found 2.5"),
        ({"prefill_chunk": math.nan}, "prefill_chunk must be a whole number of 1 or more, found nan"),
        ({"memory_bytes": "x"}, "memory_bytes must be a whole number of 1 or more, found 'x'"),
    ],
)
def test_a_curve_that_can_not_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        replace(CURVE, **change)  # type: ignore[arg-type]
