"""The stages of an encoder in a repository, with a graph that runs in this process or on a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trident_client import Client
from trident_export import configs
from trident_export.errors import TextError
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import VERSION
from trident_serving.encoders import TASKS
from trident_serving.explanation.encoders import EncoderStages, Graph, Reading, Tensors
from trident_serving.triton.onnx_backend import OnnxModel

# Of a server's answer and ours: two machines sum float32 in another order, and int8 rounds that up.
_TOLERANCE = 1e-2


def stages(spec: ModelSpec, repository: Path, graph: Graph) -> EncoderStages:
    """A model's stages with a graph of one of its variants."""
    assert spec.encoder is not None
    first, last = (repository / name / VERSION for name in (configs.first_stage(spec), f"{spec.name}_postprocess"))
    return EncoderStages(spec.name, TASKS[spec.task], spec.encoder, first, last, graph)


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


def compare(
    stages: EncoderStages, client: Client, model: str, reading: Reading, outputs: Mapping[str, NDArray[Any]]
) -> None:
    """Ask a server for its whole answer, which must be the one that is explained.

    Raises:
        TextError: it is another one.
        TridentError: the server refuses the text, or can't be asked.
    """
    ours = stages.answer(reading, outputs)
    theirs = client.infer(model, reading.request)
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
