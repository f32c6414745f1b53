"""`trident-export explain` on exported graphs, beside integrated gradients on the Hugging Face model.

Reference: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks: from the text with every word masked to
the text itself, by torch's autograd. Attributions of both are in probabilities of the same class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from tests import tiny_models
from tests.conftest import run_export, run_export_cold

pytestmark = pytest.mark.usefixtures("one_thread")

PLANTED, IGNORED, OTHER_IGNORED = "good", "money", "book"
TEXTS = (
    f"the {PLANTED} man was here and the {IGNORED} is known to be his",
    f"she had some {IGNORED} and found it {PLANTED} in all the years",
    f"{PLANTED} light for one sister by the {IGNORED} of her daughters",
)


class Models(NamedTuple):
    folder: Path
    classifier: Any
    reader: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A classifier in which one word decides and two count for no more than a mask, and a reader; both exported."""
    folder = tmp_path_factory.mktemp("explained")
    tiny_models.make_reader(folder / "planted", "bert", AutoModelForSequenceClassification, seed=5, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "planted")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "planted").eval()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (PLANTED, IGNORED, OTHER_IGNORED, "[MASK]")}
    assert tokenizer.unk_token_id not in ids.values()
    with torch.no_grad():
        words, mask = model.get_input_embeddings().weight, ids["[MASK]"]
        planted = words[ids[PLANTED]].clone()
        words[:] = words[mask] + 0.3 * (words - words[mask])  # no other word is far from a mask
        words[ids[PLANTED]] = planted
        words[ids[IGNORED]] = words[ids[OTHER_IGNORED]] = words[mask]
        # The head reads how the pooled vector differs when the word is there.
        apart = []
        for text in TEXTS:
            batch = tokenizer(text, return_tensors="pt")
            masked = batch.input_ids.masked_fill(batch.input_ids == ids[PLANTED], ids["[MASK]"])
            with_it, without = (
                model.bert(**{**batch, "input_ids": each}).pooler_output[0] for each in (batch.input_ids, masked)
            )
            apart.append((with_it - without, (with_it + without) / 2))
        direction, middle = (torch.stack(each).mean(0) for each in zip(*apart, strict=True))
        scale = 2 / direction.norm() ** 2
        model.classifier.weight[:] = torch.stack([-direction, direction]) * scale
        model.classifier.bias[:] = torch.stack([direction @ middle, -direction @ middle]) * scale
    model.save_pretrained(folder / "planted")
    tiny_models.make_reader(folder / "reader", "bert", AutoModelForQuestionAnswering, seed=6)
    tiny_models.settle(folder / "reader")
    tables = []
    for name, task, limits in (
        ("planted", "text-classification", "labels = 2"),
        ("reader", "question-answering", "stride = 24"),
    ):
        tables.append(
            f'[{name}]\ntask = "{task}"\nsource = {{ path = "{name}" }}\nvariants = ["fp32"]\n'
            f"limits = {{ max_tokens = 96, buckets = [32], threads = 1, {limits} }}\n"
        )
    (folder / "models.toml").write_text("\n".join(tables))
    done = run_export("export", *_where(folder))
    assert done.returncode == 0, done.stderr
    reader = AutoModelForQuestionAnswering.from_pretrained(folder / "reader").eval()
    return Models(folder, model, reader, tokenizer)


def _where(folder: Path) -> tuple[str, ...]:
    return ("--models-file", str(folder / "models.toml"), "--repository", str(folder / "repository"))


