"""What an encoder task is: the tensors of its ensemble as data, and the two stages around its graph.

One declaration gives config.pbtxt, the tokenizer stage and the postprocess stage. Knows no task by name; they are
listed in `trident_serving.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

Tensors = Mapping[str, NDArray[Any]]
# From the tensors that a stage reads to those that it gives.
Stage = Callable[[Tensors], Tensors]
# Makes a stage from its version folder and the `parameters` of its config.
Loader = Callable[[Path, Mapping[str, str]], Stage]


class Tensor(NamedTuple):
    """A tensor of a config.

    Attributes:
        data_type: Triton's, without TYPE_.
        shape: without the batch where the task batches; a word is the name of the limit that holds the size.
        of: what a model must have to have this option: "prompts" or "matryoshka"; "": nothing.
    """

    name: str
    data_type: str
    shape: tuple[int | str, ...]
    of: str = ""

    def dims(self, limits: object) -> list[int]:
        """The shape in numbers."""
        return [size if isinstance(size, int) else int(getattr(limits, size)) for size in self.shape]

    @property
    def rows(self) -> Tensor:
        """The tensor with the rows of the graph as its first dimension."""
        return self._replace(shape=(-1, *self.shape))


INPUT_IDS = Tensor("input_ids", "INT64", (-1,))
ATTENTION_MASK = Tensor("attention_mask", "INT64", (-1,))
TOKEN_TYPE_IDS = Tensor("token_type_ids", "INT64", (-1,))
SINGLE = (INPUT_IDS, ATTENTION_MASK)
PAIR = (*SINGLE, TOKEN_TYPE_IDS)
TEXT = Tensor("text_input", "STRING", (1,))
TRUNCATE = Tensor("truncate", "BOOL", (1,))
PROMPT_NAME = Tensor("prompt_name", "STRING", (1,), of="prompts")
TOP_K = Tensor("top_k", "INT32", (1,))
SCORE = Tensor("score", "FP32", (-1,))

# Parameters of every tokenizer stage (see `tokens.EncodingSettings`), and the limits that they come from.
ENCODING = {"max_tokens": "max_tokens", "max_bytes": "max_bytes", "buckets": "all_buckets", "truncate": "truncate"}


class Tower(NamedTuple):
    """One of the graphs of a task that has several; it is a Triton model of its own.

    The graphs of a request run one after the other: Triton ends where a request is cancelled, or fails, while two of
    its steps run (decision 0077). So the first stage is a step before each of them. The first time it reads the
    request. Later it waits for what the graph before gives, and reads of the request what the graph needs.

    Attributes:
        name: what parts its Triton model's name from the others'.
        texts: which of the task's `texts` its inputs are made of.
        inputs: what it reads of the task's `model_inputs`.
        outputs: what it gives of the task's `model_outputs`.
    """

    name: str
    texts: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderTask:
    """One task: tokenizer or preprocess stage, graph, postprocess stage.

    Attributes:
        name: the transformers pipeline's.
        stage: what the first stage is called: "tokenizer", or "preprocess" where it reads images.
        texts: what a request must give: texts, or files of images.
        options: what it may give to the first stage.
        model_inputs: what the graph reads.
        model_outputs: what the graph gives.
        towers: the graphs, where there are several, in the order in which they run; each batches by itself.
        extra: what the first stage gives besides the graph's inputs.
        read: names of what the postprocess stage reads, of all the above.
        answer_options: what a request may give to the postprocess stage.
        answers: what the ensemble gives.
        alias: a text and an answer by the names that other clients fix, each with the name that it has here: those of
            another ensemble, which does not batch; see `ALIAS`.
        batched: whether the batch of a request is that of the graph; a question may need several windows.
        parameters: of the first stage's config, and the limits that they come from.
        answer_parameters: of the postprocess stage's.
        preprocess: makes the first stage.
        postprocess: makes the postprocess stage.
    """

    name: str
    stage: str = "tokenizer"
    texts: tuple[Tensor, ...]
    options: tuple[Tensor, ...] = ()
    model_inputs: tuple[Tensor, ...]
    model_outputs: tuple[Tensor, ...]
    towers: tuple[Tower, ...] = ()
    extra: tuple[Tensor, ...] = ()
    read: tuple[str, ...]
    answer_options: tuple[Tensor, ...] = ()
    answers: tuple[Tensor, ...]
    alias: Mapping[str, str] = field(default_factory=dict)
    batched: bool = True
    parameters: Mapping[str, str] = field(default_factory=lambda: ENCODING)
    answer_parameters: Mapping[str, str] = field(default_factory=dict)
    preprocess: Loader
    postprocess: Loader

    @property
    def graphs(self) -> tuple[Tower, ...]:
        """The graphs; the only one has no name."""
        return self.towers or (Tower("", self.texts, self.model_inputs, self.model_outputs),)

    @property
    def awaited(self) -> tuple[Tensor, ...]:
        """What the first stage waits for where it is not the request's first step."""
        return self._of_graph(tuple(tensor for tower in self.towers[:-1] for tensor in tower.outputs))

    @property
    def once(self) -> tuple[Tensor, ...]:
        """Those of `texts` that the first stage reads in the request's first step alone."""
        return tuple(text for text in self.texts if any(text not in tower.texts for tower in self.graphs[1:]))

    def begins(self, names: Collection[str]) -> bool:
        """Whether a request to the first stage, with tensors of these names, is a new one."""
        return not any(tensor.name in names for tensor in self.awaited)

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """What the first stage gives."""
        return (*self._of_graph(self.model_inputs), *self.extra)

    @property
    def read_tensors(self) -> tuple[Tensor, ...]:
        """What the postprocess stage reads."""
        known = {t.name: t for t in (*self.texts, *self.tokens, *self._of_graph(self.model_outputs))}
        return tuple(known[name] for name in self.read)

    def _of_graph(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tensors if self.batched else tuple(tensor.rows for tensor in tensors)


def flag(tensors: Tensors, name: str) -> bool | None:
    """An optional yes or no of a request, None where it is left out; of several, whether any is yes.

    Raises:
        InvalidRequest: it is empty.
    """
    if name not in tensors:
        return None
    if not tensors[name].size:
        raise InvalidRequest(f"{name} is empty: it must hold a yes or no, or be left out")
    return bool(tensors[name].any())


def count(tensors: Tensors, name: str, default: int, most: int, what: str) -> int:
    """An optional whole number of a request, from 1 to `most`.

    Raises:
        InvalidRequest: it is outside of that, or empty.
    """
    if name not in tensors:
        return default
    values = np.asarray(tensors[name]).reshape(-1)
    if not values.size:
        raise InvalidRequest(f"{name} is empty: it must hold a number, or be left out")
    value = int(values[0])
    if not 1 <= value <= most:
        raise InvalidRequest(f"{name} must be between 1 and {most} ({what}), found {value}")
    return value
