"""The messages and calls of Triton's gRPC service that the client uses, for any protobuf that is installed.

Code that protoc generates runs with few versions of protobuf and of grpcio; a client has to live with what its user has
installed (decision 0022). So the messages are declared here, with Triton's names and numbers, and protobuf makes their
classes at import, in a pool of their own: tritonclient's may be in the same process. Fields that the client neither
sends nor reads are left out; protobuf skips them. A contract test compares all of it with tritonclient's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_Type = descriptor_pb2.FieldDescriptorProto
_TYPES = {"bool": _Type.TYPE_BOOL, "int64": _Type.TYPE_INT64, "string": _Type.TYPE_STRING, "bytes": _Type.TYPE_BYTES}
_PARAMETERS = ("map", "parameters", "InferParameter", 4)

# Label, name, type (one of _TYPES, or a message) and number of each field. "choice" is a member of the message's oneof.
_MESSAGES: dict[str, Sequence[tuple[str, str, str, int]]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": [("one", "live", "bool", 1)],
    "ServerReadyRequest": [],
    "ServerReadyResponse": [("one", "ready", "bool", 1)],
    "ModelMetadataRequest": [("one", "name", "string", 1)],
    "ModelMetadataResponse": [("one", "name", "string", 1)],
    "ModelParameter": [("one", "string_value", "string", 1)],
    "ModelConfig": [("one", "name", "string", 1), ("map", "parameters", "ModelParameter", 14)],
    "ModelConfigRequest": [("one", "name", "string", 1)],
    "ModelConfigResponse": [("one", "config", "ModelConfig", 1)],
    "ModelStatisticsRequest": [("one", "name", "string", 1)],
    "ModelStatistics": [("one", "name", "string", 1), ("one", "version", "string", 2)],
    "ModelStatisticsResponse": [("many", "model_stats", "ModelStatistics", 1)],
    "InferParameter": [
        ("choice", "bool_param", "bool", 1),
        ("choice", "int64_param", "int64", 2),
        ("choice", "string_param", "string", 3),
    ],
    "ModelInferRequest": [
        ("one", "model_name", "string", 1),
        ("one", "model_version", "string", 2),
        ("one", "id", "string", 3),
        _PARAMETERS,
        ("many", "inputs", "ModelInferRequest.InferInputTensor", 5),
        ("many", "raw_input_contents", "bytes", 7),
    ],
    "ModelInferRequest.InferInputTensor": [
        ("one", "name", "string", 1),
        ("one", "datatype", "string", 2),
        ("many", "shape", "int64", 3),
    ],
    "ModelInferResponse": [
        ("one", "model_name", "string", 1),
        ("one", "id", "string", 3),
        _PARAMETERS,
        ("many", "outputs", "ModelInferResponse.InferOutputTensor", 5),
        ("many", "raw_output_contents", "bytes", 6),
    ],
    "ModelInferResponse.InferOutputTensor": [
        ("one", "name", "string", 1),
        ("one", "datatype", "string", 2),
        ("many", "shape", "int64", 3),
    ],
    "ModelStreamInferResponse": [
        ("one", "error_message", "string", 1),
        ("one", "infer_response", "ModelInferResponse", 2),
    ],
    "RepositoryIndexRequest": [],
    "RepositoryIndexResponse": [("many", "models", "RepositoryIndexResponse.ModelIndex", 1)],
    "RepositoryIndexResponse.ModelIndex": [
        ("one", "name", "string", 1),
        ("one", "version", "string", 2),
        ("one", "state", "string", 3),
        ("one", "reason", "string", 4),
    ],
    "RepositoryModelLoadRequest": [("one", "model_name", "string", 2)],
    "RepositoryModelLoadResponse": [],
    "RepositoryModelUnloadRequest": [("one", "model_name", "string", 2)],
    "RepositoryModelUnloadResponse": [],
}


def _build() -> dict[str, Any]:
    """The classes of the messages, by name."""
    file = descriptor_pb2.FileDescriptorProto(name="trident/inference.proto", package="inference", syntax="proto3")
    messages: dict[str, Any] = {}
    for name, fields in _MESSAGES.items():
        parent, _, short = name.rpartition(".")
        message = messages[parent].nested_type.add(name=short) if parent else file.message_type.add(name=short)
        messages[name] = message
        for label, field, kind, number in fields:
            added = message.field.add(name=field, number=number, label=_Type.LABEL_OPTIONAL)
            if label in ("many", "map"):
                added.label = _Type.LABEL_REPEATED
            if label == "choice":
                if not message.oneof_decl:
                    message.oneof_decl.add(name="parameter_choice")
                added.oneof_index = 0
            if label == "map":
                entry = message.nested_type.add(name=f"{field.capitalize()}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=_Type.LABEL_OPTIONAL, type=_Type.TYPE_STRING)
                value = entry.field.add(name="value", number=2, label=_Type.LABEL_OPTIONAL, type=_Type.TYPE_MESSAGE)
                value.type_name = f".inference.{kind}"
                kind = f"{name}.{entry.name}"
            if kind in _TYPES:
                added.type = _TYPES[kind]
            else:
                added.type, added.type_name = _Type.TYPE_MESSAGE, f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _MESSAGES
    }


_classes = _build()
ServerLiveRequest = _classes["ServerLiveRequest"]
ServerReadyRequest = _classes["ServerReadyRequest"]
ModelMetadataRequest = _classes["ModelMetadataRequest"]
ModelConfigRequest = _classes["ModelConfigRequest"]
ModelStatisticsRequest = _classes["ModelStatisticsRequest"]
ModelInferRequest = _classes["ModelInferRequest"]
ModelInferResponse = _classes["ModelInferResponse"]
ModelStreamInferResponse = _classes["ModelStreamInferResponse"]
RepositoryIndexRequest = _classes["RepositoryIndexRequest"]
RepositoryModelLoadRequest = _classes["RepositoryModelLoadRequest"]
RepositoryModelUnloadRequest = _classes["RepositoryModelUnloadRequest"]


class Stub:
    """The calls of a channel that have one answer each."""

    def __init__(self, channel: grpc.Channel) -> None:
        def call(name: str) -> Any:
            return channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=_classes[f"{name}Request"].SerializeToString,
                response_deserializer=_classes[f"{name}Response"].FromString,
            )

        self.ServerLive = call("ServerLive")
        self.ServerReady = call("ServerReady")
        self.ModelMetadata = call("ModelMetadata")
        self.ModelConfig = call("ModelConfig")
        self.ModelStatistics = call("ModelStatistics")
        self.ModelInfer = call("ModelInfer")
        self.RepositoryIndex = call("RepositoryIndex")
        self.RepositoryModelLoad = call("RepositoryModelLoad")
        self.RepositoryModelUnload = call("RepositoryModelUnload")
