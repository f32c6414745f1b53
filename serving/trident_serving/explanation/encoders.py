"""Hides units of a text from the graph of an encoder task, wherever that runs.

The tokenizer stage and the postprocess stage are those of the model, and the graph is the variant that serves. A
unit's tokens are replaced by the mask token. Where the tokenizer has none, they are removed.
Reference: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks (occlusion); Li, Monroe and Jurafsky,
Understanding Neural Networks through Representation Erasure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.ranking import RankingTemplates
from trident_serving.encoders.task import EncoderTask, Tensor
from trident_serving.encoders.tokens import TokenRoles, load_tokenizer
from trident_serving.encoders.zero_shot import DEFAULT_TEMPLATE, hypothesis
from trident_serving.errors import InvalidRequest
from trident_serving.explanation.units import Places, Span
from trident_serving.schema.limits import AnswerLimits, EncoderLimits
from trident_serving.text import encode_texts

Tensors = dict[str, NDArray[Any]]
# From a batch of the graph's inputs to its outputs.
Graph = Callable[[Tensors], Tensors]
_NOTHING: Mapping[str, Any] = {}
# The tokens of a window, and the characters that each stands for.
_Window = tuple[list[int], list[Span | None]]


@dataclass(frozen=True)
class Reading:
    """What the graph is given of a request.

    Attributes:
        texts: of the request, by name, whose units may be hidden.
        request: its tensors.
        stage: the tensors of the tokenizer stage.
        tokens: of each window, the characters that a token stands for; None for special tokens, prompts and templates.
    """

    texts: Mapping[str, str]
    request: Tensors
    stage: Mapping[str, NDArray[Any]]
    tokens: Sequence[Sequence[Span | None]]

    @cached_property
    def places(self) -> list[Places]:
        """The tokens of each window by their characters."""
        return [Places(window) for window in self.tokens]


class _Row(NamedTuple):
    """A window without a unit: its tokens, and where each was."""

    unit: int
    window: int
    inputs: Tensors
    kept: NDArray[np.intp]


class EncoderStages:
    """A variant of an encoder task as it is served.

    Args:
        name: the model's, for messages.
        first: the version folder of its tokenizer stage.
        last: of its postprocess stage.
        graph: runs the variant's graph.

    Raises:
        InvalidRequest: the methods raise it where a text can't be read as asked.
    """

    def __init__(
        self, name: str, task: EncoderTask, limits: EncoderLimits, first: Path, last: Path, graph: Graph
    ) -> None:
        self._name, self.task, self._limits, self._graph = name, task, limits, graph
        self._folder, self.answers_folder = first, last
        self._preprocess = task.preprocess(first, _parameters(limits, task.parameters))
        self._postprocess = task.postprocess(last, _parameters(limits, task.answer_parameters))
        self.tokenizer = load_tokenizer(self._folder)
        self._pad_id = int((self.tokenizer.padding or {}).get("pad_id", 0))
        self.tokenizer.no_padding()
        self._roles = TokenRoles.load(self._folder)

    @property
    def masks(self) -> bool:
        """Whether units are masked, not removed."""
        return self.mask_token_id is not None

    @property
    def mask_token_id(self) -> int | None:
        """The token that hides others; None: the tokenizer has none."""
        return self._roles.mask_token_id

    def read(self, texts: Mapping[str, str], asked: Mapping[str, Any] = _NOTHING) -> Reading:
        """What the tokenizer stage makes of texts, and which characters each token stands for.

        Args:
            asked: what else the request holds.
        """
        request = self._request({**{name: [text] for name, text in texts.items()}, **asked})
        of_answer = {tensor.name for tensor in self.task.answer_options}
        stage = self._preprocess({name: array for name, array in request.items() if name not in of_answer})
        windows = self._windows(texts, asked)
        for (ids, _), row, mask in zip(windows, stage["input_ids"], stage["attention_mask"], strict=True):
            if ids != row[mask > 0].tolist():
                raise InvalidRequest(f"{self._name} reads only a part of the text: shorten it")
        return Reading(texts, request, stage, [tokens for _, tokens in windows])

    def outputs(self, reading: Reading) -> Tensors:
        """What the graph gives for the whole texts, a row for each window."""
        return self._graph({tensor.name: reading.stage[tensor.name] for tensor in self.task.model_inputs})

    def answer(self, reading: Reading, outputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """What the postprocess stage makes of the graph's outputs."""
        known = {**reading.request, **reading.stage, **outputs}
        read = (*self.task.read, *(tensor.name for tensor in self.task.answer_options))
        return dict(self._postprocess({name: known[name] for name in read if name in known}))

    def runs(self, reading: Reading, units: Sequence[Span]) -> int:
        """How many texts the graph reads for `without`."""
        return sum(bool(window.of(unit)) for unit in units for window in reading.places)

    def without(self, reading: Reading, units: Sequence[Span], whole: Tensors) -> Iterator[Tensors]:
        """The graph's outputs without each of the units.

        Outputs of tokens have those of the whole text's places; NaN stands for a token that was removed.

        Args:
            units: each holds a token.
            whole: `outputs` of the reading.
        """
        begun: dict[int, Tensors] = {}  # rows come unit by unit
        given_back = 0
        rows = self._rows(reading, units)
        while batch := list(islice(rows, self._limits.max_batch_size)):
            width = max(row.inputs["input_ids"].size for row in batch)
            given = self._graph(
                {
                    tensor.name: np.stack([self._padded(tensor.name, row.inputs[tensor.name], width) for row in batch])
                    for tensor in self.task.model_inputs
                }
            )
            for tensor in self.task.model_outputs:
                for row, array in zip(batch, given[tensor.name], strict=True):
                    if row.unit not in begun:
                        begun[row.unit] = {name: each.copy() for name, each in whole.items()}
                    place = begun[row.unit][tensor.name]
                    if tensor.shape[0] == -1:  # of tokens
                        place[row.window] = np.nan if place.dtype.kind == "f" else -1
                        place[row.window, row.kept] = array[: row.kept.size]
                    else:
                        place[row.window] = array
            while given_back < batch[-1].unit:
                yield begun.pop(given_back)
                given_back += 1
        yield from begun.values()

    def _rows(self, reading: Reading, units: Sequence[Span]) -> Iterator[_Row]:
        for unit, span in enumerate(units):
            for window, tokens in enumerate(reading.tokens):
                if not (found := reading.places[window].of(span)):
                    continue
                hidden = np.zeros(len(tokens), np.bool_)
                hidden[found] = True
                inputs = {
                    tensor.name: reading.stage[tensor.name][window, : len(tokens)] for tensor in self.task.model_inputs
                }
                if self._roles.mask_token_id is not None:
                    inputs["input_ids"] = np.where(hidden, self._roles.mask_token_id, inputs["input_ids"])
                    yield _Row(unit, window, inputs, np.arange(len(tokens)))
                    continue
                kept = np.flatnonzero(~hidden)
                if not kept.size:
                    raise InvalidRequest(
                        "without one of its parts nothing is left of the text: explain it by smaller ones"
                    )
                yield _Row(unit, window, {name: array[kept] for name, array in inputs.items()}, kept)

    def _padded(self, name: str, row: NDArray[Any], width: int) -> NDArray[Any]:
        value = self._pad_id if name == "input_ids" else 0
        return np.pad(row, (0, width - row.size), constant_values=value)

    def _request(self, given: Mapping[str, Any]) -> Tensors:
        known: dict[str, Tensor] = {
            tensor.name: tensor for tensor in (*self.task.texts, *self.task.options, *self.task.answer_options)
        }
        found: Tensors = {}
        for name, value in given.items():
            array = np.array([value]) if isinstance(value, bool) else encode_texts(value)
            ones = (1,) * (len(known[name].shape) - 1 + self.task.batched)
            found[name] = array.reshape((*ones, array.size))
        return found

    def _windows(self, texts: Mapping[str, str], asked: Mapping[str, Any]) -> list[_Window]:
        limits, tokenizer, names = self._limits, self.tokenizer, list(texts)
        text, pair = [*texts.values(), None][:2]
        assert text is not None
        starts = dict.fromkeys(names, 0)
        pairs: list[str | None] = [pair]
        if self.task.name == "zero-shot-classification":
            (template,) = asked.get("hypothesis_template", (DEFAULT_TEMPLATE,))
            pairs = [hypothesis(template, label) for label in asked["candidate_labels"]]
        if self.task.name == "text-ranking":
            default = self._roles.default_prompt
            prompt = "" if default is None else self._roles.prompts[default]
            if (templates := RankingTemplates.load(self._folder)) is not None:
                return [self._templated(texts, templates.parts[prompt])]
            text, starts["query"] = prompt + text, len(prompt)
        found = [tokenizer.encode(text, each) for each in pairs]
        if any(len(each.ids) > limits.max_tokens for each in found):
            stride, strategy = 0, "only_first" if self.task.name == "zero-shot-classification" else "longest_first"
            if self.task.name == "token-classification":
                stride = 0 if limits.truncate else limits.max_tokens // 4
            elif isinstance(limits, AnswerLimits):
                stride, strategy = limits.stride, "only_second"
            tokenizer.enable_truncation(limits.max_tokens, stride=stride, strategy=strategy)
            cut = [tokenizer.encode(text, each) for each in pairs]
            tokenizer.no_truncation()
            found = [part for each in cut for part in (each, *(each.overflowing if stride else ()))]
        gap = self._roles.mask_token_id if self.task.name == "fill-mask" else None

        def span(token: int, sequence: int | None, start: int, end: int) -> Span | None:
            if sequence is None or sequence >= len(names) or token == gap:
                return None
            name = names[sequence]
            start, end = max(start - starts[name], 0), end - starts[name]
            return Span(name, start, end) if start < end else None

        return [
            (
                encoding.ids,
                [
                    span(token, sequence, *offsets)
                    for token, sequence, offsets in zip(
                        encoding.ids, encoding.sequence_ids, encoding.offsets, strict=True
                    )
                ],
            )
            for encoding in found
        ]

    def _templated(self, texts: Mapping[str, str], parts: Sequence[str]) -> _Window:
        """The window of a decoder that reads query and passage within a text."""
        before, between, after = parts
        query, passage = texts["query"], texts["text_input"]
        encoding = self.tokenizer.encode(before + query + between + passage + after, add_special_tokens=False)
        begins = {"query": len(before), "text_input": len(before + query + between)}

        def span(left: int, right: int) -> Span | None:
            for name, start in begins.items():
                if left < start + len(texts[name]) and start < right:
                    return Span(name, max(left - start, 0), min(right - start, len(texts[name])))
            return None

        return encoding.ids, [span(*offsets) for offsets in encoding.offsets]


def _parameters(limits: EncoderLimits, names: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a stage, as texts, from the limits that they come from."""
    values = {name: getattr(limits, limit) for name, limit in names.items()}
    return {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        for name, value in values.items()
    }
