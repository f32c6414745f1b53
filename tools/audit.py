"""Known vulnerabilities of the pinned packages, and secrets in tracked files: `make audit`, which needs the network.

    python tools/audit.py             0: nothing is found, 1: something is, 3: something could not be looked at
    python tools/audit.py --update    what looks like a secret now is none: tools/not_secrets.json keeps that

pip-audit asks for advisories, detect-secrets looks at the files; uv runs both in environments of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIP_AUDIT, DETECT_SECRETS = "pip-audit==2.10.1", "detect-secrets==1.5.0"
KNOWN = ROOT / "tools/not_secrets.json"
FILES = ("deploy/requirements.txt", "deploy/requirements-server.txt", "constraints.txt")
CLEAN, FOUND, UNKNOWN = 0, 1, 3


def main(arguments: list[str]) -> int:
    """Look at both; returns the worst exit status."""
    secrets = look_like_secrets()
    if "--update" in arguments:
        KNOWN.write_text(json.dumps(secrets, indent=2) + "\n", encoding="utf-8")
        return CLEAN
    status, lines = new_secrets(secrets, json.loads(KNOWN.read_text(encoding="utf-8")))
    statuses = [status]
    for file in FILES:
        report, said = _pip_audit(file)
        status, more = vulnerabilities(file, report, said)
        statuses.append(status)
        lines += more
    for line in lines:
        print(line)
    return max(statuses, key=[CLEAN, UNKNOWN, FOUND].index)


def look_like_secrets() -> dict[str, list[str]]:
    """The digests of what looks like a secret, by tracked file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split("\0") if name and ROOT / name != KNOWN]
    done = subprocess.run(
        [*_tool(DETECT_SECRETS), "detect-secrets", "scan", *files], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    results = json.loads(done.stdout)["results"]
    return {file: sorted({each["hashed_secret"] for each in found}) for file, found in sorted(results.items())}


def new_secrets(found: Mapping[str, list[str]], known: Mapping[str, list[str]]) -> tuple[int, list[str]]:
    """What looks like a secret and was not looked at before: a status and its lines."""
    new = {file: len({*digests} - {*known.get(file, ())}) for file, digests in found.items()}
    lines = [
        f"{file}: {count} texts look like secrets: take them out, or run python tools/audit.py --update"
        for file, count in new.items()
        if count
    ]
    return (FOUND if lines else CLEAN), lines or ["no tracked file has a new secret"]


def _pip_audit(file: str) -> tuple[dict[str, Any] | None, str]:
    """pip-audit's report, None if it has none; and what it said."""
    command = [*_tool(PIP_AUDIT), "pip-audit", "--requirement", file, "--no-deps", "--disable-pip"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout), done.stderr
    except ValueError:
        return None, done.stderr


def vulnerabilities(file: str, report: Mapping[str, Any] | None, said: str) -> tuple[int, list[str]]:
    """What a report says: a status and its lines.

    pip-audit calls a file clean also where it could ask nobody about any of its packages.
    """
    if report is None:
        reason = (said.strip().splitlines() or ["pip-audit said nothing"])[-1]
        return UNKNOWN, [f"{file}: not audited: {reason}"]
    packages = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    lines = [
        f"{file}: {package['name']} {package['version']} has {each['id']}, "
        f"mended in {', '.join(each['fix_versions']) or 'no version yet'}"
        for package in packages
        for each in package.get("vulns", ())
    ]
    if lines:
        return FOUND, lines
    if len(skipped) == len(packages):
        return UNKNOWN, [f"{file}: not audited, the advisories can't be reached: the index knows none of its packages"]
    if skipped:
        return UNKNOWN, [f"{file}: no known vulnerability, but not audited: {', '.join(skipped)}"]
    return CLEAN, [f"{file}: no known vulnerability in {len(packages)} packages"]


def _tool(package: str) -> list[str]:
    return [sys.executable, "-m", "uv", "tool", "run", "--from", package]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