def explained(models: Models, *arguments: str) -> list[dict[str, Any]]:
    done = run_export("explain", *arguments, "--json", *_where(models.folder))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def gradients(models: Models, text: str, steps: int = 200) -> tuple[list[str], np.ndarray[Any, Any], float]:
    """Integrated gradients of the second class's probability: tokens, attributions, and what they should add to."""
    model, tokenizer = models.classifier, models.tokenizer
    batch = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
    special = batch.pop("special_tokens_mask").bool()
    masked = torch.where(special, batch.input_ids, tokenizer.mask_token_id)
    begin, end = (model.get_input_embeddings()(ids).detach() for ids in (masked, batch.input_ids))
    shares = (torch.arange(steps) + 0.5)[:, None, None] / steps
    path = (begin + shares * (end - begin)).requires_grad_()
    rest = {name: tensor.expand(steps, -1) for name, tensor in batch.items() if name != "input_ids"}
    model(inputs_embeds=path, **rest).logits.softmax(-1)[:, 1].sum().backward()
    assert path.grad is not None
    found = ((end - begin) * path.grad.mean(0)).sum(-1)[0]
    with torch.inference_mode():
        before, after = (
            float(model(**{**batch, "input_ids": ids}).logits.softmax(-1)[0, 1]) for ids in (masked, batch.input_ids)
        )
    kept = ~special[0]
    return tokenizer.convert_ids_to_tokens(batch.input_ids[0][kept]), found[kept].numpy(), after - before


def ranks(values: Any) -> Any:
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("text", TEXTS)
def test_occlusion_beside_integrated_gradients(models: Models, text: str) -> None:
    """Each value is the drop of Hugging Face's probability, and both methods put the same word first."""
    tokens, reference, total = gradients(models, text)
    assert float(reference.sum()) == pytest.approx(total, abs=1e-3)  # completeness, of the reference itself
    (found,) = explained(models, "planted", text, "--label", "LABEL_1")
    units = found["attributions"]
    assert [unit["text"] for unit in units] == tokens
    values = np.array([unit["value"] for unit in units])
    assert tokens[int(values.argmax())] == tokens[int(reference.argmax())] == PLANTED
    assert float(np.corrcoef(ranks(values), ranks(reference))[0, 1]) > 0.9  # Spearman's
    assert values.max() > 2 * np.sort(np.abs(values))[-2]
    batch = models.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        rows = batch.input_ids.repeat(len(units) + 1, 1)
        rows[range(len(units)), range(1, len(units) + 1)] = models.tokenizer.mask_token_id
        *without, whole = models.classifier(input_ids=rows).logits.softmax(-1)[:, 1].tolist()
    assert found["score"] == pytest.approx(whole, abs=1e-5)
    np.testing.assert_allclose(values, whole - np.array(without), atol=1e-5)
    assert [text[unit["start"] : unit["end"]] for unit in units] == tokens
    assert [abs(unit["value"]) < 1e-6 for unit in units] == [token == IGNORED for token in tokens]


def test_a_word_without_weight(models: Models) -> None:
    """Another such word in its place changes nothing, to the last bit; by tokens and words it is the same."""
    other = [text.replace(IGNORED, OTHER_IGNORED) for text in TEXTS]
    found = explained(models, "planted", *TEXTS, *other, "--label", "LABEL_1")
    numbers = [[each["score"], *(unit["value"] for unit in each["attributions"])] for each in found]
    assert len(numbers) == 6
    assert numbers[:3] == numbers[3:]
    tokens = explained(models, "planted", *TEXTS, "--label", "LABEL_1", "--by", "token")
    for one, each in zip(tokens, found[:3], strict=True):
        assert one["attributions"] == each["attributions"]


def test_sentences_and_the_other_class(models: Models) -> None:
    text = f"The man was here. It is {PLANTED}! So it was"
    (yes,) = explained(models, "planted", text, "--by", "sentence", "--label", "LABEL_1")
    (no,) = explained(models, "planted", text, "--by", "sentence", "--label", "LABEL_0")
    assert [unit["text"] for unit in yes["attributions"]] == ["The man was here.", f"It is {PLANTED}!", "So it was"]
    assert max(yes["attributions"], key=lambda unit: float(unit["value"]))["text"] == f"It is {PLANTED}!"
    for one, other in zip(yes["attributions"], no["attributions"], strict=True):
        assert one["value"] == pytest.approx(-other["value"], abs=1e-6)
    assert yes["score"] + no["score"] == pytest.approx(1)


