"""GGUF files as plain Hugging Face folders, dequantized tensor by tensor.

What transformers knows of GGUF is used as it is: its tables of settings and of the order of rows, its tokenizers; the
formats' blocks are gguf's own. Three things it leaves out, and answers would be wrong without them: the scaling of
rotary embeddings, soft caps and windows, and how some vocabularies part a text before they merge. A setting or tensor
that neither it nor this module knows is refused by its name.
Keys: the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_export.errors import UnreadableSource, UnsupportedArchitecture, UnsupportedTokenizer
from trident_export.huggingface.folder import reading
from trident_export.huggingface.quantized import write_shards

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PretrainedConfig

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# Tensors that say something about rotary embeddings, which the config holds.
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Settings of an architecture that change nothing here, or are read below, beside those of transformers' own table.
_KNOWN = frozenset(
    {
        "vocab_size",
        "context_length",
        "attention.key_length",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "attention.causal",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.finetuned",
        "use_parallel_residual",
        "tensor_data_layout",
    }
)
# What tells one way to part a text from another.
_PROBES = ("The  12 cats' 345 toys, it\u2019s\n\n  caf\u00e9 \u4f60\u597d \u043c\u0438\u0440", " a", "<s> x")
# Entries of a list that says something about the model; the longer ones are a vocabulary's.
_LONGEST_LIST = 4096
# Byte-level vocabularies by `tokenizer.ggml.pre`: whose digits are parted one by one before GPT-2's rule, and more.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# SentencePiece vocabularies of models that put no space before a text; older files do not say so.
_WITHOUT_PREFIX = frozenset({"gemma", "gemma2", "gemma3", "gemma4"})
_AS_GPT2 = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling"})
_AS_QWEN2 = frozenset({"stablelm2", "hunyuan-dense"})


class GgufFile:
    """A GGUF file, or the files that one was split into.

    Args:
        path: the file; of several, any of them.

    Raises:
        UnreadableSource: it is damaged, or one of several is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _parts(path)
        with reading(path, "the GGUF file"):
            self._readers = [_reader(file) for file in self.files]
        self._fields: dict[str, Any] = {
            key: field.contents() for key, field in self._readers[0].fields.items() if field.data
        }
        self._architecture = str(self._fields.get("general.architecture"))

    @cached_property
    def parameters(self) -> int:
        """How many numbers the tensors have."""
        return sum(int(tensor.n_elements) for tensor in self._tensors())

    def _tensors(self) -> Iterator[Any]:
        return (tensor for reader in self._readers for tensor in reader.tensors)

    def _setting(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"{self._architecture}.{name}", default)

    def write(self, folder: Path, *, weights: bool = True) -> None:
        """Write the Hugging Face folder: float32 weights, config, tokenizer and generation config.

        Args:
            weights: False leaves them out where they can be left out.

        Raises:
            UnsupportedArchitecture, UnsupportedTokenizer: the file has something that is not known.
            UnreadableSource: a tensor is missing or has another shape.
        """
        from transformers.integrations.gguf import is_gguf_arch_supported

        with reading(self.path, "the GGUF file"):
            if is_gguf_arch_supported(self._architecture):
                self._write_newer(folder)
            else:
                config = self._config()
                if weights:
                    write_shards(self._weights(config), folder)
                config.save_pretrained(folder)
        with reading(self.path, "the tokenizer in the GGUF file"):
            _save_tokenizer(self.files[0], folder)
        (folder / "generation_config.json").write_text(json.dumps(self._generation(), indent=2) + "\n")

    def _write_newer(self, folder: Path) -> None:
        """Write a model that transformers reads by itself, whole: hybrids, whose tensors are arranged anew."""
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        if len(self.files) > 1:
            raise UnsupportedArchitecture(
                f"{self.path} is one of {len(self.files)} files of a model of the architecture {self._architecture!r}, "
                "which is read from one file: join them with llama-gguf-split --merge"
            )
        model, report = AutoModelForCausalLM.from_pretrained(
            self.path.parent,
            gguf_file=self.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise UnreadableSource(f"{self.path} has no tensor for {missing[0]}: copy the file again")
        if unknown := sorted(report["unexpected_keys"]):
            raise UnsupportedArchitecture(
                f"{self.path} has the tensor {unknown[0]}, which transformers' {type(model).__name__} does not have: "
                "export the original model"
            )
        model.save_pretrained(folder)

    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        found = self._as_transformers_reads()
        known = {*GGUF_CONFIG_MAPPING.get(str(found.get("model_type")).removesuffix("_text"), {}), *_KNOWN}
        prefix = f"{self._architecture}."
        names = [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]
        if unknown := [name for name in names if name not in known]:
            raise UnsupportedArchitecture(
                f"{self.path} has the setting {prefix}{unknown[0]}, which is not read: export the original model"
            )
        found |= self._left_out(found)
        try:
            config = AutoConfig.for_model(**found)
        except ValueError as error:
            raise UnsupportedArchitecture(
                f"{self.path} is of the architecture {self._architecture!r}, for which transformers has no model: "
                "export the original model"
            ) from error
        config.architectures = [_model_class(config, self.path).__name__]
        return config

    def _as_transformers_reads(self) -> dict[str, Any]:
        """The config by transformers' own table; of a copy without the vocabulary, which it reads for a long while."""
        from gguf import GGUFWriter
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            slim = Path(folder) / "slim.gguf"
            writer = GGUFWriter(slim, self._architecture)
            for key, field in self._readers[0].fields.items():
                wanted = key.startswith(f"{self._architecture}.") or key == "general.name" or key.endswith("_token_id")
                if wanted and field.data:
                    writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
            for tensor in self._tensors():
                writer.add_tensor(tensor.name, tensor.data.reshape(-1)[:0].astype("float32"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            try:
                found: dict[str, Any] = load_gguf_checkpoint(slim)["config"]
            except ValueError as error:
                raise UnsupportedArchitecture(
                    f"{self.path} is of the architecture {self._architecture!r}, which transformers does not read from "
                    "GGUF: export the original model"
                ) from error
        return found

    def _left_out(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What transformers' table leaves out of the config."""
        kind, heads = found.get("model_type"), self._setting("attention.head_count")
        shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in self._tensors()}
        more: dict[str, Any] = {"vocab_size": shapes["token_embd.weight"][0]}
        # A class's own defaults are those of one checkpoint.
        more |= {f"{name}_token_id": None for name in ("bos", "eos", "pad")} | self._special_ids()
        if kind == "gpt2":
            more["n_positions"] = self._setting("context_length")
        size = self._setting("attention.key_length") or self._setting("embedding_length", 0) // (heads or 1)
        if kind in ("gemma2", "gemma3_text"):
            # The largest of each family divides by other numbers than its heads have; the others by the heads' size.
            large = self._setting("block_count") == (46 if kind == "gemma2" else 62)
            more["query_pre_attn_scalar"] = self._setting("embedding_length") // heads if large else size
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                more[name] = self._setting(name, None)
        elif self._setting("attn_logit_softcapping") or self._setting("final_logit_softcapping"):
            raise UnsupportedArchitecture(
                f"{self.path} has soft caps, which are read for Gemma alone: export the original model"
            )
        if kind in ("qwen2_moe", "qwen3_moe"):
            more["moe_intermediate_size"] = self._setting("expert_feed_forward_length")
        if shared := self._setting("expert_shared_feed_forward_length"):
            more["shared_expert_intermediate_size"] = shared
        if kind in ("llama", "mistral", "qwen3", "qwen3_moe"):
            more["head_dim"] = size
        if kind in ("phi3", "mistral", "starcoder2") and (window := self._setting("attention.sliding_window")):
            more["sliding_window"] = window
        rotated = self._setting("rope.dimension_count", size)
        if rotated != size and kind in ("phi3", "stablelm", "nemotron"):
            more["partial_rotary_factor"] = rotated / size
        elif rotated != size and kind not in ("gpt2", "bloom", "falcon", "t5", "umt5", "gemma4_text"):
            raise UnsupportedArchitecture(
                f"{self.path} rotates {rotated} of {size} numbers of a head, which is not read for "
                f"{self._architecture}: export the original model"
            )
        return more | self._rotation(kind)

    def _rotation(self, kind: str | None) -> dict[str, Any]:
        """Scaled rotary embeddings, as `rope_scaling` and what belongs to it."""
        tensors = {tensor.name: tensor.data.astype(float) for tensor in self._tensors() if tensor.name in _ROTARY}
        scaling, factor = self._setting("rope.scaling.type", "none"), self._setting("rope.scaling.factor", 1.0)
        original = self._setting("rope.scaling.original_context_length")
        if "rope_factors_long.weight" in tensors:
            length = self._setting("context_length")
            settings = {
                "rope_type": "longrope",
                "long_factor": _numbers(tensors["rope_factors_long.weight"]),
                "short_factor": _numbers(tensors["rope_factors_short.weight"]),
            }
            if (attention := self._setting("rope.scaling.attn_factor")) is not None:
                settings["attention_factor"] = attention
            return {
                "rope_scaling": settings,
                "original_max_position_embeddings": original or length,
                "max_position_embeddings": length,
            }
        if "rope_freqs.weight" in tensors:
            return {"rope_scaling": self._llama3(tensors["rope_freqs.weight"])}
        if scaling in ("none", None) or factor in (0.0, 1.0):
            return {}
        if scaling == "linear" and kind == "gemma3_text":
            base = self._setting("rope.freq_base")
            full = {"rope_type": "linear", "factor": factor, "rope_theta": base}
            local = {"rope_type": "default", "rope_theta": self._setting("rope.freq_base_swa", 10000.0)}
            return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
        if scaling == "linear":
            return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
        if scaling == "yarn" and original and self._setting("rope.scaling.attn_factor") is None:
            return {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original,
                }
            }
        raise UnsupportedArchitecture(
            f"{self.path} scales rotary embeddings by {scaling!r}, which is not read: export the original model"
        )

    def _llama3(self, divisors: Any) -> dict[str, Any]:
        """Llama 3's scaling, whose divisors the file has; they must be those that its formula gives.

        transformers.modeling_rope_utils, `rope_type` "llama3".
        """
        largest = float(divisors.max())
        for original in (8192, 4096, 16384, 32768):
            settings = {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            expected = _llama3_divisors(self._setting("rope.freq_base", 10000.0), 2 * len(divisors), largest, original)
            if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, divisors.tolist(), strict=True)):
                return settings
        raise UnsupportedArchitecture(
            f"{self.path} divides rotary frequencies by numbers that no scaling of Llama 3's gives: export the "
            "original model"
        )

    def _weights(self, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """The tensors by transformers' names, float32, one at a time."""
        import numpy as np
        import torch
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        with torch.device("meta"):
            model = _model_class(config, self.path)(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=config.to_dict())
        names = _names(self._architecture, config, processor, [*model.state_dict()])
        # Weights of experts have names without an ending.
        target = {
            tensor.name: names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"), "")
            for tensor in self._tensors()
        }
        waiting = Counter(target.values())
        # Some of transformers' names take several tensors of the file; those are put together in here.
        joined: dict[str, Tensor] = {}
        written: set[str] = set()
        for tensor in self._tensors():
            if tensor.name in _ROTARY:
                continue
            values = _dequantized(tensor)
            result = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": joined}
            )
            name = target[tensor.name]
            if result.name is not None:
                if result.name not in names:
                    raise UnsupportedArchitecture(
                        f"{self.path} has the tensor {tensor.name}, which transformers' {type(model).__name__} does "
                        "not have: export the original model"
                    )
                name = names[result.name]
                joined[name] = torch.from_numpy(np.array(result.weights, dtype=np.float32, order="C"))
            waiting[name] -= 1
            for done in [key for key in joined if waiting[key] <= 0]:
                value = joined.pop(done)
                if tuple(value.shape) != shapes.get(done, tuple(value.shape)):
                    raise UnreadableSource(
                        f"{self.path}: {tensor.name} has the shape {tuple(value.shape)}, and its settings ask for "
                        f"{shapes[done]}: copy the file again"
                    )
                written.add(done)
                yield done, value
        if missing := sorted(set(shapes) - written):
            raise UnreadableSource(f"{self.path} has no tensor for {missing[0]}: copy the file again")

    def _special_ids(self) -> dict[str, int | list[int]]:
        """The tokens that begin, end and fill; an answer ends where the text does, a turn, or a call of a tool."""
        named: dict[str, Any] = {
            name: self._fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")
        }
        ends = list(dict.fromkeys(int(named[name]) for name in ("eos", "eot", "eom") if named[name] is not None))
        found: dict[str, int | list[int]] = {}
        if named["bos"] is not None:
            found["bos_token_id"] = int(named["bos"])
        if ends:
            found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        if (padding := self._fields.get("tokenizer.ggml.padding_token_id")) is not None:
            found["pad_token_id"] = int(padding)
        return found

    def _generation(self) -> dict[str, Any]:
        """The generation config: tokens that end an answer, and how tokens are chosen where the file says it."""
        found: dict[str, Any] = dict(self._special_ids())
        sampling = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        chosen = {name: self._fields.get(f"general.sampling.{key}") for key, name in sampling.items()}
        given = {name: value for name, value in chosen.items() if value is not None}
        return found | ({"do_sample": True} | given if given else {})


def _parts(path: Path) -> list[Path]:
    match = _PART.search(path.name)
    if match is None:
        return [path]
    count, stem = int(match[2]), path.name[: match.start()]
    files = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UnreadableSource(f"{path} is one of {count} files, and {missing[0]} is not beside it: copy it too")
    return files


def _reader(path: Path) -> Any:
    """A reader that skips a vocabulary's lists, of which gguf's own makes a million small arrays."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
                if kind == GGUFValueType.STRING:
                    end = orig_offs + 12
                    for _ in range(count):
                        end += 8 + int(struct.unpack_from("<Q", self.data, end)[0])
                    return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType.STRING]
                if count > _LONGEST_LIST and kind in self.gguf_scalar_to_np:
                    size = self.gguf_scalar_to_np[GGUFValueType(kind)](0).nbytes
                    return 12 + size * count, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


def _dequantized(tensor: Any) -> Any:
    """A tensor's values, float32 as gguf computes them; gguf goes through 16 rows at a time, so they are made long."""
    import gguf

    shape = tensor.data.shape
    rows = math.prod(shape[:-1])
    long = tensor.data.reshape(rows // math.gcd(rows, 256), -1)
    return gguf.dequantize(long, tensor.tensor_type).reshape(*shape[:-1], -1)


def _model_class(config: PretrainedConfig, path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedArchitecture(
            f"{path} is a model of type {config.model_type!r}, which writes no text by itself: export the original"
        )
    return AutoModelForCausalLM._model_mapping[type(config)]


def _names(architecture: str, config: PretrainedConfig, processor: Any, state: list[str]) -> dict[str, str]:
    """The names that transformers has for tensors, by the file's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in state:
        key = processor.preprocess_name(name)
        stem, _, suffix = key.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = key, ""
        # Some files are of the model within the model that writes.
        found = table.get_name(stem) or table.get_name(stem.partition(".")[2])
        ending = f".{suffix}" if suffix else ""
        if found is None:
            processor.perform_fallback_tensor_mapping(names, ending, "", key)
        else:
            names.setdefault(found + ending, key)
    return names


def _llama3_divisors(base: float, size: int, factor: float, original: int) -> list[float]:
    found = []
    for index in range(0, size, 2):
        turns = original / (2 * math.pi * base ** (index / size))
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values]


def _save_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer as Hugging Face files.

    Raises:
        UnsupportedTokenizer: it is of a kind that transformers does not build, or parts texts by an unknown rule.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

    architecture, vocabulary, settings = get_gguf_tokenizer(str(path))
    kind = vocabulary.get("tokenizer_type")
    if kind not in GGUF_TOKENIZER_TYPES:
        raise UnsupportedTokenizer(
            f"{path.name} has a {kind!r} tokenizer; {', '.join(GGUF_TOKENIZER_TYPES)} are handled: export the original "
            "model"
        )
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    if kind == "gpt2":
        _split(path, tokenizer, vocabulary.get("pre_tokenizer_type"))
    elif kind == "llama":
        _set_prefix(tokenizer, vocabulary.get("add_prefix_space", architecture not in _WITHOUT_PREFIX))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{key: value for key, value in settings.items() if value is not None},
    )
    fast.save_pretrained(str(folder))
    again = AutoTokenizer.from_pretrained(folder)
    if [again(text).input_ids for text in _PROBES] != [fast(text).input_ids for text in _PROBES]:
        raise UnsupportedTokenizer(
            f"{path.name} has a tokenizer that transformers reads as a {type(again).__name__}, which gives other "
            "tokens: export the original model"
        )


def _split(path: Path, tokenizer: Tokenizer, rule: str | None) -> None:
    """Set how a byte-level vocabulary parts a text, where transformers takes GPT-2's rule for want of another."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if rule in _SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule in _AS_QWEN2:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif rule not in _AS_GPT2 and rule not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UnsupportedTokenizer(
            f"{path.name} parts texts by the rule {rule!r} (tokenizer.ggml.pre), which is not known: export the "
            "original model, or convert it to GGUF anew"
        )


def _set_prefix(tokenizer: Tokenizer, prefix: bool) -> None:
    """A space before every text, as SentencePiece has it and llama.cpp reads the file; or none.

    transformers' own for Llama puts one only where a text does not begin with one.
    """
    from tokenizers import normalizers, pre_tokenizers

    if prefix:
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(space), None
    else:
        never = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never", split=False)
        tokenizer.normalizer, tokenizer.pre_tokenizer = None, never
