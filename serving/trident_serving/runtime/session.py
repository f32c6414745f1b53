"""ONNX Runtime sessions for the engines, and what a run of one reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from trident_serving.errors import DeviceMissing


def open_session(path: Path, device: str, device_id: int, threads: int) -> ort.InferenceSession:
    """A session on the CPU or on a GPU, never on another than the one that is asked for.

    Raises:
        DeviceMissing: this ONNX Runtime has no provider for it, or the provider found no GPU.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    known = ort.get_available_providers()
    if provider not in known:
        raise DeviceMissing(
            f"device is {device!r}, but this onnxruntime {ort.__version__} has only {', '.join(known)}: install "
            'onnxruntime-gpu in its place, or set device = "cpu" in models.toml'
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: what it warns of, a user can do nothing about
    options.intra_op_num_threads = threads
    # Threads spin while a run lasts, and leave the cores to the sender and the server between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A thread that is held up leaves more of a matmul to the others: decision 0019.
    options.add_session_config_entry("session.dynamic_block_base", "8")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, (provider, {"device_id": device_id}))
    session = ort.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without a provider that fails to start
        raise DeviceMissing(f"device is {device!r}, but ONNX Runtime could not use it: is there a GPU, and its driver?")
    return session


class Binding:
    """What a session reads and writes. To bind an array takes as long as a small operator, and a step has eight.

    Args:
        in_place: whether an input may be bound once and then overwritten; on another device it is copied when it is
            bound.
    """

    def __init__(self, io: ort.IOBinding, *, in_place: bool) -> None:
        self.io = io
        self._in_place = in_place
        self._inputs: dict[str, NDArray[Any]] = {}
        self._outputs: dict[str, tuple[int, tuple[int, ...]]] = {}

    def set_input(self, name: str, array: NDArray[Any]) -> None:
        """The next run reads these numbers."""
        held = self._inputs.get(name)
        if held is not None and held.shape == array.shape and self._in_place:
            held[...] = array
        else:
            self._inputs[name] = array.copy()
            bind_array(self.io.bind_input, name, self._inputs[name])

    def set_output(self, name: str, array: NDArray[Any]) -> None:
        """The next run writes to this array, which must live as long as the binding."""
        where = (array.ctypes.data, array.shape)
        if self._outputs.get(name) != where:
            self._outputs[name] = where
            bind_array(self.io.bind_output, name, array)


def bind_array(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Bind a numpy array, which must live as long as the binding, by `bind_input` or `bind_output`."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
