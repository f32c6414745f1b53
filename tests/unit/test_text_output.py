"""Detokenizer, stop strings and the text side of a request, on real tokenizers and without a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import tiny_models
from trident_export import corpora
from trident_serving.errors import Overloaded
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stopping import StopStrings
from trident_serving.generation.stream import Chunk, TextStream
from trident_serving.runtime.detokenizer import Detokenizer
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.tokenizer import TextTokenizer

BYTE_LEVEL = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)


def sentencepiece_like() -> TextTokenizer:
    """Metaspace and byte fallback, as Llama 2 and Mistral have them."""
    words = ["▁", "▁the", "▁cat", "s", "a", "t", "c", "▁on", "e", "h", "o", "n"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {word: 257 + row for row, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TextTokenizer(tokenizer)


SENTENCEPIECE = sentencepiece_like()


def unigram() -> TextTokenizer:
    """SentencePiece's other model, as T5 and XLM-R have it, trained on the gate's texts."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*corpora.held_out(), *SCRIPTS], trainer)
    return TextTokenizer(tokenizer)


SCRIPTS = [
    "😀🚀 👩‍👩‍👧‍👦 🇫🇷",
    "中文，日本語、한국어",
    "مرحبا بالعالم العربي",
    "e\u0301a\u0308 n\u0303 ก็",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # …\n",
]
TOKENIZERS = {"byte-level BPE": BYTE_LEVEL, "SentencePiece BPE": SENTENCEPIECE, "SentencePiece Unigram": unigram()}
TEXTS = st.lists(st.one_of(st.sampled_from(SCRIPTS), st.text(max_size=12)), max_size=5).map(" ".join)


