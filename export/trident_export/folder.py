"""A model's Hugging Face folder, read with transformers.

This is where an error of transformers, tokenizers, safetensors or json is about the user's files: each becomes one
sentence that names the folder, what could not be read, and the library's reason. Code in a folder is never run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import ExportError, UnreadableSource, UnsupportedArchitecture, UnsupportedTokenizer

if TYPE_CHECKING:  # transformers takes seconds to import, and a repository that is up to date needs nothing of it
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_LONGEST_REASON = 300
# Their text alone ("'pad'") says nothing without the kind.
_TERSE = (KeyError, AttributeError, TypeError, IndexError, AssertionError)


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Translate what any library raises while it reads a file of the folder.

    Raises:
        UnreadableSource: something was raised that is no ExportError.
    """
    try:
        yield
    except (ExportError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableSource(
            f"{folder}: {what} can't be read ({reason(error)}): copy the model again, or mend that file"
        ) from error


def reason(error: BaseException) -> str:
    """What a library says, as far as it fits into a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".:") if lines else ""
    if not said or isinstance(error, _TERSE):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return said if len(said) <= _LONGEST_REASON else said[: _LONGEST_REASON - 3] + "..."


def settings(folder: Path, name: str) -> Any:
    """The content of a JSON file of the folder.

    Raises:
        UnreadableSource: it is missing or is not JSON.
    """
    with reading(folder, name):
        return json.loads((folder / name).read_text(encoding="utf-8"))


def config(folder: Path) -> PretrainedConfig:
    """The model's configuration.

    Args:
        folder: or a config.json itself.

    Raises:
        UnreadableSource: config.json is missing or damaged.
        UnsupportedArchitecture: transformers does not know the architecture.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder if folder.is_file() else folder / "config.json"
    raw = settings(file.parent, file.name)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise UnreadableSource(f"{folder}: config.json has no model_type, which says what the model is")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedArchitecture(
            f"{folder} is a model of type {kind!r}, which transformers {transformers.__version__} does not know: "
            "export another model"
        )
    with reading(folder, "config.json"):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def tokenizer(folder: Path) -> Any:
    """The tokenizer, in its fast form where it has one.

    Raises:
        UnreadableSource: its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    with reading(folder, "the tokenizer"):
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)


def fast_tokenizer(folder: Path) -> Any:
    """The tokenizer in its fast form, which is what the runtime reads.

    Raises:
        UnreadableSource: its files are missing or damaged.
        UnsupportedTokenizer: it has no fast form.
    """
    found = tokenizer(folder)
    if not found.is_fast:
        raise UnsupportedTokenizer(
            f"{folder}: {type(found).__name__} has no fast form (tokenizer.json), which the runtime reads: "
            "export a model that has one"
        )
    return found


def generation_config(folder: Path) -> GenerationConfig:
    """The generation config; older models keep these settings in their config.

    Raises:
        UnreadableSource: it is damaged.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(config(folder))
    with reading(folder, "generation_config.json"):
        return GenerationConfig.from_pretrained(folder)


def model(head: Any, folder: Path) -> PreTrainedModel:
    """The model in float32, in evaluation mode.

    Args:
        head: an Auto class of transformers.

    Raises:
        UnreadableSource: weights are missing or damaged.
        UnsupportedArchitecture: the architecture has no such head.
    """
    import torch

    found = config(folder)
    if type(found) not in head._model_mapping:
        raise UnsupportedArchitecture(
            f"{folder} is a model of type {found.model_type!r}, for which transformers has no "
            f"{head.__name__.removeprefix('Auto')}: choose another task in models.toml"
        )
    with reading(folder, "the weights"):
        return head.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def parameters(folder: Path) -> int:
    """How many numbers the weight files hold, from their headers; 0 where there are no files that say it.

    Raises:
        UnreadableSource: a file is damaged.
    """
    total = 0
    # Some folders carry the same weights once more in another layout (consolidated.safetensors).
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    for file in files:
        with reading(folder, file.name), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise UnreadableSource(f"{file} is cut off: copy the model again")
            total += sum(map(_elements, json.loads(stream.read(length)).values()))
    if total:
        return total
    older = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    width = 2 if "16" in str(settings(folder, "config.json").get("torch_dtype")) else 4
    return older // width


def _elements(entry: Mapping[str, Any]) -> int:
    count = 1
    for size in entry.get("shape", (0,)):  # "__metadata__" has none
        count *= size
    return count
