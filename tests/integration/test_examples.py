"""The examples against the default models; those that need others are in test_gateway_examples.py."""

from __future__ import annotations

import pytest

from tests.examples import run
from trident_client import Client
from trident_serving.launcher.local import LocalServer

# A question for each file of examples/texts; none has the words of its answer.
QUESTIONS = {
    "bees.txt": "How do insects tell each other where food is?",
    "bread.txt": "What makes a loaf grow when nobody bought yeast?",
    "lighthouses.txt": "How does a captain know in the dark which coast he sees?",
    "tides.txt": "Why is the water at the beach deeper at noon than in the morning?",
}


@pytest.mark.parametrize("file", QUESTIONS)
def test_retrieval_finds_the_file(server: LocalServer, client: Client, file: str) -> None:
    out, err = run("retrieval.py", "examples/texts", QUESTIONS[file], "--url", server.grpc_url, "--top", "2")
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0][1] == file
    assert float(rows[0][0]) > float(rows[1][0])
    question, passage = client.embed([QUESTIONS[file], rows[0][2]])
    assert float(rows[0][0]) == pytest.approx(float(question @ passage), abs=1e-2)  # the file's passage has line ends
    assert err.startswith("not ranked again: the server serves no model for text-ranking")


def test_a_chat_remembers(server: LocalServer, client: Client) -> None:
    out, err = run("chat.py", "--url", server.grpc_url, text="My name is Ada.\nWhat is my name?\n")
    first = client.chat("My name is Ada.", max_tokens=200)
    second = [{"role": "user", "content": "My name is Ada."}, first.message]
    right = client.chat([*second, {"role": "user", "content": "What is my name?"}], max_tokens=200)
    assert (out, err) == (f"{first.text}\n{right.text}\n", "")


def test_an_agent_of_a_model_without_tools(server: LocalServer) -> None:
    out, err = run("agent.py", "Is it warm in Bern?", "--url", server.grpc_url, status=1)
    assert out == ""
    assert "tools" in err
    assert "Traceback" not in err
