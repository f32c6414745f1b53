"""No example without a test, and what needs no server of the examples."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples import FOLDER, ROOT
from tests.integration.test_examples import QUESTIONS
from trident_client import ToolCall

TESTS = ("tests/integration/test_examples.py", "tests/integration/test_gateway_examples.py")
PAGE = ROOT / "docs" / "how-to" / "start-from-an-example.md"


def programs() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh"))


def run_by_tests() -> Iterator[str]:
    """The first argument of each `run(...)` within a test function."""
    for file in TESTS:
        for function in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run":
                        yield ast.literal_eval(node.args[0])


def test_every_file_has_a_test() -> None:
    assert sorted(set(run_by_tests())) == programs()
    assert sorted(path.name for path in (FOLDER / "texts").iterdir()) == sorted(QUESTIONS)
    rest = {path.name for path in FOLDER.iterdir()} - set(programs()) - {"__pycache__"}
    assert rest == {"README.md", "deepspeed", "heads", "texts"}


@pytest.mark.parametrize("page", [FOLDER / "README.md", PAGE], ids=["readme", "how-to"])
def test_every_program_is_in_the_documents(page: Path) -> None:
    named = re.findall(r"examples/(\w+\.(?:py|sh))|\[(\w+\.(?:py|sh))\]", page.read_text(encoding="utf-8"))
    assert sorted({first or second for first, second in named}) == programs()


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent", FOLDER / "agent.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", '{"city": "Bern"}', "21 degrees and sun"),
        ("weather", '{"city": "Oslo"}', "no station in Oslo"),
        ("add", '{"a": 1.5, "b": 2}', "3.5"),
        ("add", '{"a": 1}', "error: add() missing 1 required positional argument: 'b'"),
        ("add", '{"a": "1", "b": "2"}', "error: Unknown format code 'g' for object of type 'str'"),
        ("add", '{"a": 1', "error: Expecting ',' delimiter: line 1 column 8 (char 7)"),
        ("send", "{}", "error: there is no tool send"),
    ],
)
def test_the_agent_survives_what_a_model_writes(agent: ModuleType, name: str, arguments: str, result: str) -> None:
    assert agent.result(ToolCall(0, "1", name, arguments)) == result


def test_the_agents_tools_are_those_that_it_describes(agent: ModuleType) -> None:
    assert [each["function"]["name"] for each in agent.DESCRIPTIONS] == list(agent.TOOLS)
