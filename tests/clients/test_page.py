"""The gateway's page in Chromium, driven by Playwright. `make clients` runs it where a `chromium` is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import gateways
from tests.clients.environments import environment
from tests.conftest import ROOT
from tests.gateways import Gateway
from trident_client import Client
from trident_serving.launcher.local import LocalServer

pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium: apt-get install chromium"),
]
HOSTILE = '<img src="x" onerror="document.title=1">'
TEXTS = ["a cat", "The dog lay under the tree.", "rain"]


def browse(*arguments: str) -> Any:
    """What the browser's program prints."""
    script = ROOT / "tests" / "clients" / "programs" / "gateway_page.py"
    command = [environment("playwright") / "python", script, *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_panel(gateway: Gateway, direct: Client) -> None:
    found = browse("try", gateway.url)
    assert found["choices"] == ["chain", "talk", "talk:other"]
    first: list[Any] = [{"role": "user", "content": HOSTILE}]
    one = direct.chat(first, model="talk", max_tokens=8).text
    then = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "And then?"}]
    two = direct.chat(then, model="talk", max_tokens=8).text
    assert found["log"] == [HOSTILE, one, "And then?", two]
    assert json.loads(found["structured"]) in ("rain", "snow")
    assert found["about"].endswith("JSON")
    assert (found["busy"], found["stopped"], found["focused"]) == ("true", "stopped", "tab-embed")
    vectors = direct.embed(TEXTS, model="embed").astype(np.float64)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [[float(cell) for cell in row[1:]] for row in found["cosines"]]
    np.testing.assert_allclose(cosines, units @ units.T, atol=6e-4)
    ranked = direct.rank("rain", TEXTS, model="rank")
    assert [(row[2], row[3]) for row in found["ranked"]] == [
        (TEXTS[each.index], str(each.index + 1)) for each in ranked
    ]
    translated = direct.translate(HOSTILE, model="translate", target_lang="French")
    assert found["translated"].removesuffix("Cut at the limit of tokens.") == translated.text
    text = "🌧 Ada met Charles in Zürich."
    entities = direct.entities(text, model="tag")
    assert [row[:2] for row in found["entities"]] == [[text[each.start : each.end], each.entity] for each in entities]
    assert found["marked"] == [text[each.start : each.end] + each.entity for each in entities]
    assert {row[0] for row in found["metrics"]} >= {"embed", "rank", "tag", "talk", "translate"}
    assert found["hosts"] == [gateway.url.removeprefix("http://")]
    assert (found["wrong"], found["images"], found["title"]) == ([], 0, "Trident")


def test_pictures(server: LocalServer, client: Client, tmp_path: Path) -> None:
    """The screenshots of the documents, of the models that a first start serves."""
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    with gateways.running(tmp_path / "log", server.grpc_url) as running:
        found = browse("pictures", running.url, str(folder))
    question: list[Any] = [{"role": "user", "content": "What is rain?"}]
    assert found["answer"] == client.chat(question, model="smollm2", max_tokens=120).text
    assert (folder / "page-chat.png").stat().st_size > 10_000
