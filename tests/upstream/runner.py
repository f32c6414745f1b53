"""Runs suites: copies a folder of a checkout, changes ports, starts the server, runs the tests, reads what came out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import gateways
from tests.upstream.suites import CHAT_MODEL, Suite
from trident_serving.launcher import local
from trident_serving.launcher.admin_key import HEADER
from trident_serving.launcher.local import LocalServer

PASSED, FAILED, LEFT = "passed", "failed", "not applicable"
GRPC_PREFIX = "triton-grpc-protocol-"
REASON_LINES = 4
REPORT = "report.xml"
# Beside the copied tests, which need a class that counts results for a shell script, and knows no pytest.
CONFTEST = """\
import os
import sys
import unittest

sys.path.append("../common")
import test_util

test_util.TestResultCollector = unittest.TestCase
"""
# And their clients send the admin key, where the tests manage the server.
ADMIN_CONFTEST = f'''\
{CONFTEST}
from tritonclient import _client

plain = _client.InferenceServerClientBase._call_plugin


def with_key(self, request):
    request.headers.update({{prefix + "{HEADER}": os.environ["ADMIN_KEY"] for prefix in ("", "{GRPC_PREFIX}")}})
    plain(self, request)


_client.InferenceServerClientBase._call_plugin = with_key
'''
# Beside the tests of Triton's OpenAI frontend: what they ask is the gateway, and none of that frontend is imported.
OPENAI_CONFTEST = """\
import os
import sys
import types

import httpx2
import openai
import pytest

for name in ("tritonserver", "tests", "tests.utils", "fastapi", "fastapi.testclient"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda name: None

PROMPT = "What is machine learning?"
GIVEN = {"backend": "vllm", "model": os.environ["MODEL"], "prompt": PROMPT, "input": PROMPT}
GIVEN["messages"] = [{"role": "user", "content": PROMPT}]
for name, value in GIVEN.items():
    globals()[name] = pytest.fixture(scope="session", name=name)(lambda value=value: value)


@pytest.fixture(scope="class")
def fastapi_client_class_scope():
    with httpx2.Client(base_url=os.environ["GATEWAY_URL"], timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def server():
    url = os.environ["GATEWAY_URL"] + "/v1"
    clients = {"get_client": openai.OpenAI, "get_async_client": openai.AsyncOpenAI}
    return types.SimpleNamespace(
        **{name: (lambda kind=kind: kind(base_url=url, api_key="none")) for name, kind in clients.items()}
    )
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one test.

    Attributes:
        suite: its file.
        test: Class::name.
        result: `passed`, `failed` or `not applicable`.
        why: of a failure: its message; of a test that does not apply: the reason.
        known: whose fault a failure is, where that is known.
    """

    suite: str
    test: str
    result: str
    why: str = ""
    known: str = ""


def version(checkout: Path) -> str:
    """Which one a checkout is: tag or commit, and its date."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("describe", "--tags", "--exact-match") or git("rev-parse", "--short", "HEAD")
    return f"{name} of {git('log', '-1', '--date=short', '--format=%cd')}" if name else "an unknown version"


def checkouts(given: Iterable[str]) -> list[Path]:
    """Folders that texts name: each is one, whose name may have blanks, or several parted by blanks."""
    folders: list[str] = []
    for text in given:
        folders += [text] if text and Path(text).is_dir() else text.split()
    return [Path(folder).expanduser() for folder in folders]


def source(suite: Suite, checkouts: Iterable[Path]) -> Path | None:
    """The first checkout that has a suite's file."""
    return next((each for each in checkouts if (each / suite.folder / suite.file).exists()), None)


def run(suite: Suite, checkout: Path, folder: Path, python: Path) -> list[Outcome]:
    """Run one suite.

    Args:
        checkout: of triton-inference-server/server, which has its file.
        folder: an empty one, for copies, models and logs.
        python: the interpreter with the tests' packages.

    Raises:
        FileNotFoundError: a model that it needs was not exported.
    """
    repository = folder / "models"
    repository.mkdir(parents=True)
    there = checkout / suite.folder
    suite.prepare(there, repository)
    here = folder / "tests"
    here.mkdir()
    with contextlib.ExitStack() as running:
        server = local.start(repository, folder / "server.log", environment=suite.environment)
        running.callback(server.stop)
        environment = {**os.environ, **suite.test_environment}
        conftest = ADMIN_CONFTEST if suite.administrator else CONFTEST
        if suite.openai:
            conftest = OPENAI_CONFTEST
            gateway = running.enter_context(gateways.running(folder / "gateway.log", server.grpc_url))
            environment |= {"GATEWAY_URL": gateway.url, "MODEL": CHAT_MODEL}
        else:
            shutil.copytree(checkout / "qa/common", folder / "common", symlinks=True)
        if suite.administrator:
            environment["ADMIN_KEY"] = server.admin_headers[HEADER]
        (here / "conftest.py").write_text(conftest, encoding="utf-8")
        text = (there / suite.file).read_text(encoding="utf-8")
        (here / suite.file).write_text(edited(text, server, suite.edits), encoding="utf-8")
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(here)]
        command += ["-c", os.devnull, "--junitxml", str(folder / REPORT), suite.file]
        if suite.openai:  # a class's tests share a client of asyncio, and so need a loop
            command += [f"--override-ini=asyncio_default_{each}_loop_scope=class" for each in ("test", "fixture")]
        if suite.left:
            command += ["-k", " and ".join(f"not {name}" for name in suite.left)]
        log = running.enter_context((folder / "tests.log").open("w"))
        try:
            subprocess.run(
                command, cwd=here, env=environment, stdout=log, stderr=log, check=False, timeout=suite.seconds
            )
        except subprocess.TimeoutExpired:
            return [Outcome(suite.name, "all", FAILED, f"they took more than {suite.seconds:g} s")]
    return [
        *outcomes(suite, folder / REPORT),
        *(Outcome(suite.name, name, LEFT, why) for name, why in suite.left.items()),
    ]


def edited(text: str, server: LocalServer, edits: Mapping[str, str]) -> str:
    """The text of a test for a server's ports, which it has in its URLs."""
    for port, own in ((8000, server.http_port), (8001, server.grpc_port), (8002, server.metrics_port)):
        text = re.sub(rf"localhost:{port}\b", f"127.0.0.1:{own}", text)
        text = text.replace(f'"127.0.0.1", {port}', f'"127.0.0.1", {own}')
    for pattern, other in edits.items():
        text, count = re.subn(pattern, other, text)
        assert count, pattern
    return text


def outcomes(suite: Suite, report: Path) -> Iterable[Outcome]:
    """What pytest's report says."""
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"]
        known = suite.faults.get(name) or suite.faults.get(name.partition("[")[0], "")
        wrong = [each for each in case if each.tag in ("failure", "error")]
        skipped = [each for each in case if each.tag == "skipped"]
        test = "::".join((*case.attrib["classname"].split(".")[1:], name))
        if wrong:
            lines = (wrong[0].attrib.get("message") or wrong[0].text or "").strip().splitlines()
            yield Outcome(suite.name, test, FAILED, " ".join(lines[:REASON_LINES]), known)
        elif skipped:
            yield Outcome(suite.name, test, LEFT, f"skips itself: {skipped[0].attrib.get('message', '')}")
        else:
            yield Outcome(suite.name, test, PASSED, known=known)
