"""What can go wrong with the exporter, by what its user should do about it.

    ExportError
    ├── UsageError              the command line asks for something impossible
    ├── ModelsFileError         models.toml or recipes.toml does
    ├── TextError               a file of text can't be used
    ├── SourceError             the model can't be had
    │   └── UnreadableSource    its folder is here, and a file in it is missing, damaged or not understood
    ├── UnsupportedModel        Trident has no form for what the model is
    │   ├── UnsupportedArchitecture
    │   ├── UnsupportedTokenizer
    │   ├── NoMatmuls           the recipe finds nothing to quantize
    │   └── GraphTooLarge       beyond a limit of the file format
    ├── EngineError             vLLM is not there, or can't run the model
    ├── FidelityError           a variant is further from Hugging Face than its gate allows
    ├── StoreError              a repository has no such version, or a server does not take it
    ├── NoSpace                 a disk is too full
    ├── NoMemory                the machine, or the container, has too little memory
    ├── NotWritable             a folder belongs to another user, or is read-only
    └── ExportsFailed           some models of several; the others are installed

The message of each is one sentence that says what was found and what to do; it is all that is printed. Anything else
that is raised is a defect of trident-export and is shown with its traceback (see `report`). An error of a library is
translated where it is known whose fault it is: in `folder` for the files of a model, in `disk` for what is written.
"""

from __future__ import annotations

from collections.abc import Mapping


class ExportError(Exception):
    """Something that the user can mend; the message says how."""


class UsageError(ExportError, ValueError):
    """A setting on the command line or of a pass is impossible; the message names it, its value and what is allowed."""


class ModelsFileError(ExportError, ValueError):
    """models.toml says something impossible; the message names table, key, value and what is allowed."""


class TextError(ExportError, ValueError):
    """A file of text can't be read, has no text, or does not fit the model."""


class SourceError(ExportError):
    """The source can't be had; the message says why and what to do."""


class UnreadableSource(SourceError):
    """A model's folder has a file that is missing, damaged, or that transformers does not understand."""


class UnsupportedModel(ExportError, ValueError):
    """The model is whole, and asks for something that Trident does not have."""


class UnsupportedArchitecture(UnsupportedModel):
    """The model computes something that the graphs do not express."""


class UnsupportedTokenizer(UnsupportedModel):
    """The tokenizer is of a kind that is not handled."""


class NoMatmuls(UnsupportedModel):
    """A recipe fits no matmul of a model."""


class GraphTooLarge(UnsupportedModel):
    """A graph is beyond a limit of its file format."""


class EngineError(ExportError):
    """vLLM, which is to compute a model, is not there or can't run it."""


class FidelityError(ExportError):
    """A variant is further from Hugging Face than its gate allows."""


class StoreError(ExportError):
    """A version of a model can't be served, signed or checked; the message says what is served now."""


class NoSpace(ExportError):
    """The disk has too little room."""


class NoMemory(ExportError):
    """There is too little memory for what is asked."""


class NotWritable(ExportError):
    """A folder can't be written by this user."""


class ExportsFailed(ExportError):
    """Some models failed and the others are installed.

    Attributes:
        failures: the sentence of each failed model, by its name.
    """

    def __init__(self, failures: Mapping[str, str], models: int) -> None:
        self.failures = dict(failures)
        lines = [f"{len(failures)} of {models} models failed; what else is in the repository is whole:"]
        lines += [f"  {name}: {reason}" for name, reason in failures.items()]
        super().__init__("\n".join(lines))
