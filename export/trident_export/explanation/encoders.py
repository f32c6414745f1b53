"""Hides units of a text from the graph of an encoder task, which runs here or on a server.

The tokenizer stage and the postprocess stage are those of the repository, and the graph is the variant that serves. A
unit's tokens are replaced by the mask token. Where the tokenizer has none, they are removed.
Reference: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks (occlusion); Li, Monroe and Jurafsky,
Understanding Neural Networks through Representation Erasure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trident_client import Client, TridentError
from trident_export import configs
from trident_export.errors import TextError
from trident_export.explanation.units import Span
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import VERSION
from trident_serving.encoders import TASKS
from trident_serving.encoders.ranking import RankingTemplates
from trident_serving.encoders.task import Tensor
from trident_serving.encoders.tokens import TokenRoles, load_tokenizer
from trident_serving.errors import InvalidRequest
from trident_serving.schema.limits import AnswerLimits
from trident_serving.text import encode_texts
from trident_serving.triton.adapter import parameters
from trident_serving.triton.onnx_backend import OnnxModel

Tensors = dict[str, NDArray[Any]]
# From a batch of the graph's inputs to its outputs.
Graph = Callable[[Tensors], Tensors]
# The tokens of a window, and the characters that each stands for.
_Window = tuple[list[int], list[Span | None]]
# Of a server's answer and ours: two machines sum float32 in another order, and int8 rounds that up.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Reading:
    """What the graph is given of a request.

    Attributes:
        texts: of the request, by name.
        stage: the tensors of the tokenizer stage.
        tokens: of each window, the characters that a token stands for; None for special tokens, prompts and templates.
    """

    texts: Mapping[str, str]
    stage: Mapping[str, NDArray[Any]]
    tokens: Sequence[Sequence[Span | None]]


class _Row(NamedTuple):
    """A window without a unit: its tokens, and where each was."""

    unit: int
    window: int
    inputs: Tensors
    kept: NDArray[np.intp]


class EncoderStages:
    """A variant of an encoder task as it is served.

    Args:
        repository: holds the version folders of its stages.
        graph: runs the variant's graph.

    Raises:
        TextError: the methods raise it where a text can't be read as asked.
    """

    def __init__(self, spec: ModelSpec, repository: Path, graph: Graph) -> None:
        assert spec.encoder is not None
        self._spec, self._graph, self._limits = spec, graph, spec.encoder
        self.task = TASKS[spec.task]
        self._folder = repository / configs.first_stage(spec) / VERSION
        self.answers_folder = repository / f"{spec.name}_postprocess" / VERSION
        built = {name: parameters(configs.as_backend_json(each)) for name, each in configs.build(spec).items()}
        self._preprocess = self.task.preprocess(self._folder, built[configs.first_stage(spec)])
        self._postprocess = self.task.postprocess(self.answers_folder, built[f"{spec.name}_postprocess"])
        self._tokenizer = load_tokenizer(self._folder)
        self._pad_id = int((self._tokenizer.padding or {}).get("pad_id", 0))
        self._tokenizer.no_padding()
        self._roles = TokenRoles.load(self._folder)

    @property
    def masks(self) -> bool:
        """Whether units are masked, not removed."""
        return self._roles.mask_token_id is not None

    def request(self, texts: Mapping[str, str]) -> Tensors:
        """Texts as the tensors of a request."""
        batch = (1,) if self.task.batched else ()
        known: dict[str, Tensor] = {tensor.name: tensor for tensor in (*self.task.texts, *self.task.options)}
        return {
            name: encode_texts([text]).reshape((*batch, *(1 for _ in known[name].shape)))
            for name, text in texts.items()
        }

    def read(self, texts: Mapping[str, str]) -> Reading:
        """What the tokenizer stage makes of texts, and which characters each token stands for."""
        try:
            stage = self._preprocess(self.request(texts))
        except InvalidRequest as error:
            raise TextError(str(error)) from error
        windows = self._windows(texts)
        for (ids, _), row, mask in zip(windows, stage["input_ids"], stage["attention_mask"], strict=True):
            if ids != row[mask > 0].tolist():
                raise TextError(f"{self._spec.name} reads only a part of the text: shorten it")
        return Reading(texts, stage, [tokens for _, tokens in windows])

    def outputs(self, reading: Reading) -> Tensors:
        """What the graph gives for the whole texts, a row for each window."""
        return self._run({tensor.name: reading.stage[tensor.name] for tensor in self.task.model_inputs})

    def answer(self, reading: Reading, outputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """What the postprocess stage makes of the graph's outputs."""
        known = {**self.request(reading.texts), **reading.stage, **outputs}
        return dict(self._postprocess({name: known[name] for name in self.task.read}))

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
            given = self._run(
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
                        place[row.window] = np.nan
                        place[row.window, row.kept] = array[: row.kept.size]
                    else:
                        place[row.window] = array
            while given_back < batch[-1].unit:
                yield begun.pop(given_back)
                given_back += 1
        yield from begun.values()

    def compare(self, client: Client, model: str, reading: Reading, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Ask a server for its whole answer, which must be the one that is explained.

        Raises:
            TextError: it is another one, or the server refuses the text.
        """
        ours = self.answer(reading, outputs)
        try:
            theirs = client.infer(model, self.request(reading.texts))
        except TridentError as error:
            raise TextError(f"the server says: {error}") from error
        for name, array in ours.items():
            other = theirs[name].reshape(-1)
            same = other.size == array.size and (
                (other == array.reshape(-1)).all()
                if array.dtype == np.object_
                else np.allclose(other, array.reshape(-1), atol=_TOLERANCE)
            )
            if not same:
                raise TextError(
                    f"the server's answer to this text differs from that of the repository in {name}: it serves "
                    f"another {model}; name the repository that it serves with --repository"
                )

    def _run(self, inputs: Tensors) -> Tensors:
        try:
            return self._graph(inputs)
        except TridentError as error:
            raise TextError(f"the server says: {error}") from error

    def _rows(self, reading: Reading, units: Sequence[Span]) -> Iterator[_Row]:
        for unit, span in enumerate(units):
            for window, tokens in enumerate(reading.tokens):
                hidden = np.array([token is not None and span.touches(token) for token in tokens])
                if not hidden.any():
                    continue
                inputs = {
                    tensor.name: reading.stage[tensor.name][window, : len(tokens)] for tensor in self.task.model_inputs
                }
                if self._roles.mask_token_id is not None:
                    inputs["input_ids"] = np.where(hidden, self._roles.mask_token_id, inputs["input_ids"])
                    yield _Row(unit, window, inputs, np.arange(len(tokens)))
                    continue
                kept = np.flatnonzero(~hidden)
                if not kept.size:
                    raise TextError("without one of its parts nothing is left of the text: explain it by smaller ones")
                yield _Row(unit, window, {name: array[kept] for name, array in inputs.items()}, kept)

    def _padded(self, name: str, row: NDArray[Any], width: int) -> NDArray[Any]:
        value = self._pad_id if name == "input_ids" else 0
        return np.pad(row, (0, width - row.size), constant_values=value)

    def _windows(self, texts: Mapping[str, str]) -> list[_Window]:
        limits, tokenizer, names = self._limits, self._tokenizer, list(texts)
        text, pair = [*texts.values(), None][:2]
        assert text is not None
        starts = dict.fromkeys(names, 0)
        if self._spec.task == "text-ranking":
            default = self._roles.default_prompt
            prompt = "" if default is None else self._roles.prompts[default]
            if (templates := RankingTemplates.load(self._folder)) is not None:
                return [self._templated(texts, templates.parts[prompt])]
            text, starts["query"] = prompt + text, len(prompt)
        found = [tokenizer.encode(text, pair)]
        if len(found[0].ids) > limits.max_tokens:
            stride, strategy = 0, "longest_first"
            if self._spec.task == "token-classification":
                stride = 0 if limits.truncate else limits.max_tokens // 4
            elif isinstance(limits, AnswerLimits):
                stride, strategy = limits.stride, "only_second"
            tokenizer.enable_truncation(limits.max_tokens, stride=stride, strategy=strategy)
            first = tokenizer.encode(text, pair)
            tokenizer.no_truncation()
            found = [first, *(first.overflowing if stride else ())]

        def span(sequence: int | None, start: int, end: int) -> Span | None:
            if sequence is None:
                return None
            name = names[sequence]
            start, end = max(start - starts[name], 0), end - starts[name]
            return Span(name, start, end) if start < end else None

        return [
            (
                encoding.ids,
                [span(s, *offsets) for s, offsets in zip(encoding.sequence_ids, encoding.offsets, strict=True)],
            )
            for encoding in found
        ]

    def _templated(self, texts: Mapping[str, str], parts: Sequence[str]) -> _Window:
        """The window of a decoder that reads query and passage within a text."""
        before, between, after = parts
        query, passage = texts["query"], texts["text_input"]
        encoding = self._tokenizer.encode(before + query + between + passage + after, add_special_tokens=False)
        begins = {"query": len(before), "text_input": len(before + query + between)}

        def span(left: int, right: int) -> Span | None:
            for name, start in begins.items():
                if left < start + len(texts[name]) and start < right:
                    return Span(name, max(left - start, 0), min(right - start, len(texts[name])))
            return None

        return encoding.ids, [span(*offsets) for offsets in encoding.offsets]


def in_process(spec: ModelSpec, variant: str, repository: Path) -> Graph:
    """The graph of a variant, in this process, by ONNX Runtime."""
    part = configs.model_part(spec, variant)
    model = OnnxModel(repository / part / VERSION, configs.as_backend_json(configs.build(spec)[part]))

    def run(inputs: Tensors) -> Tensors:
        (found,) = model.run([inputs])
        if isinstance(found, Exception):
            raise found
        return found

    return run


def on_server(spec: ModelSpec, variant: str, client: Client) -> Graph:
    """The same on a server."""
    part = configs.model_part(spec, variant)
    return lambda inputs: client.infer(part, inputs)
