"""A model's Hugging Face folder: what each of its files says, read once.

This is where an error of transformers, tokenizers, safetensors or json is about the user's files: each becomes one
sentence that names the folder, what could not be read, and the library's reason. Code in a folder is never run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import (
    ExportError,
    UnreadableSource,
    UnsupportedArchitecture,
    UnsupportedModel,
    UnsupportedTokenizer,
)
from trident_serving.encoders.pooling import Pooling, PoolingSettings
from trident_serving.encoders.tokens import TokenRoles

if TYPE_CHECKING:  # transformers takes seconds to import, and a repository that is up to date needs nothing of it
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_LONGEST_REASON = 300
# Their text alone ("'pad'") says nothing without the kind.
_TERSE = (KeyError, AttributeError, TypeError, IndexError, AssertionError)
_POOLING_MODES = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
    "pooling_mode_max_tokens": Pooling.MAX,
}
_BEGINNING_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text")


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


class HuggingFaceFolder(os.PathLike[str]):
    """A model's folder. Each file is read when it is first asked for, and once.

    What is handed out of transformers is a copy each time: a call can change a tokenizer's settings.

    Args:
        path: the folder, or for `config` a config.json itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def json(self, name: str) -> Any:
        """The content of a JSON file of the folder.

        Raises:
            UnreadableSource: it is missing or is not JSON.
        """
        with reading(self.path, name):
            return json.loads((self.path / name).read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            UnreadableSource: config.json is missing or damaged.
            UnsupportedArchitecture: transformers does not know the architecture.
        """
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        file = self.path if self.path.is_file() else self.path / "config.json"
        raw = HuggingFaceFolder(file.parent).json(file.name)
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if not isinstance(kind, str):
            raise UnreadableSource(f"{self}: config.json has no model_type, which says what the model is")
        if kind not in CONFIG_MAPPING:
            raise UnsupportedArchitecture(
                f"{self} is a model of type {kind!r}, which transformers {transformers.__version__} does not know: "
                "export another model"
            )
        with reading(self.path, "config.json"):
            return transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, in its fast form where it has one.

        Raises:
            UnreadableSource: its files are missing or damaged.
        """
        return copy.deepcopy(self._tokenizer)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with reading(self.path, "the tokenizer"):
            return AutoTokenizer.from_pretrained(self.path, use_fast=True, trust_remote_code=False)

    @property
    def fast_tokenizer(self) -> Any:
        """The tokenizer in its fast form, which is what the runtime reads.

        Raises:
            UnreadableSource: its files are missing or damaged.
            UnsupportedTokenizer: it has no fast form.
        """
        if not self._tokenizer.is_fast:
            raise UnsupportedTokenizer(
                f"{self}: {type(self._tokenizer).__name__} has no fast form (tokenizer.json), which the runtime reads: "
                "export a model that has one"
            )
        return self.tokenizer

    def roles(self, prompts: Mapping[str, str] | None = None) -> TokenRoles:
        """Token roles from the tokenizer; prompts from sentence-transformers' file where none are given."""
        found, name = self._tokenizer, "config_sentence_transformers.json"
        if prompts is None:
            prompts = self.json(name).get("prompts") or {} if (self.path / name).exists() else {}
        return TokenRoles(found.unk_token_id, found.cls_token_id, found.mask_token_id, dict(prompts))

    @property
    def generation_config(self) -> GenerationConfig:
        """The generation config; older models keep these settings in their config.

        Raises:
            UnreadableSource: it is damaged.
        """
        return copy.deepcopy(self._generation_config)

    @cached_property
    def _generation_config(self) -> GenerationConfig:
        from transformers import GenerationConfig

        if not (self.path / "generation_config.json").exists():
            return GenerationConfig.from_model_config(self.config)
        with reading(self.path, "generation_config.json"):
            return GenerationConfig.from_pretrained(self.path)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels, in the order of its logits."""
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    @cached_property
    def longest_input(self) -> int | None:
        """Tokens that the model takes at most; None where nothing says."""
        config, limits = self.config, []
        positions = getattr(config, "max_position_embeddings", None)
        if positions and positions > 0:
            # These architectures count positions from behind the padding token's id.
            padding = 1 if config.model_type == "mpnet" else config.pad_token_id  # MPNet's code has it as a number
            limits.append(positions - padding - 1 if config.model_type in _BEGINNING_POSITIONS else positions)
        name = "sentence_bert_config.json"
        if (self.path / name).exists():
            limits.append(self.json(name).get("max_seq_length") or 0)
        found = [limit for limit in limits if limit]
        return min(found) if found else None

    @cached_property
    def pooling(self) -> PoolingSettings:
        """Pooling and normalization from the model's sentence-transformers files; mean and normalized without them.

        Raises:
            UnsupportedModel: the model has a step that is not supported.
        """
        file = self.path / "modules.json"
        if not file.exists():
            return PoolingSettings(Pooling.MEAN, normalize=True)
        with reading(self.path, file.name):
            modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in self.json(file.name)}
        unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
        if unknown:
            raise UnsupportedModel(f"the model has the modules {', '.join(unknown)}, which are not supported")
        if "Pooling" not in modules:
            raise UnsupportedModel(f"{file} names no Pooling step, without which there is no one vector a text")
        settings = self.json(f"{modules['Pooling']}/config.json")
        active = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
        if len(active) != 1 or active[0] not in _POOLING_MODES:
            raise UnsupportedModel(f"the model pools by {active}; supported is one of {', '.join(_POOLING_MODES)}")
        return PoolingSettings(_POOLING_MODES[active[0]], normalize="Normalize" in modules)

    @cached_property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in self.path.glob(kind))

    @cached_property
    def parameters(self) -> int:
        """How many numbers the weight files hold, from their headers; 0 where there are no files that say it.

        Raises:
            UnreadableSource: a file is damaged.
        """
        total = 0
        # Some folders carry the same weights once more in another layout (consolidated.safetensors).
        files = sorted(self.path.glob("model*.safetensors")) or sorted(self.path.glob("*.safetensors"))
        for file in files:
            with reading(self.path, file.name), file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise UnreadableSource(f"{file} is cut off: copy the model again")
                total += sum(map(_elements, json.loads(stream.read(length)).values()))
        if total:
            return total
        older = sum(file.stat().st_size for file in self.path.glob("pytorch_model*.bin"))
        width = 2 if "16" in str(self.json("config.json").get("torch_dtype")) else 4
        return older // width

    def load(self, head: Any) -> PreTrainedModel:
        """The model in float32, in evaluation mode, with its own attention ("eager"); read again at each call.

        Args:
            head: an Auto class of transformers.

        Raises:
            UnreadableSource: weights are missing or damaged.
            UnsupportedArchitecture: the architecture has no such head.
        """
        import torch

        if type(self.config) not in head._model_mapping:
            raise UnsupportedArchitecture(
                f"{self} is a model of type {self.config.model_type!r}, for which transformers has no "
                f"{head.__name__.removeprefix('Auto')}: choose another task in models.toml"
            )
        with reading(self.path, "the weights"):
            return head.from_pretrained(
                self.path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            ).eval()

    def reference(self, head: Any) -> PreTrainedModel:
        """The model that the gate compares with: this one, or what it was made from; otherwise as `load`."""
        return self.load(head)


def _elements(entry: Mapping[str, Any]) -> int:
    count = 1
    for size in entry.get("shape", (0,)):  # "__metadata__" has none
        count *= size
    return count
