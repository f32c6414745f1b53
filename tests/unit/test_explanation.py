"""What a unit is, how units are hidden from a graph, and what a page shows, without a model's weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trident_export import cli, models_file
from trident_export.errors import UsageError
from trident_export.explanation import asking as command
from trident_export.explanation import models as stages_of
from trident_serving.encoders.labels import Activation, LabelSettings
from trident_serving.encoders.ranking import RankingTemplates
from trident_serving.encoders.tokens import TOKENIZER, TokenRoles
from trident_serving.encoders.zero_shot import InferenceSettings
from trident_serving.errors import InvalidRequest
from trident_serving.explanation import asking, generators, report
from trident_serving.explanation.asking import Options
from trident_serving.explanation.encoders import EncoderStages, Tensors
from trident_serving.explanation.units import Attribution, By, Explanation, Places, Span, sentences, units, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It isn't a well-known 3.5 % (or so).",
            ["It", "isn't", "a", "well-known", "3.5", "%", "(", "or", "so", ")", "."],
        ),
        ("a_b x@y.de -5 --", ["a_b", "x", "@", "y.de", "-", "5", "-", "-"]),
        ("हिन्दी में Zoë", ["हिन्दी", "में", "Zoë"]),
        ("我喜欢 Python3カ", ["我", "喜", "欢", "Python3", "カ"]),
        (" \n\t", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in words(text)] == expected


def test_sentences() -> None:
    text = "  He said: “No.” Is 3.5 enough?  Yes!\n\nA line\n我是。你呢？好"
    expected = ["He said: “No.”", "Is 3.5 enough?", "Yes!", "A line", "我是。", "你呢？", "好"]
    assert [text[start:end] for start, end in sentences(text)] == expected


def test_units_hold_a_token() -> None:
    tokens = [Span("a", 0, 2), Span("a", 2, 4), Span("a", 8, 8), Span("b", 5, 6), Span("a", 0, 2)]
    assert units("a", "abcd efg", By.WORD, tokens) == [Span("a", 0, 4)]
    assert units("a", "abcd efg", By.TOKEN, tokens) == [Span("a", 0, 2), Span("a", 2, 4)]
    assert units("b", "abcd efg", By.SENTENCE, tokens) == [Span("b", 0, 8)]


def test_many_words_are_found_among_many_tokens() -> None:
    """A unit is not compared with every token: 60,000 words took more than a minute."""
    text = "ab " * 60_000
    tokens = [Span("a", start, start + 1) for word in range(60_000) for start in (3 * word, 3 * word + 1)]
    began = time.process_time()
    found = units("a", text, By.WORD, tokens)
    places = Places([None, *tokens])
    assert [places.of(unit) for unit in found] == [[2 * word + 1, 2 * word + 2] for word in range(60_000)]
    assert time.process_time() - began < 20


def test_places_of_tokens_that_share_characters() -> None:
    """As bytes of one character do, and pieces with a space in front."""
    places = Places([Span("a", 0, 5), None, Span("a", 2, 3), Span("a", 2, 3), Span("b", 2, 3), Span("a", 6, 6)])
    assert places.of(Span("a", 2, 3)) == [0, 2, 3]
    assert places.of(Span("a", 4, 9)) == [0]
    assert places.of(Span("a", 3, 4)) == [0]
    assert places.of(Span("a", 5, 9)) == []
    assert places.of(Span("b", 0, 9)) == [4]
    assert places.of(Span("c", 0, 9)) == []


WORDS = ["-", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "q", ":", "[PAD]"]
WEIGHTS = np.array([9.0, 0, 0, 0, 0, 1, 2, 4, 8, 0.5, 9], np.float32)
PAD = WORDS.index("[PAD]")


def repository(folder: Path, name: str, *, masks: bool, special: bool = True, **roles: Any) -> Path:
    """The stages of a model whose vocabulary is a handful of words."""
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.enable_padding(pad_id=PAD, pad_token="[PAD]")
    first, last = (folder / f"{name}_{stage}/1" for stage in ("tokenizer", "postprocess"))
    for path in (first, last):
        path.mkdir(parents=True)
        tokenizer.save(str(path / TOKENIZER))
        TokenRoles(unk_token_id=1, cls_token_id=2, mask_token_id=4 if masks else None, **roles).save(path)
    return folder


def stages(folder: Path, task: str, graph: Any, names: tuple[str, ...], **limits: Any) -> EncoderStages:
    table = {"task": task, "source": {"path": "."}, "variants": ["fp32"], "limits": {"threads": 1, **limits}}
    LabelSettings(names, Activation.NONE).save(folder / "m_postprocess/1")
    return stages_of.stages(models_file.parse("m", table), folder, graph)


def of_encoder(made: EncoderStages, text: str, by: By = By.WORD, **options: Any) -> list[Explanation]:
    return asking.of_encoder(made, "m", text, Options(by=by, **options))


def bag(inputs: Tensors) -> Tensors:
    """A graph that adds up the weights of a text's tokens; the second class is its number of tokens."""
    real = inputs["attention_mask"] > 0
    assert (real == (inputs["input_ids"] != PAD)).all()  # by which a decoder's class finds the last token
    return {"logits": np.stack([(WEIGHTS[inputs["input_ids"]] * real).sum(1), real.sum(1)], 1).astype(np.float32)}


