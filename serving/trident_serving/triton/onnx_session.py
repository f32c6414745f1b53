"""Opens an ONNX Runtime session with the options of a Triton config.

The options mean the same as to the native backend (triton-inference-server/onnxruntime_backend, README and
src/onnxruntime.cc). An option that the native backend accepts and this one can't honour is refused at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from trident_serving.errors import LoadError

Config = Mapping[str, Any]

# ONNX Runtime's name of a tensor type -> Triton's; the types that the two share.
TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}

_GRAPH_LEVELS = {
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_BOOLEANS = {"0": False, "1": True, "false": False, "true": True}
_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_PARAMETERS = (
    "intra_op_thread_count",
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "share_session_between_instances",
    "session.use_device_allocator_for_initializers",
    _SHRINKAGE,
)
# Options of the CUDA provider that the native backend ignores on a CPU.
_CUDA_PARAMETERS = (
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "do_copy_in_default_stream",
)


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph: its name, Triton's type name, and its shape with -1 for any."""

    name: str
    data_type: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, node: Any) -> TensorInfo:
        """Read it from ONNX Runtime's description."""
        if node.type not in TRITON_TYPES:
            raise LoadError(f"tensor {node.name!r} has the type {node.type}, which Triton does not have")
        shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
        return cls(node.name, TRITON_TYPES[node.type], shape)


def open_session(folder: Path, config: Config) -> tuple[ort.InferenceSession, ort.RunOptions | None]:
    """The session of the config's model file, with the config's options; and options for each run, or None.

    Raises:
        LoadError: the file is missing or broken, or an option is unknown here.
    """
    path = folder / (config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path = path / "model.onnx"
    if not path.is_file():
        raise LoadError(f"there is no {path.name} in {folder}")
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options = session_options(config, parameters)
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a type of its own for each status code
        raise LoadError(f"ONNX Runtime can't load {path}: {error}") from None
    run_options = None
    if _SHRINKAGE in parameters:
        run_options = ort.RunOptions()
        run_options.add_run_config_entry(_SHRINKAGE, parameters[_SHRINKAGE])
    return session, run_options


def session_options(config: Config, parameters: Mapping[str, str]) -> ort.SessionOptions:
    """ONNX Runtime's options for a config.

    Raises:
        LoadError: an option is unknown, has no valid value, or can't be honoured here.
    """
    unknown = sorted(set(parameters) - set(_PARAMETERS) - set(_CUDA_PARAMETERS))
    if unknown:
        raise LoadError(f"unknown parameters {', '.join(unknown)}; known are {', '.join(_PARAMETERS)}")
    for group in config.get("instance_group", []):
        if group.get("kind") == "KIND_GPU":
            raise LoadError("instance_group asks for KIND_GPU; this backend runs on the CPU: use KIND_CPU")
    optimization = config.get("optimization", {})
    for kind, accelerators in optimization.get("execution_accelerators", {}).items():
        if kind == "cpu_execution_accelerator" and accelerators:
            raise LoadError(f"unknown Execution Accelerator {accelerators[0]['name']!r} is requested")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: the user can't act on its warnings
    level = int(optimization.get("graph", {}).get("level", 0))
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.intra_op_num_threads = _integer(parameters, "intra_op_thread_count", 0)
    options.inter_op_num_threads = _integer(parameters, "inter_op_thread_count", 0)
    mode = _integer(parameters, "execution_mode", 0)
    if mode not in (0, 1):
        raise LoadError(f"execution_mode must be 0 (sequential) or 1 (parallel), found {mode}")
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if mode else ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = _boolean(parameters, "enable_mem_arena", True)
    options.enable_mem_pattern = _boolean(parameters, "enable_mem_pattern", True)
    # Each instance is a process here, so instances can't share a session; the answers are the same.
    _boolean(parameters, "share_session_between_instances", False)
    key = "session.use_device_allocator_for_initializers"
    if key in parameters:
        options.add_session_config_entry(key, parameters[key])
    # Threads spin while a run lasts, and leave the few cores to other models between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _integer(parameters: Mapping[str, str], name: str, default: int) -> int:
    text = parameters.get(name, str(default))
    if not text.lstrip("-").isdecimal():
        raise LoadError(f"parameter {name!r} must be an integer, found {text!r}")
    return max(int(text), 0) if name.endswith("thread_count") else int(text)


def _boolean(parameters: Mapping[str, str], name: str, default: bool) -> bool:
    text = parameters.get(name)
    if text is None:
        return default
    if text.lower() not in _BOOLEANS:
        raise LoadError(f"parameter {name!r} must be 0 or 1, found {text!r}")
    return _BOOLEANS[text.lower()]