def streamed(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(st.text(max_size=60))
def test_chunks_joined_equal_the_text(text: str) -> None:
    chunks = streamed(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(chunks) == text
    assert not any("\ufffd" in chunk for chunk in chunks) or "\ufffd" in text


@pytest.mark.parametrize(
    "text", ["😀🚀🐍", "中文，日本語", "مرحبا", "e\u0301a\u0308", "a\0b\r\n\t", "👩‍👩‍👧‍👦 x", "▁x▁"]
)
def test_characters_are_never_cut(text: str) -> None:
    chunks = streamed(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(chunks) == text
    assert all("\ufffd" not in chunk for chunk in chunks)
    assert len(BYTE_LEVEL.encode(text)) > 1


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, answer=TEXTS)
def test_an_answer_goes_on_from_its_prompt(name: str, prompt: str, answer: str) -> None:
    """What transformers' pipeline shows: the decoding of both at once, behind that of the prompt."""
    tokenizer = TOKENIZERS[name]
    before, ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    known, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    detokenizer = Detokenizer(tokenizer, before)
    found = "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])
    assert found == whole[len(known) :] or "\ufffd" in whole


@pytest.mark.parametrize("special", [0, 3, 9])
def test_the_first_space_is_kept(special: int) -> None:
    """Also behind special tokens, which have no text, as they end the prompt of a chat template."""
    raw = sentencepiece_like()._tokenizer
    raw.add_special_tokens(["<s>", "<end>"])
    tokenizer, marks = TextTokenizer(raw), [raw.token_to_id("<s>"), raw.token_to_id("<end>")]
    prompt = [marks[0], *tokenizer.encode("the cat"), *[marks[1]] * special]
    detokenizer = Detokenizer(tokenizer, prompt)
    texts = [detokenizer.push(token) for token in tokenizer.encode("on the cat")]
    assert "".join(texts) == " on the cat"
    assert texts[0] == "" or texts[0].startswith(" ")
    alone = Detokenizer(tokenizer)
    assert "".join(alone.push(token) for token in tokenizer.encode("on the cat")) == "on the cat"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_word_may_begin_with_the_first_space(streaming: bool) -> None:
    channel = Collected()
    ids = SENTENCEPIECE.encode("the cat")
    request = GenerationRequest(
        "the", tuple(ids), SamplingParams(max_tokens=9), stop_words=(" on the",), stream=streaming
    )
    stream = TextStream(request, SENTENCEPIECE, frozenset([-1]), channel, lambda _: None)
    assert any(stream.accept(token, None) for token in SENTENCEPIECE.encode("on the cat"))
    stream.finish(FinishReason.STOP)
    assert stream.send_pending()
    assert "".join(chunk.text for chunk in channel.chunks) == ""
    assert channel.chunks[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=TEXTS,
    words=st.lists(st.sampled_from(["中", "b", "العا", "\u0308 n", "return", "🚀 "]), max_size=2),
    data=st.data(),
)
def test_chunks_joined_equal_the_answer_in_one_chunk(
    name: str, text: str, words: list[str], data: st.DataObject
) -> None:
    """Whenever the sender looks, streams have the text of the unary answer, and never a part of a stop word."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    answers = []
    for streaming in (False, True):
        channel = Collected()
        request = GenerationRequest("p", (1,), SamplingParams(max_tokens=9), stop_words=tuple(words), stream=streaming)
        stream = TextStream(request, tokenizer, frozenset([-1]), channel, lambda _: None)
        for token in ids:
            if stream.accept(token, None):
                break
            if streaming and data.draw(st.booleans()):
                stream.send_pending()
        stream.finish(FinishReason.LENGTH)
        assert stream.send_pending()
        answers.append(("".join(chunk.text for chunk in channel.chunks), channel.chunks[-1].finish_reason))
    assert answers[0] == answers[1]
    whole = tokenizer.decode([1, *ids])[len(tokenizer.decode([1])) :]
    if not any(word in whole for word in words):
        # That decoder spoils the whole run of bytes around an invalid one, if it sees them at once.
        assert answers[0] == (whole, FinishReason.LENGTH) or "\ufffd" in whole
    else:
        assert whole.startswith(answers[0][0])
        assert not any(word in answers[0][0] for word in words)


@given(st.lists(st.integers(0, tiny_models.VOCABULARY - 1), max_size=40))
def test_any_byte_level_tokens(ids: list[int]) -> None:
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(st.text("the cat sat 中😀é ", max_size=40))
def test_sentencepiece_text(text: str) -> None:
    """Invalid bytes are left out: that decoder spoils the whole run of bytes around them, if it sees them at once."""
    ids = SENTENCEPIECE.encode(text)
    assert "".join(streamed(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


def test_a_stop_string_is_found_across_chunks_and_not_shown() -> None:
    stops = StopStrings(["STOP", "\n\n"])
    assert [stops.push(chunk) for chunk in ["a ST", "A", "ST", "O"]] == [
        ("a ", False),
        ("STA", False),
        ("", False),
        ("", False),
    ]
    assert stops.push("P and more") == ("", True)
    assert StopStrings(["STOP", "\n\n"]).push("x\n\ny STOP") == ("x", True)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    stops = StopStrings(["STOP"])
    assert stops.push("a STO") == ("a ", False)
    assert stops.flush() == "STO"
    assert stops.flush() == ""
    assert StopStrings([]).push("text") == ("text", False)
    assert StopStrings([""]).push("text") == ("text", False)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stopping_does_not_depend_on_the_chunks(text: str, words: list[str], data: st.DataObject) -> None:
    found = [text.find(word) for word in words if word in text]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    stops = StopStrings(words)
    shown, stopped = "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        chunk, stopped = stops.push(text[start:end])
        shown += chunk
        if stopped:
            break
    if not found:
        assert not stopped
        assert shown + stops.flush() == text
    else:
        assert stopped
        # Whichever stop string is complete first counts; nothing from it on is shown.
        assert any(text[: text.find(word)] == shown for word in words if word in text)


class Collected:
    """A response channel that keeps what it is sent."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None

    def send(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def fail(self, error: Exception) -> None:
        self.error = error

    def is_cancelled(self) -> bool:
        return False


def stream_of(channel: Collected, **options: object) -> tuple[TextStream, list[TextStream]]:
    request = GenerationRequest("prompt", (1, 2), SamplingParams(max_tokens=9), **options)  # type: ignore[arg-type]
    notified: list[TextStream] = []
    return TextStream(request, BYTE_LEVEL, frozenset([0]), channel, notified.append), notified


def test_tokens_that_wait_leave_together() -> None:
    channel = Collected()
    stream, notified = stream_of(channel, stream=True, return_log_probs=True)
    for token in BYTE_LEVEL.encode("two words"):
        assert not stream.accept(token, TokenLogProbs(-0.5))
    assert notified
    assert stream.send_pending() is False
    assert stream.send_pending() is False  # nothing is left
    assert [chunk.text for chunk in channel.chunks] == ["two words"]
    assert channel.chunks[0].log_probs == [TokenLogProbs(-0.5)] * channel.chunks[0].num_output_tokens
    stream.finish(FinishReason.LENGTH)
    assert stream.send_pending() is True
    assert (channel.chunks[-1].text, channel.chunks[-1].finish_reason) == ("", FinishReason.LENGTH)
    assert stream.send_pending() is False  # notifications that come late send nothing more
    assert len(channel.chunks) == 2


def test_without_streaming_there_is_one_response() -> None:
    channel = Collected()
    stream, notified = stream_of(channel, include_prompt=True)
    for token in BYTE_LEVEL.encode(" answer"):
        stream.accept(token, None)
    assert notified == []
    assert stream.send_pending() is False
    stream.accept(0, None)  # the end of sequence is counted and not shown
    stream.finish(FinishReason.STOP)
    assert stream.send_pending() is True
    assert [chunk.text for chunk in channel.chunks] == ["prompt answer"]
    assert channel.chunks[0].num_output_tokens == len(BYTE_LEVEL.encode(" answer")) + 1


def test_a_failure_is_the_last_response() -> None:
    channel = Collected()
    stream, _ = stream_of(channel, stream=True)
    stream.accept(5, None)
    stream.fail(Overloaded("no room"))
    assert stream.send_pending() is True
    assert isinstance(channel.error, Overloaded)
    assert channel.chunks == []