def by_token(inputs: Tensors) -> Tensors:
    """A graph that marks `b`, more so behind `c`."""
    ids = inputs["input_ids"]
    behind = np.pad(ids, ((0, 0), (1, 0)))[:, :-1] == 7
    marked = np.where(ids == 6, 1.0 + 2.0 * behind, -4.0)
    return {"logits": np.stack([np.zeros_like(marked), marked], -1).astype(np.float32)}


def drops(found: Explanation) -> list[tuple[str, float]]:
    return [(each.text, round(each.value, 5)) for each in found.attributions]


@pytest.mark.parametrize("masks", [True, False])
def test_words_are_masked_or_removed(tmp_path: Path, masks: bool) -> None:
    """In batches of two, whose rows have other lengths where words are removed."""
    folder = repository(tmp_path, "m", masks=masks)
    made = stages(folder, "text-classification", bag, ("sum", "length"), labels=2, max_tokens=8, max_batch_size=2)
    (found,) = of_encoder(made, "A  c b a")
    assert (found.of, found.score, found.hidden) == ("sum", 8, "masked" if masks else "removed")
    assert drops(found) == [("A", 1), ("c", 4), ("b", 2), ("a", 1)]
    (found,) = of_encoder(made, "a c", label="length")
    assert drops(found) == [("a", 0 if masks else 1), ("c", 0 if masks else 1)]
    (found,) = of_encoder(made, "a c", By.SENTENCE, text_pair="b")
    assert [(each.part, each.value) for each in found.attributions] == [("text_input", 5), ("text_pair", 2)]
    with pytest.raises(InvalidRequest, match=r"text_input has 10 tokens, the model takes 8"):
        made.read({"text_input": "a b a b a b a b"})


def test_a_text_that_is_cut_is_explained_as_far_as_it_is_read(tmp_path: Path) -> None:
    folder = repository(tmp_path, "m", masks=True)
    limits: dict[str, Any] = {"labels": 2, "max_tokens": 6, "truncate": True}
    made = stages(folder, "text-classification", bag, ("sum", "length"), **limits)
    (found,) = of_encoder(made, "a b c a b c")
    assert drops(found) == [("a", 1), ("b", 2), ("c", 4), ("a", 1)]


def test_entities_of_a_long_text(tmp_path: Path) -> None:
    """Windows of eight tokens overlap by two; `c` before `b` counts, whichever window shows it."""
    folder = repository(tmp_path, "m", masks=True)
    made = stages(folder, "token-classification", by_token, ("O", "B-X"), labels=2, max_tokens=8, buckets=[8])
    text = "a c b a a a b a a a a c b a"
    found = of_encoder(made, text)
    assert [each.of for each in found] == ["X: b"] * 3
    strong, weak, outside = (1 / (1 + np.exp(-each)) for each in (3.0, 1.0, -4.0))
    assert [each.score for each in found] == pytest.approx([strong, weak, strong])
    for at, each in zip((2, 6, 12), found, strict=True):
        expected = np.zeros(14)
        expected[at] = each.score - outside
        if at != 6:
            expected[at - 1] = strong - weak
        np.testing.assert_allclose([unit.value for unit in each.attributions], expected, atol=1e-6)
    assert of_encoder(made, "a a") == []
    with pytest.raises(InvalidRequest, match="there is no class 'Y'; the model has O, X"):
        of_encoder(made, text, label="Y")


