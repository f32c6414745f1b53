"""The page at `/`: what is served and what browsers are told of it; and the endpoints that are its own.

tests/clients/test_page.py uses it in a browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests import gateways
from tests.gateways import Gateway
from trident_client import Client
from trident_gateway import keys
from trident_serving.launcher.local import LocalServer

FOLDER = Path(str(resources.files("trident_gateway").joinpath("page")))
FILES = sorted(path.name for path in FOLDER.iterdir())
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
TEXTS = ["Ada met Charles 🌧 in Zürich.", "rain"]


@pytest.fixture(scope="module")
def locked(gateway_server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with keys."""
    folder = tmp_path_factory.mktemp("locked")
    keys.add(folder / "keys.json", "web", ["inference"])
    flags = ("--keys", str(folder / "keys.json"))
    with gateways.running(folder / "log", gateway_server.grpc_url, flags=flags) as running:
        yield running


def policy(headers: dict[str, str]) -> dict[str, str]:
    """The directives of a Content-Security-Policy."""
    parts = (directive.partition(" ") for directive in headers["content-security-policy"].split("; "))
    return {name: value for name, _, value in parts}


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files(locked: Gateway, path: str) -> None:
    """Each is served as it is, with its type and without a key."""
    name = path.removeprefix("/page/").strip("/") or "index.html"
    status, headers, content = locked.ask(path)
    assert (status, content) == (200, (FOLDER / name).read_text(encoding="utf-8"))
    assert headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
    assert headers["x-content-type-options"] == "nosniff"
    told = policy(headers)
    assert told["default-src"] == told["frame-ancestors"] == told["base-uri"] == told["form-action"] == "'none'"
    assert {told[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert (told["require-trusted-types-for"], told["trusted-types"]) == ("'script'", "'none'")


def test_what_the_page_asks_needs_a_key(locked: Gateway) -> None:
    assert locked.ask("/v1/models")[0] == 401
    assert locked.ask("/v1/translate", {"model": "translate", "input": "hi"})[0] == 401
    assert locked.ask("/page/secret.js")[0] == 404
    for name in ("..", "../web.py", "%2e%2e/web.py", "..%2fweb.py", "%2e%2e%2fweb.py"):
        assert locked.ask(f"/page/{name}")[0] == 404


def test_nothing_is_inline_and_nothing_is_elsewhere() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert all(not content for _, content in scripts)
    named = [re.findall(r'src="page/([^"]+)"', attributes) for attributes, _ in scripts]
    assert sorted(name for names in named for name in names) == [name for name in FILES if name.endswith(".js")]
    assert not re.search(r"""<style|\sstyle=|\son\w+=|(?:src|href|action)=["'](?:\w+:|/)""", page)
    for name in FILES:
        content = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.\w|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", content)


def test_every_form_is_labelled() -> None:
    """Each field has a label, each tab a panel, and each panel its tab."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    labelled = re.findall(r"<label[^>]*>.*?</label>", page, re.DOTALL)
    inside = sum(len(re.findall(r"<(?:input|select|textarea)\b", label)) for label in labelled)
    assert inside + page.count('<label for="key">') == len(re.findall(r"<(?:input|select|textarea)\b", page))
    tabs = re.findall(r'role="tab" id="([^"]+)" aria-controls="([^"]+)"', page)
    assert tabs == [
        (tab, panel) for panel, tab in re.findall(r'id="(\w+)" role="tabpanel" aria-labelledby="([^"]+)"', page)
    ]
    assert len(tabs) == 6
    assert len(set(re.findall(r'\sid="([^"]+)"', page))) == len(re.findall(r'\sid="', page))


@pytest.mark.parametrize("given", [TEXTS, TEXTS[0]])
def test_translations(gateway: Gateway, direct: Client, given: Any) -> None:
    right = direct.translate(TEXTS, model="translate", target_lang="French", max_tokens=8)
    right = right if isinstance(given, list) else right[:1]
    body = {"model": "translate", "input": given, "target_lang": "French", "max_tokens": 8}
    status, _, answer = gateway.ask("/v1/translate", body)
    assert status == 200, answer
    assert [(each["text"], each["finish_reason"]) for each in answer["data"]] == [
        (each.text, each.finish_reason) for each in right
    ]
    assert answer["data"][0]["text"] != direct.translate(TEXTS[0], model="translate", max_tokens=8).text
    assert answer["usage"]["completion_tokens"] == sum(each.num_output_tokens for each in right) > 0


@pytest.mark.parametrize("strategy", [None, "none", "simple"])
def test_entities(gateway: Gateway, direct: Client, strategy: Any) -> None:
    right = direct.entities(TEXTS, model="tag", aggregation_strategy=strategy)
    body = {"model": "tag", "input": TEXTS} | ({"aggregation_strategy": strategy} if strategy else {})
    status, _, answer = gateway.ask("/v1/entities", body)
    assert status == 200, answer
    assert [each["entities"] for each in answer["data"]] == [[asdict(entity) for entity in every] for every in right]
    assert any(right)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/translate",
            {"model": "talk", "input": "a"},
            "the model 'talk' is for text-generation, not for translation",
        ),
        ("/v1/translate", {"model": "translate", "input": []}, "input is empty"),
        ("/v1/translate", {"model": "translate", "input": "a", "to": "fr"}, "to is not known here"),
        ("/v1/translate", {"model": "translate", "input": "a", "max_tokens": -1}, "max_tokens must be at least"),
        ("/v1/entities", {"model": "tag"}, "input is missing"),
        ("/v1/entities", {"model": "tag", "input": "a", "aggregation_strategy": "x"}, "aggregation_strategy: "),
        ("/v1/entities", {"model": "rank", "input": "a"}, "for that there is tag"),
    ],
)
def test_refusals(gateway: Gateway, path: str, body: dict[str, Any], message: str) -> None:
    status, _, answer = gateway.ask(path, body)
    assert status == 400
    assert message in answer["error"]["message"]
