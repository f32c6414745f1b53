"""`trident-export explain --url`: the graph that explains is the server's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.conftest import run_export
from tests.gateways import Gateway
from trident_client import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    Explanation,
    InvalidRequestError,
    NotFoundError,
    cli,
)
from trident_serving.explanation import report, units
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "she had a good book"
Explain = Callable[..., list[dict[str, Any]]]

TABLES = """
[{name}]
task = "{task}"
source = {{ path = "{name}" }}
variants = ["fp32"]
limits = {{ {limits} }}
"""
TASKS = {
    "classify": ("text-classification", "max_tokens = 96, buckets = [32], threads = 1, labels = 3"),
    "tag": ("token-classification", "max_tokens = 96, buckets = [32], threads = 1, labels = 5"),
    "rank": ("text-ranking", "max_tokens = 96, buckets = [32], threads = 1, labels = 1"),
    "talk": ("text-generation", "context = 2048, slots = 4, max_waiting = 8, threads = 1"),
}


@pytest.fixture
def explain(gateway_server: LocalServer, gateway_folder: Path, tmp_path: Path) -> Explain:
    """The explanations that the command prints as JSON."""
    tables = [TABLES.format(name=name, task=task, limits=limits) for name, (task, limits) in TASKS.items()]
    (tmp_path / "models.toml").write_text("".join(tables))
    where = ("--models-file", str(tmp_path / "models.toml"), "--repository", str(gateway_folder / "repository"))

    def run(*arguments: str) -> list[dict[str, Any]]:
        done = run_export("explain", *arguments, "--json", "--url", gateway_server.grpc_url, *where)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return run


def values(found: dict[str, Any]) -> list[float]:
    return [float(unit["value"]) for unit in found["attributions"]]


def masked(folder: Path, *texts: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A row for the text without each of its tokens, and one for the text; which tokens those are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(*texts, return_tensors="pt", return_special_tokens_mask=True)
    (tokens,) = np.flatnonzero(~batch.pop("special_tokens_mask")[0].bool().numpy())[None]
    rows = {name: tensor.repeat(len(tokens) + 1, 1) for name, tensor in batch.items()}
    rows["input_ids"][range(len(tokens)), tokens] = tokenizer.mask_token_id
    return rows, tokens.tolist()


def test_a_classifier_and_a_ranker(explain: Explain, direct: Client, gateway_folder: Path) -> None:
    """By tokens, as what Hugging Face loses; the scores are those that the server answers."""
    (found,) = explain("classify", TEXT, "--by", "token")
    (label,) = direct.classify(TEXT, model="classify")
    assert (found["of"], found["score"]) == (label.label, pytest.approx(label.score, abs=1e-6))
    model = AutoModelForSequenceClassification.from_pretrained(gateway_folder / "classify").eval()
    rows, _ = masked(gateway_folder / "classify", TEXT)
    with torch.inference_mode():
        scores = model(**rows).logits.softmax(-1)[:, model.config.label2id[label.label]].numpy()
    np.testing.assert_allclose(values(found), scores[-1] - scores[:-1], atol=1e-5)

    (found,) = explain("rank", TEXT, "--query", "a book", "--by", "token")
    (ranked,) = direct.rank("a book", [TEXT], model="rank")
    assert found["score"] == pytest.approx(ranked.score, abs=1e-6)
    ranker = AutoModelForSequenceClassification.from_pretrained(gateway_folder / "rank").eval()
    rows, _ = masked(gateway_folder / "rank", "a book", TEXT)
    with torch.inference_mode():
        scores = ranker(**rows).logits.sigmoid()[:, 0].numpy()
    np.testing.assert_allclose(values(found), scores[-1] - scores[:-1], atol=1e-5)
    assert {unit["part"] for unit in found["attributions"]} == {"query", "text_input"}


def test_tensors_of_any_model(gateway_server: LocalServer, direct: Client) -> None:
    """`infer` gives the graph's tensors, the same over both protocols and awaited."""
    ids = np.array(direct.tokenize([TEXT], model="classify"))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    logits = direct.infer("classify_model", inputs)["logits"]
    scores = np.exp(logits[0]) / np.exp(logits[0]).sum()
    (label,) = direct.classify(TEXT, model="classify")
    assert float(scores.max()) == pytest.approx(label.score, abs=1e-6)
    with Client(gateway_server.http_url, timeout=60) as over_http:
        np.testing.assert_array_equal(over_http.infer("classify_model", inputs)["logits"], logits)

    async def awaited() -> Any:
        async with AsyncClient(gateway_server.grpc_url, timeout=60) as client:
            with pytest.raises(InvalidRequestError, match="attention_mask"):
                await client.infer("classify_model", {"input_ids": ids, "token_type_ids": ids})
            with pytest.raises(NotFoundError, match="nothing"):
                await client.infer("nothing", inputs)
            return await client.infer("classify_model", inputs)

    np.testing.assert_array_equal(asyncio.run(awaited())["logits"], logits)


