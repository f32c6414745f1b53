"""Texts to padded batches for an encoder: what the tokenizer stages of all tasks share.

Batches are padded to one of a few lengths, the buckets, so that requests of similar length have the same
shape and Triton's dynamic batcher can join them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trident_serving.encoders.task import Stage, Tensors, flag
from trident_serving.errors import InvalidRequest, ReadingError
from trident_serving.schema import reading
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, knows_nothing, numbered

TOKENIZER = "tokenizer.json"
_ROLES = "encoding.json"


@dataclass(frozen=True)
class EncodingSettings:
    """The `parameters` of the tokenizer stage's config.pbtxt, which come from models.toml.

    Attributes:
        max_tokens: the longest input of the model, special tokens included.
        max_bytes: the longest text that is tokenized at all.
        buckets: lengths that batches are padded to, rising; the last is `max_tokens`.
        truncate: what happens to longer texts where the request does not say.
    """

    max_tokens: int
    max_bytes: int
    buckets: tuple[int, ...]
    truncate: bool

    def __post_init__(self) -> None:
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.max_tokens:
            raise ReadingError(f"buckets must rise to max_tokens ({self.max_tokens}), found {self.buckets}")


@dataclass(frozen=True)
class TokenRoles:
    """What tokenizer.json does not say of a model's tokens; `encoding.json`, which the export writes.

    Attributes:
        unk_token_id: stands for what the vocabulary lacks; None where nothing does.
        cls_token_id: begins a text; question answering reads "no answer" from it.
        mask_token_id: the gap that a masked language model fills.
        prompts: what goes before a text, by the name that a request gives ("query", "passage").
        default_prompt: the name that holds where a request gives none.
        counts_prompt: whether the tokens of a prompt are pooled.
        padded_to: tokens that every text is padded to and the model reads as a part of it, as SigLIP was trained; a
            longer text is cut. 0: padding is no part of a text.
    """

    unk_token_id: int | None = None
    cls_token_id: int | None = None
    mask_token_id: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    counts_prompt: bool = True
    padded_to: int = 0

    @classmethod
    def load(cls, folder: Path) -> TokenRoles:
        """Read `folder/encoding.json`."""
        return reading.load(cls, folder / _ROLES)

    def save(self, folder: Path) -> None:
        """Write `folder/encoding.json`."""
        reading.save(self, folder / _ROLES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder/tokenizer.json`."""
    return Tokenizer.from_file(str(folder / TOKENIZER))


