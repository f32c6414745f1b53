"""One call of torch's exporter for every graph, and what its failures mean.

The exporter is the one that records a run (`dynamo=False`): see decision 0036 for what it is chosen over and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from trident_export.errors import ExportError, UnsupportedArchitecture
from trident_export.huggingface.folder import reason

OPSET = 17


def trace(
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    of: str,
    operators: bool = True,
) -> None:
    """Write the graph of one run of `module` to `path`; weights beyond 2 GB go to files next to it.

    Args:
        arguments: the run's inputs, in the order of `inputs`.
        axes: names of the sizes that may differ from run to run, by input or output and dimension.
        of: what is traced, as errors name it.
        operators: whether the graph has ONNX Runtime's own operators.

    Raises:
        UnsupportedArchitecture: the model can't be run like this, or does what ONNX can't express.
    """
    with running(of), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants: shapes are checked by the gate
        torch.onnx.export(
            module.eval(),  # the exporter restores this mode on the model
            tuple(arguments),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(sizes) for name, sizes in axes.items()},
            opset_version=OPSET,
            dynamo=False,
            custom_opsets={"com.microsoft": 1} if operators else None,
        )


@contextmanager
def running(of: str) -> Iterator[None]:
    """Translate what a model's own code raises.

    Args:
        of: what is run, as the error names it.

    Raises:
        UnsupportedArchitecture: something was raised that is no ExportError, and not for want of memory or disk.
    """
    try:
        yield
    except (ExportError, MemoryError, OSError):
        raise
    except Exception as error:  # a model's own code can raise anything
        said = f"{of} can't be traced to a graph ({reason(error)}): choose another model"
        raise UnsupportedArchitecture(said) from error