def test_entities(explain: Explain, direct: Client, gateway_folder: Path) -> None:
    """One explanation for each, of the probability that its tokens have its class, beginning or not."""
    wanted = direct.entities(TEXT, model="tag")
    found = explain("tag", TEXT, "--by", "token")
    assert wanted
    assert [each["of"] for each in found] == [f"{each.entity}: {TEXT[each.start : each.end]}" for each in wanted]
    model = AutoModelForTokenClassification.from_pretrained(gateway_folder / "tag").eval()
    tokenizer = AutoTokenizer.from_pretrained(gateway_folder / "tag")
    offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    rows, tokens = masked(gateway_folder / "tag", TEXT)
    with torch.inference_mode():
        scores = model(**rows).logits.softmax(-1).numpy()
    for entity, each in zip(wanted, found, strict=True):
        columns = [row for name, row in model.config.label2id.items() if name.endswith(f"-{entity.entity}")]
        inside = [t for t in tokens if offsets[t][0] >= entity.start and offsets[t][1] <= entity.end]
        of_entity = scores[:, inside][..., columns].sum(-1).mean(-1)
        assert each["score"] == pytest.approx(of_entity[-1], abs=1e-5)
        np.testing.assert_allclose(values(each), of_entity[-1] - of_entity[:-1], atol=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_a_generator(explain: Explain, direct: Client, gateway_folder: Path, chat: bool) -> None:
    """What the answer's log-probability loses, as Hugging Face computes it from the tokens that are left."""
    text = "She had one <a> good book, and a day."
    more = ("--chat",) if chat else ()
    (found,) = explain("talk", text, "--max-tokens", "6", *more)
    prompt: Any = [{"role": "user", "content": text}] if chat else text
    answer = direct.generate(
        prompt, model="talk", max_tokens=6, return_tokens=True, return_prompt_token_ids=True, temperature=0
    )
    assert found["of"] == answer.text
    assert [unit["text"] for unit in found["attributions"]] == [
        *("She", "had", "one", "<", "a", ">", "good", "book", ",", "and", "a", "day", ".")
    ]
    model = AutoModelForCausalLM.from_pretrained(gateway_folder / "talk").eval()

    def log_prob(kept: list[int]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([[*kept, *answer.token_ids]])).logits[0].log_softmax(-1)
        return float(sum(logits[len(kept) + row - 1, token] for row, token in enumerate(answer.token_ids)))

    held, ends = b"", []
    for piece in answer.prompt_tokens:
        held += piece
        ends.append(len(held))
    at = held.rfind(text.encode())
    whole = log_prob(list(answer.prompt_token_ids))
    assert found["score"] == pytest.approx(whole, abs=1e-3)
    for unit in found["attributions"]:
        kept = [
            token
            for token, piece, end in zip(answer.prompt_token_ids, answer.prompt_tokens, ends, strict=True)
            if end <= at + unit["start"] or end - len(piece) >= at + unit["end"]
        ]
        assert len(kept) < len(answer.prompt_token_ids)
        assert unit["value"] == pytest.approx(whole - log_prob(kept), abs=1e-3)


def test_an_answer_that_is_given(explain: Explain, direct: Client) -> None:
    text, answer = "She had one good book. It was old.", " Yes, it is"
    (found,) = explain("talk", text, "--answer", answer, "--by", "sentence")
    prompt = direct.generate(text, model="talk", max_tokens=0, prompt_logprobs=0).prompt_log_probs
    both = direct.generate(text + answer, model="talk", max_tokens=0, prompt_logprobs=0).prompt_log_probs
    assert found["of"] == answer
    assert found["score"] == pytest.approx(sum(both) - sum(prompt), abs=1e-3)
    assert [unit["text"] for unit in found["attributions"]] == ["She had one good book.", "It was old."]


def test_another_model_is_no_explanation(gateway_server: LocalServer, gateway_folder: Path, tmp_path: Path) -> None:
    """The server's whole answer must be that of the repository's stages."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for path in (gateway_folder / "repository").iterdir():
        if path.name != "classify_postprocess":
            (repository / path.name).symlink_to(path)
    folder = repository / "classify_postprocess/1"
    folder.mkdir(parents=True)
    labels = (gateway_folder / "repository/classify_postprocess/1/labels.json").read_text()
    (folder / "labels.json").write_text(labels.replace("LABEL_", "OTHER_"))
    (tmp_path / "models.toml").write_text(
        TABLES.format(name="classify", task=TASKS["classify"][0], limits=TASKS["classify"][1])
    )
    where = ("--models-file", str(tmp_path / "models.toml"), "--repository", str(repository))
    done = run_export("explain", "classify", TEXT, "--url", gateway_server.grpc_url, *where)
    assert done.returncode == 1
    assert "the server's answer to this text differs from that of the repository in label" in done.stderr


def plain(found: list[Explanation]) -> list[dict[str, Any]]:
    """Explanations as the command prints them."""
    return [{**asdict(each), "attributions": [asdict(one) for one in each.attributions]} for each in found]


def test_a_server_explains_itself(
    explain: Explain,
    direct: Client,
    gateway_server: LocalServer,
    gateway: Gateway,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By request the same numbers as the command's, whoever asks; and the command's page."""
    entities, prompt = explain("tag", TEXT), explain("talk", TEXT, "--answer", " so", "--by", "token")
    assert plain(direct.explain(TEXT, model="tag")) == entities
    assert plain(direct.explain(TEXT, model="talk", answer=" so", by="token")) == prompt
    with Client(gateway_server.http_url, timeout=60) as over_http:
        assert plain(over_http.explain(TEXT, model="tag")) == entities

    async def awaited() -> tuple[list[Explanation], str]:
        async with AsyncClient(gateway_server.grpc_url, timeout=60) as client:
            return await client.explain(TEXT, model="tag"), await client.explain_page(TEXT, model="tag")

    found, page = asyncio.run(awaited())
    assert plain(found) == entities
    assert page == report.as_html([_explanation(each) for each in entities])

    at = ["--model", "tag", "--url", gateway_server.grpc_url]
    assert cli.main(["explain", TEXT, "--json", *at]) == 0
    assert json.loads(capsys.readouterr().out) == entities
    assert cli.main(["explain", TEXT, *at]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == sum(1 + len(each["attributions"]) for each in entities)
    assert shown[0] == f"{entities[0]['of']} (probability {entities[0]['score']:.4g})"
    assert cli.main(["explain", TEXT, "--html", str(tmp_path / "page.html"), *at]) == 0
    assert (tmp_path / "page.html").read_text() == page

    body = {"model": "talk", "input": TEXT, "answer": " so", "by": "token"}
    status, _, answer = gateway.ask("/v1/explain", body)
    assert (status, answer["data"]) == (200, prompt)
    status, headers, shown = gateway.ask("/v1/explain", {"model": "tag", "input": TEXT, "response_format": "html"})
    assert (status, shown) == (200, page)
    assert "sandbox" in headers["content-security-policy"]
    _, _, seen = gateway.ask("/admin/status")
    assert {"talk_explain", "tag_explain"} <= set(seen["queues"])  # turns of their own


def _explanation(found: dict[str, Any]) -> units.Explanation:
    attributions = tuple(units.Attribution(**each) for each in found["attributions"])
    return units.Explanation(**{**found, "attributions": attributions})


def test_what_a_server_does_not_explain(direct: Client, gateway: Gateway) -> None:
    for text, options, message in (
        ("a " * 41, {}, "text_input makes 41 texts without one of its parts, the limit is 40: shorten it"),
        (TEXT, {"query": "a"}, "query is not for token-classification"),
        (TEXT, {"label": "ORG"}, "there is no class 'ORG'; the model has LOC, O, PER"),
        (TEXT, {"by": "letter"}, "by must be one of word, sentence, token, found 'letter'"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            direct.explain(text, model="tag", **options)  # type: ignore[arg-type]
        assert str(caught.value).startswith(message)
    with pytest.raises(InvalidRequestError, match="variant must be one of fp32, found 'int8'"):
        direct.explain(TEXT, model="tag_int8")
    with pytest.raises(NotFoundError, match="embed_explain"):
        direct.explain(TEXT, model="embed")
    with pytest.raises(DeadlineExceededError):
        direct.explain(TEXT, model="tag", timeout=0.001)
    for body, message in (
        ({"model": "embed", "input": TEXT}, "the model 'embed' is not explained: set explain = true in its table"),
        ({"model": "tag", "input": "a " * 41}, "input makes 41 texts without one of its parts"),
        ({"model": "tag", "input": TEXT, "by": "letter"}, "by: "),
    ):
        status, _, answer = gateway.ask("/v1/explain", body)
        assert (status, answer["error"]["message"][: len(message)]) == (400, message)