class Batcher:
    """Encodings to padded tensors."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodingSettings, padded_to: int = 0) -> None:
        self._buckets = settings.buckets
        self._padded_to = padded_to
        padding = tokenizer.padding or {}
        self._pad_id = int(padding.get("pad_id", 0))
        self._pad_type_id = int(padding.get("pad_type_id", 0))

    def tensors(self, encodings: Sequence[Encoding]) -> dict[str, NDArray[Any]]:
        """`input_ids`, `attention_mask` and `token_type_ids`, int64 [texts, bucket], padded on the right.

        Raises:
            InvalidRequest: there is no text.
        """
        if not encodings:
            raise InvalidRequest("text_input is empty: it must hold one text or more")
        longest = max(len(encoding.ids) for encoding in encodings)
        shape = (len(encodings), self._padded_to or self._buckets[bisect_left(self._buckets, longest)])
        input_ids = np.full(shape, self._pad_id, np.int64)
        attention_mask = np.full(shape, int(self._padded_to > 0), np.int64)
        token_type_ids = np.full(shape, self._pad_type_id, np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            input_ids[row, :length] = encoding.ids
            attention_mask[row, :length] = 1
            token_type_ids[row, :length] = encoding.type_ids
        return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


class TextEncoder:
    """A model's tokenizer with its limits, for texts and for pairs of texts."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodingSettings, roles: TokenRoles | None = None) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._roles = roles or TokenRoles()
        self._batcher = Batcher(tokenizer, settings, self._roles.padded_to)
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def load(cls, folder: Path, settings: EncodingSettings) -> TextEncoder:
        """Read `tokenizer.json`, whose padding entry names the padding token, and `encoding.json`."""
        return cls(load_tokenizer(folder), settings, TokenRoles.load(folder))

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        names: Iterable[Sequence[str]] | None = None,
        truncate: bool | None = None,
        cut: str = "longest_first",
        special: bool = True,
    ) -> Tensors:
        """The model's inputs, padded on the right.

        Args:
            pairs: the second text of each, where the model reads two.
            names: what errors call each text, or both of a pair; None: `text_input` and `text_pair`.
            truncate: cut longer texts to `max_tokens`; None takes the model's setting.
            cut: which of a pair loses tokens, in the words of `tokenizers`; what can't be cut so is too long.
            special: whether the tokenizer adds the tokens that begin and end a text.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, int64 [texts, bucket].

        Raises:
            InvalidRequest: a text is longer than the model takes, or gives no token that the model knows.
        """
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings: list[Encoding] = self._tokenizer.encode_batch(inputs, add_special_tokens=special)
        always = self._settings.truncate or self._roles.padded_to > 0
        if always if truncate is None else truncate:
            encodings = [self._truncated(encoding, text, cut) for encoding, text in zip(encodings, inputs, strict=True)]
        names = names or zip(*(numbered(field, len(inputs)) for field in ("text_input", "text_pair")), strict=True)
        for encoding, text, called in zip(encodings, inputs, names, strict=True):
            self._check(encoding, text, called)
        return self._batcher.tensors(encodings)

    def windows(self, texts: Sequence[str], most: int, *, truncate: bool | None = None) -> Tensors:
        """The model's inputs for texts of any length, each read in windows that overlap by a quarter.

        Args:
            most: windows of all texts together.
            truncate: read the first window of each alone; None takes the model's setting.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, int64 [windows, bucket]; `token_spans`, int32 [windows,
            bucket, 2], a token's characters from start to end, -1 where it stands for none, and where another window
            shows more around the same token; `window_text`, int32 [windows], the text of each.

        Raises:
            InvalidRequest: a text gives no token that the model knows, or the windows are too many.
        """
        stride = self._limit // 4
        whole = self._tokenizer.encode_batch(list(texts))
        for encoding, text, name in zip(whole, texts, numbered("text_input", len(texts)), strict=True):
            self._check_content(encoding, text, (name,))
        windows: list[Encoding] = []
        owners: list[int] = []
        cuts: list[tuple[int, int]] = []  # tokens of each window that its neighbours show better
        self._tokenizer.enable_truncation(self._limit, stride=stride)
        try:
            for row, text in enumerate(texts):
                first = self._tokenizer.encode(text)
                alone = self._settings.truncate if truncate is None else truncate
                found = [first] if alone else [first, *first.overflowing]
                windows += found
                owners += [row] * len(found)
                last = len(found) - 1
                cuts += [(stride // 2 * (w > 0), (stride - stride // 2) * (w < last)) for w in range(len(found))]
        finally:
            self._tokenizer.no_truncation()
        if len(windows) > most:
            raise InvalidRequest(
                f"text_input takes {len(windows)} windows of {self._limit} tokens, the limit is {most}: shorten it, or "
                "send fewer texts at once"
            )
        tensors = self._batcher.tensors(windows)
        spans = _spans(windows, tensors["input_ids"].shape)
        for row, (before, behind) in enumerate(cuts):
            tokens = np.flatnonzero(spans[row, :, 0] >= 0)
            spans[row, tokens[:before]] = spans[row, tokens[len(tokens) - behind :]] = -1
        return tensors | {"token_spans": spans, "window_text": np.array(owners, np.int32)}

    def prompt(self, name: str | None) -> str:
        """What goes before a text: the model's prompt of that name, or its default one.

        Raises:
            InvalidRequest: the model has none of that name.
        """
        prompts = self._roles.prompts
        if name is None:
            return prompts[self._roles.default_prompt] if self._roles.default_prompt is not None else ""
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise InvalidRequest(f"prompt_name {name[:80]!r} is not known to this model; known: {known}")
        return prompts[name]

    def uncounted(self, prompt: str) -> int:
        """How many tokens at the beginning of a text are a prompt's that is left out of the pooling.

        Raises:
            InvalidRequest: nothing would be left.
        """
        if not prompt or self._roles.counts_prompt:
            return 0
        ids = self._tokenizer.encode(prompt).ids
        closing = self._tokenizer.get_added_tokens_decoder().get(ids[-1])
        length = len(ids) - (closing is not None and closing.special)
        if length >= self._settings.max_tokens:
            raise InvalidRequest(f"the prompt has {length} tokens, and the model takes {self._settings.max_tokens}")
        return length

    def without_end(self, text: str, start: int, end: int) -> str:
        """A text that fits, of whose part from `start` to `end` the last tokens are left out where it is too long.

        What can't be made to fit so is given back as long as it is. No special tokens are added.
        """
        while (beyond := len((found := self._tokenizer.encode(text, add_special_tokens=False)).ids) - self._limit) > 0:
            inside = [left for left, right in found.offsets if start <= left < right <= end]
            if len(inside) <= beyond:
                break
            text, end = text[: inside[-beyond]] + text[end:], inside[-beyond]
        return text

    @property
    def truncates(self) -> bool:
        """Whether texts are cut where a request does not say."""
        return self._settings.truncate

    @property
    def _limit(self) -> int:
        return self._settings.max_tokens

    def _check(self, encoding: Encoding, text: Any, names: Sequence[str]) -> None:
        texts = [text] if isinstance(text, str) else text
        limit = self._settings.max_tokens
        if len(encoding.ids) > limit:
            what, length = (names[0], f"has {len(encoding.ids)} tokens")
            if len(texts) > 1:
                what, length = f"{names[0]} and {names[1]}", f"have {len(encoding.ids)} tokens together"
            raise InvalidRequest(
                f"{what} {length}, the model takes {limit}: shorten it, or set truncate to use its beginning alone"
            )
        self._check_content(encoding, text, names)

    def _check_content(self, encoding: Encoding, text: Any, names: Sequence[str]) -> None:
        texts = [text] if isinstance(text, str) else text
        sequences = {sequence for sequence in encoding.sequence_ids if sequence is not None}
        for index, part in enumerate(texts):
            if index not in sequences:
                raise InvalidRequest(f"{names[index]} is empty: {part[:80]!r} holds no token")
        if knows_nothing(encoding, self._roles.unk_token_id):
            raise InvalidRequest(f"{names[0]} holds no token that the model's vocabulary knows")

    def _truncated(self, encoding: Encoding, text: Any, cut: str) -> Encoding:
        limit = self._settings.max_tokens
        beyond = len(encoding.ids) - limit
        if beyond <= 0 or (cut == "only_first" and encoding.sequence_ids.count(0) <= beyond):
            return encoding
        # Again, with the special tokens after the cut: the library's own truncation of a finished encoding
        # would cut the closing token off. Of a pair the longer text loses first, as in transformers.
        self._tokenizer.enable_truncation(limit, strategy=cut)
        try:
            return self._tokenizer.encode(*([text] if isinstance(text, str) else text))
        finally:
            self._tokenizer.no_truncation()


def read_texts(folder: Path, parameters: Mapping[str, str], *, prompts: bool = False) -> Stage:
    """The tokenizer stage of tasks that read `text_input`, with the options `text_pair`, `prompt_name` and `truncate`.

    Args:
        prompts: whether the model's default prompt goes before a text where a request names none. Tokens of a prompt
            that is left out of the pooling have a 2 in `attention_mask`.
    """
    settings = read_parameters(EncodingSettings, parameters)
    encoder = TextEncoder.load(folder, settings)

    def preprocess(tensors: Tensors) -> Tensors:
        texts = decode_texts(tensors["text_input"], "text_input", settings.max_bytes)
        pairs = None
        if "text_pair" in tensors:
            pairs = decode_texts(tensors["text_pair"], "text_pair", settings.max_bytes)
        prompt = encoder.prompt(prompt_name(tensors)) if prompts else ""
        uncounted = encoder.uncounted(prompt)
        texts = [prompt + text for text in texts]
        encoded = dict(encoder.encode(texts, pairs, truncate=flag(tensors, "truncate")))
        if uncounted:
            encoded["attention_mask"][:, :uncounted] *= 2
        return encoded

    return preprocess


def prompt_name(tensors: Tensors) -> str | None:
    """The prompt that a request names; None where it names none.

    Raises:
        InvalidRequest: it names several, or is empty.
    """
    if "prompt_name" not in tensors:
        return None
    names = set(decode_texts(tensors["prompt_name"], "prompt_name"))
    if len(names) != 1:
        raise InvalidRequest(f"prompt_name must be the same for all texts of a request, found {sorted(names)}")
    return names.pop()


def _spans(encodings: Sequence[Encoding], shape: tuple[int, ...]) -> NDArray[np.int32]:
    spans = np.full((*shape, 2), -1, np.int32)
    for row, encoding in enumerate(encodings):
        offsets = np.array(encoding.offsets, np.int32)
        offsets[np.array(encoding.special_tokens_mask, bool)] = -1
        spans[row, : len(offsets)] = offsets
    return spans
