"""The examples against the gateway's models and the gateway: what they print is what our client is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.examples import run
from tests.gateways import Gateway
from tests.integration.test_gateway_limits import metric, until
from trident_client import Client, Message
from trident_serving.launcher.local import LocalServer

PROMPT = "1, 2, 3, 4,"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def test_chat(gateway_server: LocalServer, direct: Client) -> None:
    asked = ("What is rain?", "And snow?")
    arguments = ("--url", gateway_server.grpc_url, "--model", "talk", "--max-tokens", "8")
    out, _ = run("chat.py", *arguments, text="\n".join(asked))
    messages: list[Message] = []
    for question in asked:
        messages.append({"role": "user", "content": question})
        messages.append(direct.chat(messages, model="talk", max_tokens=8).message)
    assert out == "".join(f"{each['content']}\n" for each in messages[1::2])


def test_retrieval_with_a_ranker(gateway_server: LocalServer, direct: Client, tmp_path: Path) -> None:
    texts = {"a.txt": "the cat sat", "b.txt": "rain fell on the tree\n\na dog lay there", "c.md": "not read"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    passages = [("a.txt", "the cat sat"), ("b.txt", "rain fell on the tree"), ("b.txt", "a dog lay there")]
    arguments = (str(tmp_path), "the cat", "--url", gateway_server.grpc_url, "--embedder", "embed")
    out, err = run("retrieval.py", *arguments, "--ranker", "rank")
    ranked = direct.rank("the cat", [text for _, text in passages], model="rank")
    assert out.splitlines() == [f"{each.score:.4f}\t" + "\t".join(passages[each.index]) for each in ranked]
    assert err == ""
    out, err = run("retrieval.py", *arguments, "--ranker", "nothing", "--candidates", "2")
    cosines = direct.embed([text for _, text in passages], model="embed") @ direct.embed("the cat", model="embed")
    best = [int(place) for place in cosines.argsort()[::-1][:2]]
    assert out.splitlines() == [f"{cosines[place]:.4f}\t" + "\t".join(passages[place]) for place in best]
    assert err.startswith("not ranked again: ")
    (tmp_path / "none").mkdir()
    _, err = run("retrieval.py", str(tmp_path / "none"), "the cat", status=1)
    assert "has no text in *.txt files" in err


def test_translate(gateway_server: LocalServer, direct: Client, tmp_path: Path) -> None:
    lines = ["Good morning", "", *(f"number {row}" for row in range(20))]
    (tmp_path / "letters.txt").write_text("\n".join(lines))
    arguments = ("--url", gateway_server.grpc_url, "--target-lang", "Spanish", "--max-tokens", "6")
    out, err = run("translate.py", str(tmp_path / "letters.txt"), *arguments)
    options: dict[str, Any] = {"target_lang": "Spanish", "max_tokens": 6}
    right = [" ".join(direct.translate(line, **options).text.split()) if line else "" for line in lines]
    assert out.split("\n") == [*right, ""]
    assert err.startswith("line 1: the translation is cut after 6 tokens\nline 3: ")


def test_extract(gateway: Gateway) -> None:
    """Any model's answer parses, even that of random weights."""
    out, _ = run(
        "extract.py", "Anna from Bern, four on Friday", "rain", "--url", gateway.url + "/v1", "--model", "talk"
    )
    bookings = [json.loads(line) for line in out.splitlines()]
    assert len(bookings) == 2
    for each in bookings:
        assert list(each) == ["name", "city", "day", "people"]
        assert max(len(each["name"]), len(each["city"])) <= 30
        assert each["day"] in DAYS
        assert 1 <= each["people"] <= 20


def test_agent(gateway_server: LocalServer) -> None:
    """The model calls a tool whatever it is told, until it may not."""
    arguments = ("--url", gateway_server.grpc_url, "--model", "chain", "--rounds", "1", "--max-tokens", "24")
    out, _ = run("agent.py", "Warm?", *arguments)
    call, answer = out.splitlines()
    assert call == 'weather {"city": "Zürich"} -> 18 degrees and rain'
    assert answer.startswith("I look.<tool_call>")  # of a request without tools it is text


