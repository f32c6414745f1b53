"""`trident-plan`: how many replicas a model needs for traffic."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from trident_serving.errors import InvalidRequest
from trident_serving.planning.capacity import Plan, plan
from trident_serving.planning.curve import Curve
from trident_serving.planning.simulation import simulate
from trident_serving.planning.traffic import KNOWN, Targets, Traffic

_GIBIBYTE = 2**30
_MOST_SECONDS = 7 * 86_400  # of a simulation


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan; returns the exit status, 2 where no number of replicas is enough or the input makes no sense."""
    options = _parser().parse_args(arguments)
    try:
        if options.simulate is not None and not 0 < options.simulate <= _MOST_SECONDS:
            raise InvalidRequest(f"--simulate must be between 0 and {_MOST_SECONDS} s, found {options.simulate:g}")
        curve = Curve.read(options.curve)
        traffic = _traffic(options)
        targets = Targets(options.first_token, options.token, options.share, options.busy)
        found = plan(curve, traffic, targets)
    except InvalidRequest as error:
        print(f"trident-plan: {error}", file=sys.stderr)
        return 2
    seen = None
    if options.simulate is not None:
        simulated = simulate(curve, traffic, found.replicas, options.simulate)
        if not len(simulated.first_token):
            print("trident-plan: no request came in so short a time: give --simulate more seconds", file=sys.stderr)
            return 2
        seen = {
            "requests": len(simulated.first_token),
            "first_token": float(np.quantile(simulated.first_token, targets.share)),
        }
    if options.json:
        print(json.dumps({**asdict(found), "traffic": asdict(traffic), "simulated": seen}, indent=2))
    else:
        print(_text(curve, traffic, targets, found))
        if seen is not None:
            print(
                f"simulated  {targets.share:.0%} of {seen['requests']} requests had their first token within "
                f"{seen['first_token']:.2f} s"
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trident-plan", description=__doc__)
    parser.add_argument("--curve", type=Path, required=True, help="what `python -m benchmarks.curve` has written")
    parser.add_argument("--rate", type=float, required=True, help="requests a second at the busiest time")
    parser.add_argument(
        "--traffic", choices=sorted(KNOWN), default="chat", help="lengths and bursts as in a trace (default: chat)"
    )
    for name, meaning in (
        ("prompt-tokens", "of a request, on average"),
        ("answer-tokens", "of an answer, on average"),
        ("prompt-variation", "standard deviation of the prompts' lengths over their mean"),
        ("answer-variation", "of the answers'"),
        ("burstiness", "standard deviation of the gaps between requests over their mean; 1: they come by chance"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{meaning} (default: the trace's)")
    aims = Targets()
    parser.add_argument("--first-token", type=float, default=aims.first_token, help="seconds (default: %(default)s)")
    parser.add_argument("--token", type=float, default=aims.token, help="seconds between two (default: %(default)s)")
    parser.add_argument("--share", type=float, default=aims.share, help="of the requests (default: %(default)s)")
    parser.add_argument(
        "--busy", type=float, default=aims.busy, help="what a replica may have to do at most (default: %(default)s)"
    )
    parser.add_argument("--simulate", type=float, metavar="SECONDS", help="run the replicas request by request, too")
    parser.add_argument("--json", action="store_true", help="every figure, for programs")
    return parser


def _traffic(options: argparse.Namespace) -> Traffic:
    names = ("prompt_tokens", "answer_tokens", "prompt_variation", "answer_variation", "burstiness")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(KNOWN[options.traffic], rate=options.rate, **given)


def _text(curve: Curve, traffic: Traffic, targets: Targets, found: Plan) -> str:
    load = found.load
    return "\n".join(
        [
            f"model      {curve.model}, measured on {curve.processor}",
            f"traffic    {traffic.rate:g} requests a second of {traffic.prompt_tokens:g} and {traffic.answer_tokens:g} "
            "tokens",
            f"replicas   {found.replicas}, each {load.busy:.0%} busy with {load.running:.1f} answers of "
            f"{curve.slots} at once",
            f"waits      {targets.share:.0%} have their first token within {load.first_token:.2f} s, a token takes "
            f"{load.token * 1e3:.0f} ms",
            f"spare      {found.spare:.0%} more requests before a target is missed",
            f"memory     {found.memory_bytes / _GIBIBYTE:.1f} GiB in all",
            f"start      {curve.start_seconds:.0f} s and {found.start_bytes / _GIBIBYTE:.1f} GiB of weights to read in "
            "all",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
