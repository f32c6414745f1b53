"""A model's Hugging Face folder: what each of its files says, read once.

This is where an error of transformers, tokenizers, safetensors or json is about the user's files: each becomes one
sentence that names the folder, what could not be read, and the library's reason. Code in a folder is run only where
the model's table says `trust_remote_code`, and nothing ever asks for it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import (
    ExportError,
    NoMemory,
    UnreadableSource,
    UnsupportedArchitecture,
    UnsupportedTokenizer,
)
from trident_export.huggingface import sizes, text_part, tokenizer_files
from trident_serving.encoders.pooling import PoolingSettings
from trident_serving.encoders.tokens import TokenRoles

if TYPE_CHECKING:  # transformers takes seconds to import, and a repository that is up to date needs nothing of it
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from trident_export.huggingface.sentence_transformers import SentenceFiles

_LONGEST_REASON = 300
_FEWEST_TOKENS = 16  # of a vocabulary
_EMPTY_PROMPTS = ("query", "document")  # sentence-transformers has these without a file, and nothing in them
# Their text alone ("'pad'") says nothing without the kind.
_TERSE = (KeyError, AttributeError, TypeError, IndexError, AssertionError)
# Types whose models have a tower for images and one for texts, whose vectors lie in one space.
TWO_TOWERS = ("clip", "metaclip_2", "siglip")
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
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch has no class for it
            raise NoMemory(
                f"{folder}: memory ran out while {what} were read: close other programs, take a machine or container "
                "with more, or copy config.json again, if its sizes are not this model's"
            ) from error
        raise UnreadableSource(
            f"{folder}: {what} can't be read ({reason(error)}): copy the model again, or mend that file"
        ) from error


def reason(error: BaseException) -> str:
    """What a library says, as far as it fits into a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is no text in UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"it holds half of a surrogate pair, {error.object[error.start]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".:") if lines else ""
    if "untagged enum" in said:  # serde's, of a JSON file
        return "it has a part of a kind that is not known"
    if not said or isinstance(error, _TERSE):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return said if len(said) <= _LONGEST_REASON else said[: _LONGEST_REASON - 3] + "..."


def inside(folder: Path, named: object, file: str) -> Path:
    """The path that a file of a folder names, which must be in that folder.

    Raises:
        UnreadableSource: it is no text, or leads out of it.
    """
    if not isinstance(named, str) or Path(named).is_absolute() or ".." in Path(named).parts or "\0" in named:
        raise UnreadableSource(
            f"{folder}: {file} names {str(named)[:80]!r}, which is no path inside of the folder: copy the model again"
        )
    return folder / named