def test_an_entity_that_is_removed_has_no_class(tmp_path: Path) -> None:
    folder = repository(tmp_path, "m", masks=False)
    made = stages(folder, "token-classification", by_token, ("O", "B-X"), labels=2, max_tokens=8, buckets=[8])
    (found,) = of_encoder(made, "a c b")
    strong, weak = (1 / (1 + np.exp(-each)) for each in (3.0, 1.0))
    assert [each.value for each in found.attributions] == pytest.approx([0, strong - weak, strong])


def test_prompts_and_templates_of_rankers_are_never_hidden(tmp_path: Path) -> None:
    prompted = repository(tmp_path / "one", "m", masks=True, prompts={"query": "q: "}, default_prompt="query")
    limits: dict[str, Any] = {"labels": 1, "max_tokens": 16}
    (found,) = of_encoder(stages(prompted, "text-ranking", bag, ("s",), **limits), "a c", query="b")
    assert found.score == 8 + 0.5 + 2 + 1 + 4
    assert drops(found) == [("b", 2), ("a", 1), ("c", 4)]
    templated = repository(tmp_path / "two", "m", masks=False, special=False)
    RankingTemplates({"": ("q: ", " q ", " a")}).save(templated / "m_tokenizer/1")
    (found,) = of_encoder(stages(templated, "text-ranking", bag, ("s",), **limits), "a c", By.TOKEN, query="b")
    assert found.score == 8 + 0.5 + 2 + 8 + 1 + 4 + 1
    assert [(each.part, each.text, each.value) for each in found.attributions] == [
        ("query", "b", 2),
        ("text_input", "a", 1),
        ("text_input", "c", 4),
    ]


def follows(inputs: Tensors) -> Tensors:
    """A graph of natural language inference: the words of the sentence follow as often as the text has them."""
    parts = inputs["token_type_ids"]
    said = np.where(parts == 0, inputs["input_ids"], -1)
    rows = [
        sum((text == token).sum() for token in sentence[(kinds == 1) & (sentence >= 5)])
        for text, sentence, kinds in zip(said, inputs["input_ids"], parts, strict=True)
    ]
    return {"logits": np.array([[0, 0, row] for row in rows], np.float32)}


def test_labels_of_a_request(tmp_path: Path) -> None:
    """Each word counts for the label whose sentence has it, and the sentence itself is never hidden."""
    folder = repository(tmp_path, "m", masks=True)
    InferenceSettings(entailment=2, contradiction=0).save(folder / "m_postprocess/1")
    made = stages(folder, "zero-shot-classification", follows, (), labels=3, max_tokens=16)
    asked: dict[str, Any] = {"candidate_labels": ("a", "c"), "hypothesis_template": "q {}"}

    def share(ours: float, other: float) -> float:
        return float(np.exp(ours) / (np.exp(ours) + np.exp(other)))

    (found,) = of_encoder(made, "a b c c", **asked)
    assert (found.of, found.score) == ("c", pytest.approx(share(2, 1)))
    expected = [("a", share(2, 1) - share(2, 0)), ("b", 0), *[("c", share(2, 1) - share(1, 1))] * 2]
    assert drops(found) == [(text, pytest.approx(value, abs=1e-4)) for text, value in expected]
    (found,) = of_encoder(made, "a b c c", label="a", multi_label=True, **asked)
    assert found.score == pytest.approx(share(1, 0))
    assert drops(found)[0] == ("a", pytest.approx(share(1, 0) - share(0, 0), abs=1e-4))
    assert drops(found)[1:] == [("b", 0), ("c", 0), ("c", 0)]
    with pytest.raises(InvalidRequest, match="there is no class 'b'; the model has a, c"):
        of_encoder(made, "a", label="b", **asked)
    with pytest.raises(InvalidRequest, match="text_input makes 8 texts without one of its parts, the limit is 7"):
        asking.of_encoder(made, "m", "a b c c", Options(**asked), most=7)


