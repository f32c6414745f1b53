"""What a head learns from and is measured by, and that a tiny one learns; the command is in test_train_head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from tests import tiny_models
from trident_export.compression import models
from trident_export.errors import NotWritable, TextError, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.training import heads, run
from trident_export.training.examples import Labelled, Question, labelled, questions

pytestmark = pytest.mark.usefixtures("one_thread")
PLACES = ("garden", "house", "river", "street", "church", "field", "window", "table", "door", "sea")


def test_examples(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a cat", "label": "pet"}\n\n{"text": "a pan", "label": "tool"}\n')
    assert labelled(file) == [Labelled("a cat", "pet"), Labelled("a pan", "tool")]
    file.write_text(
        '{"question": "q", "context": "An ox and an ox", "answer": "ox"}\n'
        '{"question": "q", "context": "An ox and an ox", "answer": "ox", "start": 13}\n'
        '{"question": "q", "context": "An ox", "answer": ""}\n'
    )
    assert [(each.start, each.end) for each in questions(file)] == [(3, 5), (13, 15), (0, 0)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"}', "line 2: label must be a text, found none"),
        ('{"text": "a", "label": 3}', "line 2: label must be a text, found 3"),
        ('{"text": "a", "label": ["b"]}', r"line 2: label must be a text, found \[\"b\"\]"),
        ('{"text": " ", "label": "b"}', "line 2: text must be a text, found an empty one"),
        (
            r'{"text": "a\ud83d b", "label": "b"}',
            r"line 2: text holds half of a surrogate pair, '\\ud83d', which is no",
        ),
        ("[1]", "line 2: it is no object"),
        ("{", "line 2: Expecting property name"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_broken_examples(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"text": "a", "label": "b"}}\n{line}\n')
    with pytest.raises(TextError, match=said):
        labelled(file)
    with pytest.raises(TextError, match=r"none can't be read: No such file or directory$"):
        labelled(tmp_path / "none")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match=r"data.jsonl is not UTF-8 text: invalid start byte at byte 0$"):
        labelled(file)


@pytest.mark.parametrize("start", ['"x"', "-3", "4", "null", "true", "3.0"])
def test_an_answer_must_stand_where_it_is_said_to(tmp_path: Path, start: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"question": "q", "context": "An ox", "answer": "ox", "start": {start}}}\n')
    with pytest.raises(TextError, match="line 1: the answer 'ox' does not stand in the context"):
        questions(file)


def test_the_best_span_lies_in_the_context() -> None:
    allowed = [False, False, True, True, True, False]
    start, end = torch.tensor([0, 9, 1, 5, 0, 9.0]), torch.tensor([0, 9, 8, 2, 3, 9.0])
    assert heads.best_span(start, end, allowed) == (2, 2)  # 9; (3, 4) has 8, and 3 to 2 runs backwards
    start[0] = 10
    assert heads.best_span(start, end, allowed) == (0, 0)


def test_tokens_of_an_answer() -> None:
    offsets, parts = [(0, 0), (0, 1), (0, 0), (0, 2), (3, 5), (5, 6), (0, 0)], [None, 0, None, 1, 1, 1, None]
    assert heads.tokens_of(Question("q", "An oxy", 3, 6), offsets, parts) == (4, 5)
    assert heads.tokens_of(Question("q", "An oxy and", 7, 10), offsets, parts) == (0, 0)  # it was cut
    assert heads.tokens_of(Question("q", "An oxy and", 4, 9), offsets, parts) == (0, 0)  # a half was
    assert heads.tokens_of(Question("q", "An oxy", 0, 0), offsets, parts) == (0, 0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceFolder:
    folder = tmp_path_factory.mktemp("encoder") / "vectors"
    tiny_models.make_reader(folder, "bert", AutoModel)
    (folder / "modules.json").write_text("[]")
    return HuggingFaceFolder(folder)


def trained(
    encoder: HuggingFaceFolder, task: str, examples: list[Labelled] | list[Question], output: Path
) -> list[str]:
    """Train on a few examples, all of which can be told apart; what was said."""
    settings = heads.Settings(epochs=12, batch_size=8, length=32, learning_rate=3e-3)
    said: list[str] = []
    found = heads.train(task, encoder, examples, output, settings, said.append)
    assert found is not None
    assert (found.held_out, set(found.measures.values())) == (len(examples) // 5, {1.0})
    assert not (output / "modules.json").exists()
    assert not output.with_name("out.training").exists()
    return said


def test_a_classifier_learns(encoder: HuggingFaceFolder, tmp_path: Path) -> None:
    words = ("king", "queen", "child")
    examples = [Labelled(f"The {word} of the {place}", word) for place in PLACES for word in words]
    said = trained(encoder, "text-classification", examples, tmp_path / "out")
    losses = [float(line.rpartition(" ")[2]) for line in said]
    assert losses[0] > 1.2 * losses[-1]
    assert said[0].startswith("step 10 of 36, loss ")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        logits = model(**encoder.tokenizer("The queen of the sea", return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "queen"


def test_questions_are_answered(encoder: HuggingFaceFolder, tmp_path: Path) -> None:
    examples = [
        Question("Who is it?", f"The {place} of the {who} and the {other}", start, start + len(who))
        for place in PLACES
        for who in ("king", "queen")
        for other in ("house", "door")
        if (start := len(f"The {place} of the "))
    ]
    trained(encoder, "question-answering", examples, tmp_path / "out")
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        batch = encoder.tokenizer("Who is it?", "The sea of the queen and the house", return_tensors="pt")
        found = model(**batch)
    ids = batch.input_ids[0, int(found.start_logits.argmax()) : int(found.end_logits.argmax()) + 1]
    assert encoder.tokenizer.decode(ids) == "queen"


def settings(**more: int) -> heads.Settings:
    return heads.Settings(batch_size=8, **{"length": 16, **more})


def test_questions_that_leave_no_room_for_their_context(encoder: HuggingFaceFolder, tmp_path: Path) -> None:
    examples = [Question("Who is it?", "The king", 4, 8)] * 12 + [Question("Who is it? " * 4, "The king", 4, 8)]
    said = "the question of example 13 has 24 tokens, which leaves none of --length 16 for its context"
    with pytest.raises(TextError, match=said):
        heads.train("question-answering", encoder, examples, tmp_path / "out", settings(), print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("length", "said"), [(2, "--length is 2, and 2 of that are special tokens"), (131, "takes 130 tokens at most")]
)
def test_lengths_that_the_model_has_no_form_for(
    encoder: HuggingFaceFolder, tmp_path: Path, length: int, said: str
) -> None:
    examples = [Labelled("the king", name) for name in ("a", "b") for _ in range(8)]
    with pytest.raises(UsageError, match=said):
        heads.train("text-classification", encoder, examples, tmp_path / "out", settings(length=length), print)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_past_a_checkpoint_that_was_cut(encoder: HuggingFaceFolder, tmp_path: Path) -> None:
    """As after a kill, or a power cut, in the middle of writing it."""
    words = ("king", "queen", "child")
    examples = [Labelled(f"The {word} of the {place}", word) for place in PLACES for word in words]
    asked = heads.Settings(epochs=6, batch_size=8, length=32, learning_rate=3e-3, save_every=4)
    work = run.folder_of(tmp_path / "out")

    class KilledError(Exception):
        pass

    def killed(line: str) -> None:
        if line.startswith("step 10 "):
            raise KilledError

    with pytest.raises(KilledError):
        heads.train("text-classification", encoder, examples, tmp_path / "out", asked, killed)
    (last,) = work.glob("checkpoint-*")
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        whole = (last / name).read_bytes()
        assert run.last_checkpoint(work) == str(last)
        (last / name).write_bytes(whole[: len(whole) // 2])
        assert run.last_checkpoint(work) is None
        (last / name).write_bytes(whole)
    (last / "optimizer.pt").write_bytes(whole[:100])
    (work / "checkpoint-old").mkdir()
    said: list[str] = []
    assert heads.train("text-classification", encoder, examples, tmp_path / "out", asked, said.append) is not None
    assert said[0].startswith("step 10 of 18")  # from the beginning


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_checkpoints_of_nobody_knows_which_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/trainer_state.json").write_text("{}")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UsageError, match="settings.json beside them does not say of which run"):
        run.check_same_run(tmp_path, {"steps": 5})
    with pytest.raises(UsageError, match="is no folder, and checkpoints go there"):
        run.check_same_run(tmp_path / "settings.json", {"steps": 5})


def test_a_seed_that_can_t_be() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="--seed must be between 0 and 4294967295, found"):
            heads.Settings(seed=seed)


def test_only_a_model_s_folder_is_replaced(tmp_path: Path) -> None:
    models.check_output(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    models.check_output(tmp_path / "empty")
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_text("{}")
    models.check_output(tmp_path / "before")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for name in ("mine", "mine/thesis.txt"):
        with pytest.raises(NotWritable, match="is there and is no model's folder: name another one, or remove it"):
            models.check_output(tmp_path / name)


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    """A text may hold other ends of lines, and a file begin with a byte order mark."""
    file = tmp_path / "examples.jsonl"
    file.write_bytes("\ufeff".encode() + '{"text": "a\u2028b\x85c", "label": "x"}\r\n\n'.encode())
    assert [each.text for each in labelled(file)] == ["a\u2028b\x85c"]