def test_many_calls(gateway_server: LocalServer, direct: Client) -> None:
    prompts = [f"the cat {row}" for row in range(12)]
    cancelled = metric(gateway_server, "trident_requests_cancelled_total")
    arguments = ("--url", gateway_server.grpc_url, "--model", "talk", "--at-once", "3", "--max-tokens", "6")
    out, err = run("many_calls.py", *arguments, text="\n".join(prompts))
    right = [f"{each}\t{' '.join(direct.generate(each, model='talk', max_tokens=6).text.split())}" for each in prompts]
    assert sorted(out.splitlines()) == sorted(right)
    assert err.startswith("the story was cancelled after ")
    assert int(err.split()[5]) >= 1
    until(lambda: metric(gateway_server, "trident_requests_cancelled_total") == cancelled + 1, 5)
    _, err = run("many_calls.py", *arguments, "--model", "nothing", text="rain", status=1)
    assert err.endswith("1 of 1 calls failed\n")


def test_with_curl(gateway: Gateway, gateway_server: LocalServer, direct: Client) -> None:
    places = {"TRITON": gateway_server.http_url, "GATEWAY": gateway.url, "GENERATOR": "talk", "EMBEDDER": "embed"}
    out, _ = run("with_curl.sh", **places)
    parts = [part.partition("\n") for part in out.split("# ")[1:]]
    titles, said = [title for title, _, _ in parts], [rest.strip() for _, _, rest in parts]
    assert titles[0].startswith("Triton: is it ready?")
    assert said[0] == ""
    text = direct.generate(PROMPT, model="talk", max_tokens=8).text
    assert json.loads(said[1])["text_output"] == text
    assert "".join(each["text_output"] for each in events(said[2])) == text
    vectors = direct.embed(["a cat", "rain"], model="embed")
    (output,) = json.loads(said[3])["outputs"]
    assert (output["name"], output["shape"]) == ("embedding", [2, 32])
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(2, 32), vectors)
    assert {"talk", "embed"} <= {each["id"] for each in json.loads(said[4])["data"]}
    answer = direct.chat("What is 2 plus 2?", model="talk", max_tokens=20).text
    assert json.loads(said[5])["choices"][0]["message"]["content"] == answer
    assert said[6].endswith("data: [DONE]")
    deltas = [each["choices"][0]["delta"].get("content") or "" for each in events(said[6].removesuffix("data: [DONE]"))]
    assert "".join(deltas) == answer
    found = [each["embedding"] for each in json.loads(said[7])["data"]]
    np.testing.assert_array_equal(np.array(found, np.float32), vectors)
    mistake, status = said[8].rsplit("\n", 1)[0], said[8].rsplit("status ", 1)[1]
    assert json.loads(mistake)["error"]["code"] == "model_not_suitable"
    assert status == "22"
    run("with_curl.sh", status=22, **places | {"GENERATOR": "nothing"})


def events(text: str) -> list[Any]:
    """The data of server-sent events."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def test_with_tritonclient(gateway_server: LocalServer, direct: Client) -> None:
    arguments = ("--url", gateway_server.grpc_url, "--embedder", "embed", "--max-tokens", "8")
    out, _ = run("with_tritonclient.py", PROMPT, *arguments, "--model", "talk")
    text = direct.generate(PROMPT, model="talk", max_tokens=8).text
    prompt, answer = direct.embed([PROMPT, text], model="embed")
    assert out == f"{text}\ncosine {float(prompt @ answer):.4f}\n"
    _, err = run("with_tritonclient.py", PROMPT, *arguments[:-1], "-1", "--model", "talk", status=1)
    assert "max_tokens must be at least 0, found -1" in err