def neighbours(inputs: Tensors) -> Tensors:
    """A masked language model that gives `b` at a mask, more so beside a `c`, and never `q`."""
    ids = inputs["input_ids"]
    beside = np.pad(ids, ((0, 0), (1, 1)))
    near = ((beside[:, :-2] == 7) | (beside[:, 2:] == 7)).astype(np.float32)
    tops = np.broadcast_to(np.array([6, 5, 7], np.int64), (*ids.shape, 3)).copy()
    scores = np.stack([2 * near, np.zeros_like(near), np.full_like(near, -1)], -1)
    return {"top_ids": tops, "top_scores": scores, "log_normalizer": np.log(np.exp(scores).sum(-1))}


def test_masked_texts(tmp_path: Path) -> None:
    """Each mask is a statement; the mask itself is no word, and a token beyond the likeliest counts as their last."""
    folder = repository(tmp_path, "m", masks=True)
    made = stages(folder, "fill-mask", neighbours, (), max_tokens=16, top_k=3)
    first, second = of_encoder(made, "a c [MASK] a [MASK]")
    surely, hardly = (float(np.exp(x) / (np.exp(x) + 1 + np.exp(-1))) for x in (2.0, 0.0))
    assert (first.of, first.score, second.score) == ("b", pytest.approx(surely), pytest.approx(hardly))
    assert drops(first) == [("a", 0), ("c", pytest.approx(surely - hardly, abs=1e-4)), ("a", 0)]
    assert [value for _, value in drops(second)] == [0, 0, 0]
    named, _ = of_encoder(made, "a c [MASK] a [MASK]", label="q")
    lowest = float(np.exp(-1) / (np.exp(2) + 1 + np.exp(-1)))
    assert (named.of, named.score) == ("q", pytest.approx(lowest))
    with pytest.raises(InvalidRequest, match="label must be one token of the model, 'a b' is 2"):
        of_encoder(made, "[MASK]", label="a b")
    with pytest.raises(InvalidRequest, match=r"text_input has no gap to fill"):
        of_encoder(made, "a b")


def test_nothing_may_be_left(tmp_path: Path) -> None:
    folder = repository(tmp_path, "m", masks=False, special=False)
    made = stages(folder, "text-classification", bag, ("sum", "length"), labels=2, max_tokens=8)
    with pytest.raises(InvalidRequest, match="nothing is left of the text: explain it by smaller ones"):
        of_encoder(made, "a b", By.SENTENCE)