def test_an_answer_to_a_question(models: Models) -> None:
    """A drop is what Hugging Face's probabilities of the first and the last token, multiplied, lose."""
    question, context = "how was she here", "the old man was here with his daughters and one good sister"
    (found,) = explained(models, "reader", context, "--question", question)
    assert found["texts"] == {"question": question, "context": context}
    assert {unit["part"] for unit in found["attributions"]} == {"question", "context"}
    start = context.index(found["of"])
    batch = models.tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = batch.pop("offset_mapping")[0].tolist()
    context_tokens = [token for token, part in enumerate(batch.sequence_ids(0)) if part == 1]
    first = next(token for token in context_tokens if offsets[token][0] == start)
    last = next(token for token in context_tokens if offsets[token][1] == start + len(found["of"]))
    outside = torch.ones(len(offsets), dtype=torch.bool)
    outside[[0, *context_tokens]] = False

    def score(hidden: int | None) -> float:
        ids = batch.input_ids.clone()
        if hidden is not None:
            ids[0, hidden] = models.tokenizer.mask_token_id
        with torch.inference_mode():
            logits = models.reader(**{**batch, "input_ids": ids})
        begin, end = (
            row[0].masked_fill(outside, -10000.0).softmax(-1) for row in (logits.start_logits, logits.end_logits)
        )
        return float(begin[first] * end[last])

    assert found["score"] == pytest.approx(score(None), abs=1e-5)
    parts = {
        part: [t for t, each in enumerate(batch.sequence_ids(0)) if each == row]
        for row, part in enumerate(found["texts"])
    }
    for part, tokens in parts.items():
        units = [unit for unit in found["attributions"] if unit["part"] == part]
        assert [[unit["start"], unit["end"]] for unit in units] == [offsets[token] for token in tokens]
        np.testing.assert_allclose(
            [unit["value"] for unit in units], [score(None) - score(token) for token in tokens], atol=1e-5
        )


def test_an_answer_in_one_of_several_windows(models: Models) -> None:
    """Each word of a long context has its attribution; those that no window of the answer reads are 0."""
    context = " ".join(f"{word} man {row % 7}" for row, word in enumerate(["old", "good", "little"] * 15))
    (found,) = explained(models, "reader", context, "--question", "who was here ?")
    units = [unit for unit in found["attributions"] if unit["part"] == "context"]
    assert [unit["text"] for unit in units] == context.split()
    assert found["of"] in context
    assert any(unit["value"] == 0 for unit in units)
    assert any(unit["value"] != 0 for unit in units)


def test_the_command(models: Models, tmp_path: Path) -> None:
    """As a person starts it: a table, and a page in which markup is text."""
    text = f"<script>alert('{PLANTED}')</script> & {IGNORED} \x1b[31m"
    arguments = ("explain", "planted", text, "--label", "LABEL_1", "--html", str(tmp_path / "out/page.html"))
    done = run_export_cold(*arguments, *_where(models.folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("planted: LABEL_1 (probability 0.")
    assert f"  {PLANTED}\n" in done.stdout
    assert "\x1b" not in done.stdout
    page = (tmp_path / "out/page.html").read_text()
    assert "<script" not in page
    assert "&lt;" in page
    assert f">{PLANTED}</mark>" in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("planted", "a man", "--label", "good"), "there is no class 'good'; the model has LABEL_0, LABEL_1"),
        (("planted", "a man", "--variant", "int8"), "planted has no variant 'int8'; exported are fp32"),
        (("planted", "man " * 200), "the model takes 96: shorten it"),
    ],
)
def test_what_can_not_be_explained(models: Models, arguments: tuple[str, ...], message: str) -> None:
    done = run_export("explain", *arguments, *_where(models.folder))
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
