"""The client's messages against tritonclient's, which are generated from Triton's own definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from trident_client import _protocol, _wire


def tritons(name: str) -> Any:
    """Triton's descriptor of a message."""
    head, _, nested = name.partition(".")
    module = model_config_pb2 if hasattr(model_config_pb2, head) else service_pb2
    descriptor = getattr(module, head).DESCRIPTOR
    return descriptor.nested_types_by_name[nested] if nested else descriptor


def shown(field: Any) -> tuple[Any, ...]:
    """Everything about a field that decides its bytes, and where they are read."""
    kind = field.message_type.full_name if field.message_type else None
    return field.name, field.number, field.type, field.is_repeated, field.containing_oneof is not None, kind


@pytest.mark.parametrize("name", _protocol._MESSAGES)
def test_every_field_is_tritons(name: str) -> None:
    ours, theirs = _protocol._classes[name].DESCRIPTOR, tritons(name)
    assert ours.full_name == theirs.full_name
    for field in ours.fields:
        assert shown(field) == shown(theirs.fields_by_name[field.name])
        if field.message_type and field.message_type.GetOptions().map_entry:
            entry = theirs.fields_by_name[field.name].message_type
            assert entry.GetOptions().map_entry
            assert [shown(part) for part in field.message_type.fields] == [shown(part) for part in entry.fields]


def test_the_calls_are_tritons() -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == _protocol.SERVICE
    for name in vars(_protocol.Stub(_Channel())):
        method = service.methods_by_name[name]
        assert (method.input_type.name, method.output_type.name) == (f"{name}Request", f"{name}Response")


class _Channel:
    def unary_unary(self, path: str, **_: Any) -> str:
        return path


def test_tensors_have_tritonclients_bytes() -> None:
    for name, dtype in _wire._DTYPES.items():
        assert np.dtype(triton_to_np_dtype(name)) == np.dtype(dtype)
        assert np_to_triton_dtype(np.dtype(dtype)) == name
    elements = np.array([b"", b"a", "中文 ✓".encode(), bytes(range(256)) * 300], np.object_).reshape(2, 2)
    raw = serialize_byte_tensor(elements).item()
    request = _wire.build_request("m", {"text": elements, "none": np.empty((0, 1), np.object_)})
    assert list(request.raw_input_contents) == [raw, b""]
    answer = service_pb2.ModelInferResponse(raw_output_contents=[raw, b"", b"\x01\x00"])
    answer.outputs.add(name="text", datatype="BYTES", shape=[2, 2])
    answer.outputs.add(name="none", datatype="BYTES", shape=[0, 1])
    answer.outputs.add(name="flags", datatype="BOOL", shape=[2])
    found = _wire.parse_response(answer)
    assert found["text"].tolist() == deserialize_bytes_tensor(raw).reshape(2, 2).tolist() == elements.tolist()
    assert found["none"].shape == (0, 1)
    assert found["flags"].tolist() == [True, False]