def check_files(folder: Path) -> None:
    """Check that a folder holds files that can be read to an end, and that what lists its weights names files in it.

    Raises:
        UnreadableSource: there is a pipe, socket or device, or a path that leads out of the folder.
    """
    for file in folder.rglob("*"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UnreadableSource(f"{folder}: {file.relative_to(folder)} is no regular file: copy the model again")
    for file in folder.glob("*.index.json"):
        with reading(folder, file.name):
            for named in set(HuggingFaceFolder(folder).json(file.name)["weight_map"].values()):
                inside(folder, named, file.name)


class HuggingFaceFolder(os.PathLike[str]):
    """A model's folder. Each file is read when it is first asked for, and once.

    What is handed out of transformers is a copy each time: a call can change a tokenizer's settings.

    Args:
        path: the folder, or for `config` a config.json itself.
        trust_remote_code: run Python code that lies in the folder, as its table of models.toml says.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        self._checked: set[Any] = set()  # heads, by `check_head`

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

    def table(self, name: str) -> Mapping[str, Any]:
        """The content of a JSON file that must be an object.

        Raises:
            UnreadableSource: it is missing, is not JSON, or is something else.
        """
        found = self.json(name)
        if not isinstance(found, dict):
            raise UnreadableSource(f"{self}: {name} must be an object, found {str(found)[:80]!r}: copy the model again")
        return found

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            UnreadableSource: config.json is missing or damaged.
            UnsupportedArchitecture: transformers does not know the architecture.
        """
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raw = self.raw_config
        kind = raw.get("model_type")
        if not isinstance(kind, str):
            raise UnreadableSource(f"{self}: config.json has no model_type, which says what the model is")
        own_code = "AutoConfig" in (raw.get("auto_map") or {})
        if kind not in CONFIG_MAPPING and not (own_code and self.trust_remote_code):
            needed = (
                f"transformers {self._written_by or 'of a later version'}, which wrote it, or a newer one is needed"
            )
            if own_code:
                needed = "its code lies in the folder, and is run only with trust_remote_code = true in its table"
            raise UnsupportedArchitecture(
                f"{self} is a model of type {kind!r}, which transformers {transformers.__version__} does not know: "
                f"{needed}"
            )
        if _release(self._written_by)[:1] > _release(transformers.__version__)[:1]:
            raise UnreadableSource(
                f"{self} was written by transformers {self._written_by}, and {transformers.__version__} may read it "
                "otherwise: install that version or a newer one"
            )
        with self._reading("config.json"):
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
            if self._names_attention:
                config._attn_implementation = "eager"
            return config

    @cached_property
    def _names_attention(self) -> bool:
        """Whether config.json has transformers' private key of what computes attention; here it is always "eager"."""
        return '"_attn_implementation"' in json.dumps(self.raw_config)

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """What config.json says, as it is written there.

        Raises:
            UnreadableSource: it is missing or damaged, or has sizes that no model has.
        """
        file = self.path if self.path.is_file() else self.path / "config.json"
        raw = HuggingFaceFolder(file.parent).json(file.name)
        if not isinstance(raw, dict):
            return {}
        if not isinstance(raw.get("text_config"), dict | None):
            raise UnreadableSource(
                f"{self}: config.json has text_config {str(raw['text_config'])[:80]!r}, which must be an object"
            )
        sizes.check_counts(self, raw)
        return raw

    @property
    def _written_by(self) -> str:
        """The version of transformers that wrote the folder; "" where it does not say."""
        with contextlib.suppress(UnreadableSource):
            return str(self.raw_config.get("transformers_version") or "")
        return ""

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """See `reading`; a folder of a newer transformers says so in the message."""
        import transformers

        try:
            with reading(self.path, what):
                yield
        except UnreadableSource as error:
            if _release(self._written_by) <= _release(transformers.__version__):
                raise
            raise UnreadableSource(
                f"{error}; the folder was written by transformers {self._written_by}, {transformers.__version__} is "
                "installed"
            ) from error

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of what reads and writes text: a part of a multimodal model's, the config itself elsewhere."""
        return self.config.get_text_config()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, in its fast form where it has one.

        Raises:
            UnreadableSource: its files are missing or damaged.
        """
        with self._reading_tokenizer():  # ids of a vocabulary that are twice there fail here
            return copy.deepcopy(self._tokenizer)

    @contextlib.contextmanager
    def _reading_tokenizer(self) -> Iterator[None]:
        """See `reading`; what is known to be wrong with tokenizer.json is said in plain words."""
        try:
            with self._reading("the tokenizer"):
                yield
        except UnreadableSource as error:
            if (fault := tokenizer_files.fault(self)) is None:
                raise
            raise UnreadableSource(
                f"{self}: {fault}: copy the tokenizer's files again, or take another model"
            ) from error

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer_files.check(self)
        from trident_export.huggingface import spm_tokenizer

        spm_tokenizer.let_transformers_read()
        with self._reading_tokenizer():
            found = AutoTokenizer.from_pretrained(self.path, use_fast=True, trust_remote_code=self.trust_remote_code)
        wanted = sorted({"tokenizer.json", *found.vocab_files_names.values()})
        if len(wanted) > 1 and not any((self.path / name).is_file() for name in wanted):
            raise UnreadableSource(f"{self}: {tokenizer_files.NO_VOCABULARY}: copy the tokenizer's files again")
        if found.is_fast and not (self.path / "tokenizer.json").is_file():
            for name in found.vocab_files_names.values():
                if name.endswith(".model") and (self.path / name).is_file():
                    spm_tokenizer.check_conversion(self, self.path / name, found)
        longest = found.model_max_length
        if not isinstance(longest, int | float):
            raise UnreadableSource(
                f"{self}: tokenizer_config.json has model_max_length {str(longest)[:80]!r}, which must be a number"
            )
        return found

    @property
    def fast_tokenizer(self) -> Any:
        """The tokenizer in its fast form, which is what the runtime reads.

        Raises:
            UnreadableSource: its files are missing or damaged.
            UnsupportedTokenizer: it has no fast form.
        """
        if not self._tokenizer.is_fast:
            raise UnsupportedTokenizer(
                f"{self}: {type(self._tokenizer).__name__} has no fast form (tokenizer.json), which the runtime reads, "
                "and transformers can't make one of its files: export a model that has one"
            )
        return self.tokenizer

    def roles(self, prompts: Mapping[str, str] | None = None) -> TokenRoles:
        """Token roles from the tokenizer; prompts from sentence-transformers' file where none are given.

        Raises:
            UnreadableSource: prompts are no texts, or the default one is not among them.
        """
        found, sentence = self._tokenizer, self.sentence
        prompts = dict(sentence.prompts if prompts is None else prompts)
        named = sentence.default_prompt
        if named is not None and named not in (*prompts, *sentence.prompts, *_EMPTY_PROMPTS):
            known = ", ".join(sentence.prompts) or "none"
            raise UnreadableSource(
                f"{self}: config_sentence_transformers.json has default_prompt_name {named[:80]!r}, which is none of "
                f"its prompts ({known}): mend that file, or write a prompt of that name into the model's table"
            )
        default = named if named in prompts else None
        ids = found.unk_token_id, found.cls_token_id, found.mask_token_id
        return TokenRoles(*ids, prompts, default, sentence.counts_prompt, self.padded_to)

    @property
    def padded_to(self) -> int:
        """Tokens that every text is padded to, where the model reads padding as it does text; 0 elsewhere."""
        return int(self.text_config.max_position_embeddings) if self.config.model_type == "siglip" else 0

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
            name, found = "config.json", GenerationConfig.from_model_config(self.config)
        else:
            name = "generation_config.json"
            with reading(self.path, name):
                found = GenerationConfig.from_pretrained(self.path)
        for key, (known, said) in _GENERATION.items():
            value = getattr(found, key, None)
            if value is not None and not known(value):
                raise UnreadableSource(f"{self}: {name} says {key} {value!r:.100}, which is no {said}: mend that file")
        for key in ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids"):
            if not (named := _flat(getattr(found, key, None))):
                continue
            rows = max(getattr(self.text_config, of, 0) or 0 for of in ("vocab_size", "decoder_vocab_size"))
            if rows and max(named) >= rows:
                raise UnreadableSource(
                    f"{self}: {name} names the token {max(named)} in {key}, the model has {rows}: mend that file"
                )
        self._check_answers(found, name)
        return found

    def _check_answers(self, config: GenerationConfig, name: str) -> None:
        """An answer must be able to have a token that does not end it."""
        banned = {row[0] for row in config.bad_words_ids or () if len(row) == 1}
        banned |= {*_flat(config.suppress_tokens), *_flat(config.eos_token_id)}
        first = banned | {*_flat(config.begin_suppress_tokens)}
        if len(first) < _FEWEST_TOKENS:
            return
        rows = max(getattr(self.text_config, of, 0) or 0 for of in ("vocab_size", "decoder_vocab_size"))
        for where, tokens in (("in an answer", banned), ("at the beginning of an answer", first)):
            if rows and sum(0 <= token < rows for token in tokens) == rows:
                raise UnreadableSource(
                    f"{self}: {name} leaves no token {where} but those that end it, so every answer would be empty: "
                    "mend its suppress_tokens, begin_suppress_tokens, bad_words_ids and eos_token_id"
                )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels, in the order of its logits.

        Raises:
            UnreadableSource: one has no name, or one that is no text.
        """
        names = self.config.id2label
        found = tuple(names.get(index) for index in range(self.config.num_labels))
        for index, name in enumerate(found):
            if not is_text(name):
                raise UnreadableSource(
                    f"{self}: config.json has id2label {str(name)[:80]!r} for class {index} of {len(found)}, which "
                    "must be a text"
                )
        return found

    @cached_property
    def longest_input(self) -> int | None:
        """Tokens that the model takes at most, as its files say; None where nothing does.

        Raises:
            UnreadableSource: a file says what is no number, or the padding token is missing where it counts.
        """
        found = [limit for limit in (self.positions, self.sentence.longest_input) if limit]
        return min(found) if found else None

    @cached_property
    def positions(self) -> int | None:
        """Tokens that the model has positions for; None where nothing says.

        Raises:
            UnreadableSource: the padding token is missing where it counts.
        """
        config = self.config
        if config.model_type in TWO_TOWERS:
            config = self.text_config
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:  # LED's, and those of T5Gemma's encoder
            positions = getattr(config, "max_encoder_position_embeddings", None)
            positions = positions or getattr(getattr(config, "encoder", None), "max_position_embeddings", None)
        if not positions or positions <= 0:
            return None
        if config.model_type in _BEGINNING_POSITIONS:
            # These architectures count positions from behind the padding token's id.
            padding = 1 if config.model_type == "mpnet" else self.padding_token  # MPNet's code has it as a number
            if padding is None:
                raise UnreadableSource(
                    f"{self}: config.json has pad_token_id {config.pad_token_id!r}, behind which a model of type "
                    f"{config.model_type!r} counts positions: it must be a token of the vocabulary"
                )
            positions -= padding + 1
        return int(positions)

    @property
    def padding_token(self) -> int | None:
        """The padding token's id of the config, by which some models find a text's end; None where it has none."""
        config = self.config.get_text_config()
        found = getattr(config, "pad_token_id", None)
        known = isinstance(found, int) and 0 <= found < getattr(config, "vocab_size", 0)
        return found if known else None

    @cached_property
    def sentence(self) -> SentenceFiles:
        """What sentence-transformers' files say."""
        from trident_export.huggingface.sentence_transformers import SentenceFiles

        return SentenceFiles(self)

    @property
    def pooling(self) -> PoolingSettings:
        """Pooling and normalization from the model's sentence-transformers files; mean and normalized without them.

        Raises:
            UnsupportedModel: the model has a step that is not supported.
        """
        return self.sentence.settings

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
        if total := sum(self._tensor_sizes):
            return total
        older = sum(file.stat().st_size for file in self.path.glob("pytorch_model*.bin"))
        width = 2 if "16" in str(self.json("config.json").get("torch_dtype")) else 4
        return older // width

    @property
    def tensors(self) -> int:
        """How many tensors the weight files hold, from their headers; 0 where there are no files that say it.

        Raises:
            UnreadableSource: a file is damaged.
        """
        return len(self._tensor_sizes)

    @cached_property
    def _tensor_sizes(self) -> list[int]:
        sizes: list[int] = []
        # Some folders carry the same weights once more in another layout (consolidated.safetensors).
        files = sorted(self.path.glob("model*.safetensors")) or sorted(self.path.glob("*.safetensors"))
        for file in files:
            with reading(self.path, file.name), file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise UnreadableSource(f"{file} is cut off: copy the model again")
                header = json.loads(stream.read(length))
                sizes += [_elements(entry) for name, entry in header.items() if name != "__metadata__"]
        return sizes

    def load(self, head: Any) -> PreTrainedModel:
        """The model in float32, in evaluation mode, with its own attention ("eager"); read again at each call.

        Of a multimodal model, `AutoModelForCausalLM` is its text part.

        Args:
            head: an Auto class of transformers.

        Raises:
            UnreadableSource: weights are missing, damaged or another model's.
            UnsupportedArchitecture: the architecture has no such head.
        """
        return text_part.of(self.load_whole(head), self) if self._multimodal(head) else self.load_whole(head)

    def load_whole(self, head: Any) -> PreTrainedModel:
        """The same, but a multimodal model with all its parts: what a text part is compared with.

        Llama 4's is a wrapper around transformers' own class for text, which fails without images: there it is that.
        """
        import torch
        import transformers

        self.check_head(head)
        multimodal = self._multimodal(head)
        head = multimodal or head
        transformers.utils.logging.disable_progress_bar()  # an export has its own
        own_config = {"config": copy.deepcopy(self.config)} if self._names_attention else {}
        with self._reading("the weights"):
            model, said = head.from_pretrained(
                self.path,
                **own_config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told from what is said of them
            )
        self.check_weights(model, said)
        found: PreTrainedModel = model.eval()
        return text_part.inner(found) or found if multimodal else found

    def check_head(self, head: Any) -> None:
        """Check what config.json and the weight files' headers say of a model with such a head.

        Raises:
            UnreadableSource: the sizes in config.json are not those of the weights.
            UnsupportedArchitecture: the architecture has no such head.
        """
        if head in self._checked:
            return
        found = self._multimodal(head) or head
        own_code = self.trust_remote_code and found.__name__ in (getattr(self.config, "auto_map", None) or {})
        if type(self.config) not in found._model_mapping and not own_code:
            raise UnsupportedArchitecture(
                f"{self} is a model of type {self.config.model_type!r}, for which transformers has no "
                f"{found.__name__.removeprefix('Auto')}: choose another task in models.toml"
            )
        if not own_code:
            sizes.check(self, found)
        self._checked.add(head)

    def reference(self, head: Any) -> PreTrainedModel:
        """The model that the gate compares with: this one, or what it was made from; otherwise as `load_whole`."""
        return self.load_whole(head)

    def _multimodal(self, head: Any) -> Any | None:
        """The Auto class of the whole model, where the head asks for the text part of a multimodal one."""
        if head.__name__ != "AutoModelForCausalLM":
            return None
        if self.config.is_encoder_decoder:
            raise UnsupportedArchitecture(
                f"{self} is a model of type {self.config.model_type!r}, which has an encoder and a decoder, and "
                "text-generation takes decoders alone: choose another task in models.toml"
            )
        return text_part.whole_class(self.config)

    def check_weights(self, model: PreTrainedModel, said: Mapping[str, Any]) -> None:
        """Refuse weights that transformers would replace by random numbers, leave out, or that are no numbers.

        Args:
            said: what `from_pretrained` gives as `output_loading_info`.

        Raises:
            UnreadableSource: there are such weights.
        """
        import torch

        for name, found, wanted in sorted(said["mismatched_keys"]):
            raise UnreadableSource(
                f"{self}: {name} is {list(found)} in the weights and {list(wanted)} by config.json: one of the two is "
                "another model's"
            )
        # A model without a head may come without the pooler that its architecture has.
        missing = sorted(key for key in said["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise UnreadableSource(
                f"{self}: the weights have no {missing[0]}{_and_more(missing)}, which config.json asks for: copy the "
                "model again, or its config.json, if that is another model's"
            )
        modules = dict(model.named_modules())
        shapes = {re.sub(r"\d+", "*", name) for name, _ in model.named_parameters()}
        for name in sorted(said["unexpected_keys"]):
            parent = modules.get(name.rpartition(".")[0])
            leaf = (
                parent is not None
                and not any(parent.children())
                and next(parent.parameters(recurse=False), None) is not None
            )
            if leaf or re.sub(r"\d+", "*", name) in shapes:
                raise UnreadableSource(
                    f"{self}: the weights have {name}, which config.json leaves out: it is another model's, or of "
                    "another version"
                )
        with torch.inference_mode():
            for name, parameter in model.named_parameters():
                if not torch.isfinite(parameter.sum()):
                    raise UnreadableSource(
                        f"{self}: {name} holds numbers that are not finite: copy the model again, or take one whose "
                        "training has not failed"
                    )


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold; JSON can write surrogates, which it can't."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31  # -1 is "none" to some


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tokens(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and row and all(map(_whole, row)) for row in value)


def _flat(value: Any) -> list[int]:
    """Every token of a setting."""
    return (
        [token for part in value for token in _flat(part)]
        if isinstance(value, list)
        else []
        if value is None
        else [value]
    )


# What the settings of a generation config are; transformers takes any value, and fails when it generates.
_GENERATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"), (_number, "number")
    ),
    **dict.fromkeys(
        ("top_k", "num_beams", "max_length", "min_length", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size"),
        (_whole, "whole number"),
    ),
    **dict.fromkeys(
        ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id"),
        (_tokens, "token or list of tokens"),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (_tokens, "list of tokens")),
    "bad_words_ids": (_texts, "list of lists of tokens"),
}


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, of its first three parts; () for none."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _elements(entry: Mapping[str, Any]) -> int:
    count = 1
    for size in entry["shape"]:
        count *= size
    return count
