"""Serves an ONNX model as Triton's C++ ONNX Runtime backend does, on servers that lack that backend.

A config means the same as to the native backend (triton-inference-server/onnxruntime_backend, README and
src/onnxruntime.cc): automatic completion, session parameters, the checks of inputs and outputs. A config that the
native backend accepts and this one can't honour is refused at load. This module does not use Triton's Python API;
configs are the parsed JSON that Triton passes to a backend.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import LoadError
from trident_serving.text import decode_texts, encode_texts
from trident_serving.triton import padded_rows
from trident_serving.triton.onnx_session import Config, TensorInfo, open_session

logger = logging.getLogger(__name__)

Tensors = dict[str, NDArray[Any]]

DEFAULT_MAX_BATCH_SIZE = 4


class OnnxModel:
    """One session and the checked config that it serves.

    Args:
        folder: the version folder, which holds the model file.
        config: the model's config as Triton passes it to a backend.

    Raises:
        LoadError: a file is missing, the graph is broken, or graph and config disagree.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._session, self._run_options = open_session(folder, config)
        self._inputs = {info.name: info for info in map(TensorInfo.of, self._session.get_inputs())}
        self._overridable = {
            info.name: info for info in map(TensorInfo.of, self._session.get_overridable_initializers())
        }
        self._outputs = {info.name: info for info in map(TensorInfo.of, self._session.get_outputs())}
        self._max_batch_size = int(config.get("max_batch_size", 0))
        self._reshapes = _input_reshapes(config)
        self._output_dims = {output["name"]: _dims(output) for output in config.get("output", [])}
        self.output_names = list(self._output_dims)
        self._check_inputs(config)
        self._check_outputs(config)

    def prepare(self, request: Mapping[str, NDArray[Any]]) -> Tensors:
        """One request's tensors in the shapes and types that ONNX Runtime takes.

        Args:
            request: tensors by input name; BYTES tensors hold bytes.

        Raises:
            InvalidRequest: a text is not UTF-8, which ONNX strings are.
        """
        return {name: self._to_onnx(name, tensor) for name, tensor in request.items()}

    def run(self, requests: Sequence[Tensors], wanted: Sequence[str] | None = None) -> list[Tensors | Exception]:
        """Run prepared requests of the same shapes, as one batch where the model batches.

        Args:
            wanted: outputs to compute; None: all of the config's.

        Returns:
            For each request its tensors by output name, or its error.
        """
        names = list(wanted if wanted is not None else self.output_names)
        if self._max_batch_size and len(requests) > 1:
            try:
                return list(self._run_joined(requests, names))
            except Exception:  # one request's values may be at fault: the others must not suffer
                logger.warning("a batch of %d requests failed, running them one by one", len(requests))
        results: list[Tensors | Exception] = []
        for request in requests:
            try:
                results.append(self._run_one(request, names))
            except Exception as error:
                results.append(error)
        return results

    def _run_joined(self, requests: Sequence[Tensors], names: list[str]) -> list[Tensors]:
        sizes = [next(iter(request.values())).shape[0] for request in requests]
        joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        outputs = self._run_one(joined, names)
        for name, output in outputs.items():
            if output.ndim == 0 or output.shape[0] != sum(sizes):
                raise ValueError(f"output {name!r} has the shape {list(output.shape)} for a batch of {sum(sizes)}")
        ends = np.cumsum(sizes)[:-1]
        split = {name: np.split(output, ends) for name, output in outputs.items()}
        return [{name: arrays[index] for name, arrays in split.items()} for index in range(len(requests))]

    def _run_one(self, feeds: Tensors, names: list[str]) -> Tensors:
        values = self._values(feeds, names)
        outputs = zip(names, values, strict=True)
        return {name: self._from_onnx(name, np.asarray(value)) for name, value in outputs}

    def _values(self, feeds: Tensors, names: list[str]) -> list[NDArray[Any]]:
        def run(inputs: padded_rows.Tensors) -> list[NDArray[Any]]:
            return [np.asarray(value) for value in self._session.run(names, dict(inputs), self._run_options)]

        if not self._max_batch_size or not padded_rows.is_padded(feeds):
            return run(feeds)
        return padded_rows.run(feeds, run, [self._output_dims.get(name, ())[:1] == (-1,) for name in names])

    def _to_onnx(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        shape = self._reshapes.get(name)
        if shape is not None:
            batch = tensor.shape[:1] if self._max_batch_size else ()
            tensor = tensor.reshape((*batch, *shape))
        info = self._inputs.get(name) or self._overridable[name]
        if not info.shape and self._max_batch_size == 0:
            tensor = tensor.reshape(())
        if tensor.dtype == np.object_:
            return np.array(decode_texts(tensor, name), dtype=np.object_).reshape(tensor.shape)
        return tensor

    def _from_onnx(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        if value.dtype.kind in "OU":
            value = encode_texts(str(text) for text in value.reshape(-1)).reshape(value.shape)
        batch = value.shape[:1] if self._max_batch_size else ()
        dims = self._output_dims.get(name, ())
        if len(batch) + len(dims) != value.ndim:  # a scalar, or a config with a reshape
            value = value.reshape((*batch, *dims))
        return value

    def _check_inputs(self, config: Config) -> None:
        inputs = config.get("input", [])
        required = [item for item in inputs if not item.get("optional")]
        if len(required) != len(self._inputs):
            raise LoadError(
                f"the config has {len(required)} required inputs ({_names(required)}), "
                f"the graph has {len(self._inputs)} ({', '.join(self._inputs)})"
            )
        for item in inputs:
            name = item["name"]
            if item.get("optional") and self._max_batch_size:
                raise LoadError(f"optional input {name!r} is not supported for models that support batching")
            if item.get("allow_ragged_batch"):
                raise LoadError(f"input {name!r}: allow_ragged_batch is not supported by this backend")
            known = {**self._inputs, **(self._overridable if item.get("optional") else {})}
            if name not in known:
                raise LoadError(f"the graph has no input {name!r}; its inputs are {', '.join(known)}")
            self._check_tensor(item, known[name], exact=False)

    def _check_outputs(self, config: Config) -> None:
        for item in config.get("output", []):
            name = item["name"]
            if name not in self._outputs:
                raise LoadError(f"the graph has no output {name!r}; its outputs are {', '.join(self._outputs)}")
            self._check_tensor(item, self._outputs[name], exact=True)

    def _check_tensor(self, item: Config, info: TensorInfo, *, exact: bool) -> None:
        if item["data_type"] != info.data_type:
            raise LoadError(
                f"tensor {info.name!r} is {item['data_type']} in the config and {info.data_type} in the graph"
            )
        dims = _onnx_dims(item)
        if not info.shape:
            if any(size != 1 for size in dims):
                raise LoadError(f"tensor {info.name!r} is a scalar, its dims must be 1, found {list(dims)}")
            return
        if self._max_batch_size and info.shape[0] != -1:
            raise LoadError(
                f"tensor {info.name!r} has the fixed first dimension {info.shape[0]}, so max_batch_size must be 0"
            )
        full = (-1, *dims) if self._max_batch_size else dims
        agrees = len(full) == len(info.shape) and all(
            found == size or (size == -1 and not exact) for found, size in zip(full, info.shape, strict=True)
        )
        if not agrees:
            raise LoadError(
                f"tensor {info.name!r} has the shape {list(info.shape)} in the graph and {list(full)} in the config"
            )


@dataclass(frozen=True)
class Completion:
    """What automatic completion adds to a config."""

    max_batch_size: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    dynamic_batching: bool


def complete(folder: Path, config: Config, default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE) -> Completion | None:
    """What the native backend would complete in a config; None if the config gives all inputs and outputs.

    Raises:
        LoadError: the model can't be opened, or can't batch although the config says so.
    """
    if config.get("input") and config.get("output"):
        return None
    session, _ = open_session(folder, config)
    inputs = [TensorInfo.of(node) for node in session.get_inputs()]
    outputs = [TensorInfo.of(node) for node in session.get_outputs()]
    batches = all(info.shape and info.shape[0] == -1 for info in (*inputs, *outputs))
    max_batch_size = int(config.get("max_batch_size", 0))
    if max_batch_size and not batches:
        raise LoadError(
            f"max_batch_size is {max_batch_size}, but not every tensor of the graph has a variable first dimension"
        )
    if batches and not max_batch_size:
        max_batch_size = default_max_batch_size
    scheduled = "sequence_batching" in config or "dynamic_batching" in config
    texts = any(info.data_type == "TYPE_STRING" for info in inputs)  # one malformed text would fail the whole batch
    return Completion(
        max_batch_size=max_batch_size,
        inputs=[] if config.get("input") else [_completed(info, max_batch_size) for info in inputs],
        outputs=[] if config.get("output") else [_completed(info, max_batch_size) for info in outputs],
        dynamic_batching=max_batch_size > 1 and not scheduled and not texts,
    )


def _completed(info: TensorInfo, max_batch_size: int) -> dict[str, Any]:
    dims = list(info.shape[1:] if max_batch_size else info.shape)
    item: dict[str, Any] = {"name": info.name, "data_type": info.data_type, "dims": dims or [1]}
    if not dims and max_batch_size:
        item["reshape"] = {"shape": []}
    return item


def _dims(item: Config) -> tuple[int, ...]:
    return tuple(int(size) for size in item["dims"])


def _onnx_dims(item: Config) -> tuple[int, ...]:
    reshape = item.get("reshape")
    return tuple(int(size) for size in reshape.get("shape", [])) if reshape is not None else _dims(item)


def _input_reshapes(config: Config) -> dict[str, tuple[int, ...]]:
    return {item["name"]: _onnx_dims(item) for item in config.get("input", []) if item.get("reshape") is not None}


def _names(items: Sequence[Config]) -> str:
    return ", ".join(item["name"] for item in items) or "none"
