"""The stand-in for Triton's ONNX Runtime backend, in the real server, on small graphs with known answers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.conftest import post, triton_request
from trident_client import _wire
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

TYPES = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
    "STRING": (TensorProto.STRING, np.object_),
}
CPU = "instance_group { count: 1 kind: KIND_CPU }\n"


def save(
    folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = (), external: bool = False
) -> None:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True)
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=external, location="model.onnx.data", size_threshold=0
    )


def tensor(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def floats(name: str, *shape: Any) -> Any:
    return tensor(name, TensorProto.FLOAT, list(shape))


def times(folder: Path, factor: float, external: bool = False) -> None:
    """y [batch, 3] = factor * x."""
    weight = numpy_helper.from_array(np.full(3, factor, np.float32), "w")
    node = helper.make_node("Mul", ["x", "w"], ["y"])
    save(folder, [node], [floats("x", "n", 3)], [floats("y", "n", 3)], [weight], external)


def build_repository(root: Path) -> None:
    # Every type, no config at all: inputs, outputs, batch size and batcher are completed.
    names = list(TYPES)
    save(
        root / "types/1",
        [helper.make_node("Identity", [f"in_{n}"], [f"out_{n}"]) for n in names],
        [tensor(f"in_{n}", TYPES[n][0], ["batch", "any"]) for n in names],
        [tensor(f"out_{n}", TYPES[n][0], ["batch", "any"]) for n in names],
    )
    # How many rows ran together: the sum of ones over the batch, for each row. Fails for a row of zeros in k.
    save(
        root / "joined/1",
        [
            helper.make_node("ReduceSum", ["one", "axis"], ["rows"], keepdims=1),
            helper.make_node("Mul", ["one", "rows"], ["count"]),
            helper.make_node("Gather", ["table", "k"], ["picked"]),
        ],
        [floats("one", "n", 1), tensor("k", TensorProto.INT64, ["n", 1])],
        [floats("count", "n", 1), floats("picked", "n", 1)],
        [
            numpy_helper.from_array(np.array([0], np.int64), "axis"),
            numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table"),
        ],
    )
    (root / "joined/config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 8\n'
        "dynamic_batching { max_queue_delay_microseconds: 300000 preferred_batch_size: 4 }\n"
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
        'parameters { key: "execution_mode" value { string_value: "0" } }\n'
        'parameters { key: "enable_mem_arena" value { string_value: "1" } }\n'
        'parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "cpu:0" } }\n'
        "optimization { graph { level: 1 } }\n" + CPU
    )
    # No batching: a scalar, a fixed dimension, and an input that is an initializer where it is left out.
    offset = numpy_helper.from_array(np.array([100.0], np.float32), "offset")
    save(
        root / "unbatched/1",
        [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "offset"], ["y"])],
        [floats("x", 2), floats("scale"), floats("offset", 1)],
        [floats("y", 2)],
        [offset],
    )
    (root / "unbatched/config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 0\n'
        'input { name: "x" data_type: TYPE_FP32 dims: 2 }\n'
        'input { name: "scale" data_type: TYPE_FP32 dims: 1 }\n'
        'input { name: "offset" data_type: TYPE_FP32 dims: 1 optional: true }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: 2 }\n' + CPU
    )
    # Versions, external weights, two instances, a warm-up, another file name.
    times(root / "versions/1", 2.0, external=True)
    times(root / "versions/2", 3.0, external=True)
    (root / "versions/config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 4\nversion_policy { all {} }\n'
        "instance_group { count: 2 kind: KIND_CPU }\n"
        'model_warmup { name: "zeros" batch_size: 2 '
        'inputs { key: "x" value { data_type: TYPE_FP32 dims: 3 zero_data: true } } }\n'
    )
    times(root / "renamed/1", 5.0)
    (root / "renamed/1/model.onnx").rename(root / "renamed/1/other.onnx")
    (root / "renamed/config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 4\ndefault_model_filename: "other.onnx"\n' + CPU
    )
    # Shapes: the config's reshape on the way in and out.
    times(root / "reshaped/1", 7.0)
    (root / "reshaped/config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 4\n'
        'input { name: "x" data_type: TYPE_FP32 dims: [3, 1] reshape { shape: [3] } }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [1, 3] reshape { shape: [3] } }\n' + CPU
    )


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalServer, Path]]:
    root = tmp_path_factory.mktemp("plain")
    build_repository(root / "repository")
    running = local.start(root / "repository", root / "log")
    yield running, root / "repository"
    running.stop()


@pytest.fixture
def stub(plain_server: tuple[LocalServer, Path]) -> Iterator[Any]:
    with grpc.insecure_channel(plain_server[0].grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer(stub: Any, model: str, version: str = "", **tensors: Any) -> dict[str, Any]:
    request = triton_request(model, tensors)
    request.model_version = version
    return _wire.parse_response(stub.ModelInfer(request, timeout=30))


def test_every_type_without_a_config(stub: Any) -> None:
    config = stub.ModelConfig(pb.ModelConfigRequest(name="types")).config
    assert config.max_batch_size == 4
    assert not config.HasField("dynamic_batching")  # malformed texts would fail everybody's request in the batch
    assert {(i.name, tuple(i.dims)) for i in config.input} == {(f"in_{name}", (-1,)) for name in TYPES}
    tensors = {}
    for name, (_, dtype) in TYPES.items():
        if name == "STRING":
            values = np.array([["héllo", "", "中文 😀"], ["a\0b", "x" * 1000, " "]])
            tensors[name] = np.array([[v.encode() for v in row] for row in values], np.object_)
        else:
            tensors[name] = np.array([[0, 1, 1], [1, 0, 100]]).astype(dtype)
    found = infer(stub, "types", **{f"in_{name}": value for name, value in tensors.items()})
    for name, value in tensors.items():
        assert found[f"out_{name}"].dtype == value.dtype
        np.testing.assert_array_equal(found[f"out_{name}"], value)


def test_requests_are_joined_and_split_again(stub: Any) -> None:
    def call(row: int) -> tuple[float, float]:
        out = infer(stub, "joined", one=np.ones((1, 1), np.float32), k=np.array([[row % 3]]))
        return out["count"].item(), out["picked"].item()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, range(8)))
    assert [picked for _, picked in answers] == [10, 20, 30, 10, 20, 30, 10, 20]
    assert max(count for count, _ in answers) >= 4
    two = infer(stub, "joined", one=np.ones((2, 1), np.float32), k=np.array([[2], [0]]))
    np.testing.assert_array_equal(two["picked"], [[30], [10]])


def test_one_bad_request_does_not_hurt_its_batch(stub: Any) -> None:
    def call(k: int) -> Any:
        try:
            return infer(stub, "joined", one=np.ones((1, 1), np.float32), k=np.array([[k]]))["picked"].item()
        except grpc.RpcError as error:
            return error.details()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(call, [0, 1, 99, 2]))
    assert [answers[0], answers[1], answers[3]] == [10, 20, 30]
    assert "out of data bounds" in answers[2]


def test_scalars_and_optional_inputs(stub: Any) -> None:
    given = {"x": np.array([1, 2], np.float32), "scale": np.array([10], np.float32)}
    np.testing.assert_array_equal(infer(stub, "unbatched", **given)["y"], [110, 120])
    offset = np.array([1], np.float32)
    np.testing.assert_array_equal(infer(stub, "unbatched", **given, offset=offset)["y"], [11, 21])


def test_versions_and_external_weights(stub: Any) -> None:
    x = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_array_equal(infer(stub, "versions", version="1", x=x)["y"], x * 2)
    np.testing.assert_array_equal(infer(stub, "versions", version="2", x=x)["y"], x * 3)
    np.testing.assert_array_equal(infer(stub, "versions", x=x)["y"], x * 3)
    np.testing.assert_array_equal(infer(stub, "renamed", x=x)["y"], x * 5)


def test_reshapes(stub: Any) -> None:
    x = np.array([[[1], [2], [3]]], np.float32)
    np.testing.assert_array_equal(infer(stub, "reshaped", x=x)["y"], [[[7, 14, 21]]])


def test_text_that_is_not_utf8(stub: Any) -> None:
    tensors = {f"in_{name}": np.zeros((1, 1), dtype) for name, (_, dtype) in TYPES.items() if name != "STRING"}
    with pytest.raises(grpc.RpcError) as error:
        infer(stub, "types", **tensors, in_STRING=np.array([[b"\xff"]], np.object_))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "in_STRING is not UTF-8" in error.value.details()


GOOD_IO = 'input { name: "x" data_type: TYPE_FP32 dims: 3 }\noutput { name: "y" data_type: TYPE_FP32 dims: 3 }\n'
BAD_CONFIGS = {
    "broken graph": ("", "can't load"),
    "missing file": ('default_model_filename: "none.onnx"\n' + GOOD_IO, "none.onnx"),
    "unknown parameter": (
        GOOD_IO + 'parameters { key: "intra_op_threads" value { string_value: "1" } }',
        "unknown parameters intra_op_threads; known are intra_op_thread_count",
    ),
    "bad number": (
        GOOD_IO + 'parameters { key: "intra_op_thread_count" value { string_value: "two" } }',
        "parameter 'intra_op_thread_count' must be an integer, found 'two'",
    ),
    "bad mode": (
        GOOD_IO + 'parameters { key: "execution_mode" value { string_value: "7" } }',
        "execution_mode must be 0 (sequential) or 1 (parallel), found 7",
    ),
    "wrong type": (GOOD_IO.replace("FP32", "FP64"), "is TYPE_FP64 in the config and TYPE_FP32 in the graph"),
    "wrong shape": (GOOD_IO.replace("dims: 3", "dims: 4"), "has the shape [-1, 3] in the graph and [-1, 4]"),
    "looser output": (
        GOOD_IO.replace('"y" data_type: TYPE_FP32 dims: 3', '"y" data_type: TYPE_FP32 dims: -1'),
        "has the shape [-1, 3] in the graph and [-1, -1] in the config",
    ),
    "unknown input": (GOOD_IO.replace('"x"', '"z"'), "the graph has no input 'z'; its inputs are x"),
    "unknown output": (GOOD_IO.replace('"y"', '"z"'), "the graph has no output 'z'; its outputs are y"),
    "too many inputs": (
        GOOD_IO + 'input { name: "z" data_type: TYPE_FP32 dims: 3 }\n',
        "the config has 2 required inputs (x, z), the graph has 1 (x)",
    ),
    "optional and batched": (
        GOOD_IO + 'input { name: "z" data_type: TYPE_FP32 dims: 3 optional: true }\n',
        "optional input 'z' is not supported for models that support batching",
    ),
    "ragged": (
        GOOD_IO.replace("dims: 3 }\noutput", "dims: 3 allow_ragged_batch: true }\noutput"),
        "allow_ragged_batch is not supported",
    ),
    "accelerator": (
        GOOD_IO + 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }',
        "unknown Execution Accelerator 'openvino'",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_model_that_can_not_be_served_says_why(plain_server: tuple[LocalServer, Path], case: str) -> None:
    server, repository = plain_server
    config, message = BAD_CONFIGS[case]
    name = f"bad-{list(BAD_CONFIGS).index(case)}"
    folder = repository / name
    try:
        times(folder / "1", 2.0)
        if case == "broken graph":
            (folder / "1/model.onnx").write_bytes(b"this is no graph")
        (folder / "config.pbtxt").write_text('backend: "onnxruntime"\nmax_batch_size: 4\n' + CPU + config)
        assert message in load_error(server, name)
    finally:
        shutil.rmtree(folder)


def load_error(server: LocalServer, model: str) -> str:
    """What the server says when it is asked to load a model, which it sees within a second."""
    url = f"{server.http_url}/v2/repository/models/{model}/load"
    deadline = time.monotonic() + 10
    while True:
        status, text = post(url, {}, server.admin_headers)
        if status == 200:
            return ""
        message: str = json.loads(text)["error"]
        if "failed to poll from model repository" not in message or time.monotonic() > deadline:
            assert status == 400
            return message
        time.sleep(0.1)


def test_a_model_can_be_added_to_a_running_server(plain_server: tuple[LocalServer, Path], stub: Any) -> None:
    server, repository = plain_server
    times(repository / "added/1", 11.0)
    assert load_error(server, "added") == ""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not stub.ModelReady(pb.ModelReadyRequest(name="added")).ready:
        time.sleep(0.1)
    np.testing.assert_array_equal(infer(stub, "added", x=np.ones((1, 3), np.float32))["y"], [[11, 11, 11]])