def server(prompt: Any, **options: Any) -> generators.Answered:
    """A generator: each byte is a token, and each token's log-probability is less for every `a` before it."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        prompt = f"<u>{prompt[0]['content'].strip()}</u>"
    ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return generators.Answered(
        text="!",
        token_ids=tuple(b"!"),
        prompt_token_ids=tuple(ids),
        prompt_tokens=tuple(bytes([token]) for token in ids),
        prompt_log_probs=tuple(-1.0 - ids[:at].count(ord("a")) for at in range(1, len(ids))),
    )


def test_a_prompt() -> None:
    """Characters of several tokens, a template around the text, and an answer that is given or not."""
    found = generators.explain(server, "m", "aa é a", by=By.WORD)
    assert (found.of, found.score) == ("!", -4)
    assert drops(found) == [("aa", -2), ("é", 0), ("a", -1)]
    found = generators.explain(server, "m", " é aa ", by=By.WORD, chat=True, answer="xy")
    assert (found.of, found.score) == ("xy", -6)
    assert [(each.text, each.value, each.start) for each in found.attributions] == [("é", 0, 1), ("aa", -4, 3)]
    found = generators.explain(server, "m", "a<", by=By.TOKEN, answer="é")
    assert found.score == -4
    assert drops(found) == [("a", -2), ("<", 0)]
    with pytest.raises(InvalidRequest, match="nothing is left of the prompt"):
        generators.explain(server, "m", "aa", by=By.WORD)
    with pytest.raises(InvalidRequest, match="the text is not in the prompt as it is written"):
        generators.explain(server, "m", " ", by=By.WORD)
    with pytest.raises(InvalidRequest, match="text_input makes 3 texts without one of its parts, the limit is 2"):
        generators.explain(server, "m", "aa é a", by=By.WORD, most=2)


@pytest.mark.parametrize(
    ("task", "limits", "options", "message"),
    [
        ("feature-extraction", {"dimensions": 2}, {}, "feature-extraction models have no explanation; those of text-"),
        ("text-ranking", {"labels": 1}, {}, "text-ranking needs --query"),
        ("zero-shot-classification", {}, {"label": "a"}, "zero-shot-classification needs --candidate"),
        ("fill-mask", {}, {"hypothesis_template": "{}"}, "--template is not for fill-mask"),
        ("text-ranking", {"labels": 1}, {"query": "a", "chat": True}, "--chat is not for text-ranking"),
        ("text-classification", {"labels": 2}, {"answer": "a"}, "--answer is not for text-classification"),
        ("text-classification", {"labels": 2}, {"text_pair": "\udcff"}, "a text is not UTF-8, at character 0"),
        ("text-generation", {"context": 64}, {"max_tokens": -1}, "--max-tokens must be 1 or more, found -1"),
    ],
)
def test_what_is_refused(task: str, limits: dict[str, Any], options: dict[str, Any], message: str) -> None:
    table = {"task": task, "source": {"path": "."}, "variants": ["fp32"], "limits": limits}
    with pytest.raises(UsageError, match=message):
        command.check(models_file.parse("m", table), ["a text"], Options(**options))


def explanation(text: str, *values: tuple[int, int, float]) -> Explanation:
    attributions = tuple(Attribution(text[a:b], "text_input", a, b, value) for a, b, value in values)
    of = "<b>yes</b>"
    return Explanation("m", "task", of, 0.5, "probability", "word", "masked", {"text_input": text}, attributions)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_a_page_is_text_whatever_the_text_is() -> None:
    text = "<script>x</script> <img src=x onerror='go()'> \"quoted\" </mark></div> & a"
    page = Page()
    page.feed(report.as_html([explanation(text, (0, 8, 0.2), (19, 45, -0.4), (len(text) - 1, len(text), 0.0))]))
    assert text in "".join(page.shown)
    assert "<b>yes</b>" in page.shown
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "b", "a"}
    marks = [attributes for tag, attributes in page.tags if tag == "mark"]
    assert marks == [
        {"class": "for", "style": "--share: 0.425", "title": "+0.2"},
        {"class": "against", "style": "--share: 0.850", "title": "-0.4"},
        {"class": "for", "style": "--share: 0.000", "title": "+0"},
    ]
    for _, attributes in page.tags:
        assert not {"src", "href", "onerror", "onclick"} & set(attributes)
    (policy,) = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_marks_that_share_a_character_and_pages_of_nothing() -> None:
    page = Page()
    page.feed(report.as_html([explanation("abc", (0, 2, 1.0), (1, 3, 0.5), (1, 2, 0.2)), explanation("d")]))
    assert [tag for tag, _ in page.tags].count("mark") == 2
    assert "abc" in "".join(page.shown)
    assert report.as_html([]).count("<h2>") == 0


def test_a_table_and_json() -> None:
    text = "\x1b[31mred\x07 two\u202e " + "x" * 80
    found = explanation(text, (0, 8, 0.25), (10, 14, -0.5), (15, 95, 0.0))
    lines = report.as_table([found]).splitlines()
    assert lines[0] == "m: <b>yes</b> (probability 0.5)"
    assert lines[1].startswith("   [31mred  two  xxx")
    assert [line.split()[0] for line in lines[3:]] == ["-0.5", "+0.25", "+0"]
    assert "\x1b" not in "".join(lines)
    assert "\u202e" not in "".join(lines)
    assert lines[5].endswith("x…")
    many = explanation("a b " * 20, *((at, at + 1, float(at)) for at in range(20)))
    assert report.as_table([many]).splitlines()[-1] == "  ... and 10 more; --json and --html show all"
    (read,) = json.loads(report.as_json([found]))
    assert read["attributions"][1] == {
        "text": "two\u202e"[:4],
        "part": "text_input",
        "start": 10,
        "end": 14,
        "value": -0.5,
    }


def test_a_unit_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "m", "a text", "--by", "letter"])
    assert "invalid choice: 'letter' (choose from 'word', 'sentence', 'token')" in capsys.readouterr().err
