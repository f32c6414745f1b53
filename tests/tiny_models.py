"""Hugging Face folders of real architectures with random weights, small enough for a test."""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    MPNetTokenizer,
    NllbTokenizer,
    OPTConfig,
    PegasusTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    XLMRobertaTokenizer,
)
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

from trident_export import corpora

VOCABULARY = 512
EOS = "<|end|>"


Settings = ParamSpec("Settings")


@functools.cache
def _shelf() -> Path:
    """Where the models lie that were made in this process."""
    folder = tempfile.mkdtemp(prefix="trident-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def made_once(
    make: Callable[Concatenate[Path, Settings], Path],
) -> Callable[Concatenate[Path, Settings], Path]:
    """Several files' tests want the same model: it is made for the first and copied for the others."""
    made: dict[str, Path] = {}

    @functools.wraps(make)
    def copied(folder: Path, *arguments: Settings.args, **settings: Settings.kwargs) -> Path:
        key = repr((arguments, sorted(settings.items())))
        if key not in made:
            made[key] = make(_shelf() / f"{make.__name__}-{len(made)}", *arguments, **settings)
        shutil.copytree(made[key], folder, dirs_exist_ok=True)
        return folder

    return copied


def causal_config(architecture: str, context: int = 128) -> PretrainedConfig:
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "llama":
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            **shared,
        )
    if architecture == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=context, **shared)
    if architecture == "opt":
        return OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            word_embed_proj_dim=32,
            **shared,
        )
    if architecture == "qwen2":
        return Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            **shared,
        )
    return hybrid_config(architecture, context=context)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpora.held_out(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary in the class that transformers takes for a Qwen2 folder, whatever the folder says."""
    model = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, unk_token=None, eos_token=EOS, pad_token=EOS)


@made_once
def make_causal(folder: Path, architecture: str, seed: int = 0, context: int = 128) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(causal_config(architecture, context)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # the default initialization is so flat that every token is as likely
    model.save_pretrained(folder)
    (qwen2_tokenizer() if architecture == "qwen2" else byte_level_tokenizer()).save_pretrained(folder)
    return folder


@made_once
def make_encoder(folder: Path, source_tokenizer: Path, seed: int = 0) -> Path:
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source_tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    AutoModel.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _counted(split: Callable[[str], list[tuple[str, Any]]]) -> Counter[str]:
    """The words of the texts. Vocabularies are counted, not trained: training gives another one in each process."""
    return Counter(word for text in corpora.held_out() for word, _ in split(text))


def _most_common(counts: Counter[str], most: int) -> list[str]:
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def _letters(counts: Counter[str]) -> Counter[str]:
    letters: Counter[str] = Counter()
    for word, count in counts.items():
        for letter in word:
            letters[letter] += count
    return letters


def wordpiece_tokenizer(kind: str = "bert") -> PreTrainedTokenizerFast:
    """A WordPiece vocabulary in the real tokenizer class of a family."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = _counted(lambda text: pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = _most_common(_letters(words), 120)
    if kind == "mpnet":
        special = ["<pad>", "[UNK]", "<s>", "</s>", "<mask>"]
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *_most_common(words, 500)])
    vocabulary = {piece: index for index, piece in enumerate(list(pieces)[:VOCABULARY])}
    classes = {"bert": BertTokenizer, "distilbert": DistilBertTokenizer, "mpnet": MPNetTokenizer}
    return classes[kind](vocab=vocabulary)


def roberta_tokenizer(kind: str = "roberta") -> PreTrainedTokenizerFast:
    """A trained byte-level vocabulary; ModernBERT's tokenizer is one with BERT's special tokens."""
    bert = kind == "modernbert"
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpora.held_out(), trainer)
    cls, pad, sep, unk, mask = special
    roles = {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk, "mask_token": mask}
    if bert:
        trained.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=[(cls, 0), (sep, 2)]
        )
        names = ["input_ids", "attention_mask"]
        return PreTrainedTokenizerFast(tokenizer_object=trained, model_input_names=names, **roles)
    model = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """A vocabulary as SentencePiece's Unigram has it, behind the special tokens."""
    split = pre_tokenizers.Metaspace()
    words = _counted(lambda text: split.pre_tokenize_str(unicodedata.normalize("NFKC", text)))
    letters = _letters(words)
    pieces = dict.fromkeys([*_most_common(letters, 150), *_most_common(words, 500)])
    total, room = sum(words.values()), VOCABULARY - len(special)
    scored = [(piece, math.log(max(words[piece], 0.01 * letters[piece]) / total)) for piece in list(pieces)[:room]]
    return [*((token, 0.0) for token in special), *scored]


def unigram_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """XLM-R's and DeBERTa-v2's."""
    if kind == "deberta-v2":
        return DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]))
    return XLMRobertaTokenizer(vocab=[*_unigram(["<s>", "<pad>", "</s>", "<unk>"]), ("<mask>", 0.0)])


_TOKENIZERS = {
    "bert": wordpiece_tokenizer,
    "distilbert": wordpiece_tokenizer,
    "mpnet": wordpiece_tokenizer,
    "roberta": roberta_tokenizer,
    "modernbert": roberta_tokenizer,
    "xlm-roberta": unigram_tokenizer,
    "deberta-v2": unigram_tokenizer,
}


@made_once
def make_reader(
    folder: Path,
    family: str,
    head: type,
    seed: int = 0,
    positions: int = 130,
    tokenizer: str | None = None,
    **config: object,
) -> Path:
    """An encoder of a family with random weights that make clear decisions, and a tokenizer of its class.

    Args:
        head: one of transformers' Auto classes.
        tokenizer: the family whose tokenizer it has, where that is another.
        config: more of its configuration, such as labels.
    """
    words = _TOKENIZERS[tokenizer or family](tokenizer or family)
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "pad_token_id": words.pad_token_id,
    }
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": positions}
    if family == "deberta-v2":  # as the published ones
        sizes |= {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "share_att_key": True,
        }
        sizes |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "max_relative_positions": -1}
    torch.manual_seed(seed)
    model = head.from_config(AutoConfig.for_model(family, vocab_size=len(words), **sizes, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


SEQ2SEQ = ("marian", "t5", "mt5", "bart", "mbart", "mbart50", "pegasus", "m2m100", "nllb")
_SENTENCEPIECE_SPECIAL = {
    "t5": ["<pad>", "</s>", "<unk>"],
    "mt5": ["<pad>", "</s>", "<unk>"],
    "pegasus": ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)), "<unk>"],
    "mbart": ["<s>", "<pad>", "</s>", "<unk>"],
    "mbart50": ["<s>", "<pad>", "</s>", "<unk>"],
    "nllb": ["<s>", "<pad>", "</s>", "<unk>"],
}


def _seq2seq_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerBase:
    if family == "bart":
        return roberta_tokenizer("roberta")  # transformers has no class of BART's own
    if family in ("marian", "m2m100"):
        return _two_vocabularies(family, folder)
    special = _SENTENCEPIECE_SPECIAL[family]
    if family in ("t5", "mt5"):
        return T5Tokenizer(vocab=_unigram(special), extra_ids=0)
    if family == "pegasus":
        return PegasusTokenizer(vocab=_unigram(special))
    if family == "nllb":
        trained = Tokenizer(models.BPE(unk_token="<unk>"))
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        trained.train_from_iterator(corpora.held_out(), trainer)
        model = json.loads(trained.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        return NllbTokenizer(vocab=model["vocab"], merges=merges, src_lang="eng_Latn", tgt_lang="deu_Latn")
    kind = MBartTokenizer if family == "mbart" else MBart50Tokenizer
    return kind(vocab=_unigram(special), src_lang="en_XX", tgt_lang="de_DE")


def _two_vocabularies(family: str, folder: Path) -> PreTrainedTokenizerBase:
    """Marian's and M2M100's: SentencePiece files, and a vocabulary in another order."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line for text in corpora.held_out() for line in text.splitlines()), encoding="utf-8")
    kind = "unigram" if family == "marian" else "bpe"
    names = ("source", "target") if family == "marian" else ("sentencepiece.bpe",)
    for name in names:
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / name),
            vocab_size=500,
            model_type=kind,
            character_coverage=0.98,
            minloglevel=2,
        )
        (folder / f"{name}.model").rename(folder / (f"{name}.spm" if family == "marian" else f"{name}.model"))
        (folder / f"{name}.vocab").unlink()
    corpus.unlink()
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / ("source.spm" if family == "marian" else "sentencepiece.bpe.model"))
    )
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    if family == "marian":
        order = ["</s>", "<unk>", ">>deu<<", ">>fra<<", *sorted(pieces), "<pad>"]
        (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(order)}))
        return MarianTokenizer(
            str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), model_max_length=512
        )
    order = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pieces)]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(order)}))
    files = (str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"))
    codes = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]  # as the hub's files name them
    return M2M100Tokenizer(*files, src_lang="en", tgt_lang="de", additional_special_tokens=codes)


def _end_sometimes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make the end token as likely as one that the model likes, so that answers end, some early, some late."""
    batches = [tokenizer(text[:24], return_tensors="pt") for text in corpora.held_out()[:5]]

    def answers() -> list[list[int]]:
        with torch.no_grad():
            return [
                model.generate(**batch, max_new_tokens=14, do_sample=False, no_repeat_ngram_size=2)[0].tolist()
                for batch in batches
            ]

    weight = model.get_output_embeddings().weight
    liked = Counter(token for answer in answers() for token in answer[1:])
    for scale in (1.01, 0.9, 1.1):
        for token, _ in liked.most_common(8)[::-1]:
            with torch.no_grad():
                weight[tokenizer.eos_token_id] = scale * weight[token]
            if len({len(answer) for answer in answers()}) >= 3:
                return True
    return False


@made_once
def make_seq2seq(folder: Path, family: str, seed: int = 0, **generation: object) -> Path:
    """An encoder-decoder model of a family with random weights, and a tokenizer of its class.

    Args:
        generation: settings of its generation config.
    """
    tokenizer = _seq2seq_tokenizer(family, folder)
    kind = {"mbart50": "mbart", "m2m100": "m2m_100", "nllb": "m2m_100"}.get(family, family)
    size = max(tokenizer.lang_token_to_id.values()) + 9 if family == "m2m100" else len(tokenizer)
    if family in ("t5", "mt5"):
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    else:
        sizes = {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
            "decoder_start_token_id": tokenizer.pad_token_id if family in ("marian", "pegasus") else 2,
        }
    roles = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=size, **sizes, **roles)
    for attempt in range(4):
        torch.manual_seed(seed + 100 * attempt)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5 if family in ("t5", "mt5") else 6)
        if _end_sometimes(model, tokenizer):
            break
    if family not in ("t5", "mt5"):
        generation = {"forced_eos_token_id": tokenizer.eos_token_id, **generation}
    if family == "marian":
        generation = {"bad_words_ids": [[tokenizer.pad_token_id]], **generation}
    if family in ("mbart50", "m2m100", "nllb"):
        german = {"mbart50": "de_DE", "m2m100": "__de__", "nllb": "deu_Latn"}[family]
        generation = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(german), **generation}
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LANGUAGES = ("en", "de", "fr", "ja")


@made_once
def make_whisper(
    folder: Path, seed: int = 0, *, multilingual: bool = True, mels: int = 80, seconds: int = 2, **generation: object
) -> Path:
    """A Whisper with random weights, whose windows have so many seconds.

    Args:
        generation: settings of its generation config.
    """
    words = byte_level_tokenizer().backend_tokenizer
    steps = [f"<|{step * 0.02:.2f}|>" for step in range(50 * seconds + 1)]
    languages = [f"<|{code}|>" for code in LANGUAGES] if multilingual else []
    tasks = ["<|translate|>", "<|transcribe|>"] if multilingual else []
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    model = json.loads(words.to_str())["model"]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in steps])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    roles = {"eos_token_id": ids["<|endoftext|>"], "bos_token_id": ids["<|endoftext|>"]}
    roles |= {"pad_token_id": ids["<|endoftext|>"], "decoder_start_token_id": ids["<|startoftranscript|>"]}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=mels,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50 * seconds,
        max_target_positions=64,
        **roles,
    )
    torch.manual_seed(seed)
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    settings: dict[str, Any] = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "max_initial_timestamp_index": 25 * seconds,
        "max_length": 64,
        "suppress_tokens": [*range(10, 14), *(ids[token] for token in special[1:-1])],
        "begin_suppress_tokens": [20, ids["<|endoftext|>"]],
        **roles,
    }
    if multilingual:
        settings["lang_to_id"] = {token: ids[token] for token in languages}
        settings["task_to_id"] = {token[2:-2]: ids[token] for token in tasks}
    made.generation_config = GenerationConfig(**{**settings, **generation})
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds).save_pretrained(folder)
    return folder


def models_toml(entries: dict[str, str]) -> str:
    return "\n".join(f"[{name}]\n{body}\n" for name, body in entries.items())


def causal_entry(path: Path, **limits: int) -> str:
    chosen = {"context": 128, "slots": 4, "prefill_chunk": 16, "default_max_tokens": 16, "threads": 1} | limits
    shown = ", ".join(f"{name} = {value}" for name, value in chosen.items())
    return f'task = "text-generation"\nsource = {{ path = "{path}" }}\nvariants = ["fp32"]\nlimits = {{ {shown} }}\n'


def settle(folder: Path) -> Path:
    """Give a folder's model numbers that depend on no library's version, for answers that are kept in a file."""
    path = folder / "model.safetensors"
    numbers = load_file(path)
    for name in sorted(numbers):
        if numbers[name].ndim > 1:
            generator = np.random.RandomState(zlib.crc32(name.encode()))
            width = 1.0 if "outputs" in name else 0.12  # a head that decides clearly
            numbers[name] = (width * generator.standard_normal(numbers[name].shape)).astype(np.float32)
    save_file(numbers, path, metadata={"format": "pt"})
    return folder


_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "head_dim": 64,  # a quarter of it is rotated
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
# Type and what it adds: gated delta nets, short convolutions, Mamba-2 and Mamba, most with layers that attend.
_HYBRIDS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_next": ("qwen3_next", _GATED_DELTA | {"num_experts": 0, "mlp_only_layers": [0, 1, 2]}),
    "qwen35": ("qwen3_5_text", _GATED_DELTA),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_ff_dim": 48}),
    "granite": (
        "granitemoehybrid",
        _MAMBA2
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention", "mamba"],
            "position_embedding_type": "nope",
        },
    ),
    "falcon_h1": ("falcon_h1", _MAMBA2 | {"mamba_d_ssm": 128, "mamba_rms_norm": True}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
            "expand": 2,
            "chunk_size": 8,
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "state_size": 16,
            "expand": 2,
            "conv_kernel": 4,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "tie_word_embeddings": False,
        },
    ),
}
HYBRIDS = tuple(_HYBRIDS)


def hybrid_config(name: str, vocabulary: int = VOCABULARY, context: int = 128) -> PretrainedConfig:
    """Of a model whose layers keep states beside keys and values, or in place of them."""
    kind, more = _HYBRIDS[name]
    shared: dict[str, object] = {
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "hidden_size": 64,
        "num_hidden_layers": 3,
    }
    if name != "mamba2":
        shared |= {
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
        }
    return AutoConfig.for_model(kind, **shared | more)


IMAGE = 32  # height and width of what the models of images read, 16 patches
# Type, the class that embeds or classifies, its image processor and what the processor does.
_VISION: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": (
        "vit",
        "ViTForImageClassification",
        "ViTImageProcessorPil",
        {"size": {"height": IMAGE, "width": IMAGE}},
    ),
    "deit": (
        "deit",
        "DeiTForImageClassification",
        "DeiTImageProcessorPil",
        {"size": {"height": 36, "width": 36}, "crop_size": {"height": IMAGE, "width": IMAGE}},
    ),
    "beit": (
        "beit",
        "BeitForImageClassification",
        "BeitImageProcessorPil",
        {"size": {"height": IMAGE, "width": IMAGE}},
    ),
    "dinov2": (
        "dinov2",
        "Dinov2Model",
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 37}, "crop_size": {"height": IMAGE, "width": IMAGE}},
    ),
    "clip": (
        "clip",
        "CLIPModel",
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}},
    ),
    "siglip": ("siglip", "SiglipModel", "SiglipImageProcessorPil", {"size": {"height": IMAGE, "width": IMAGE}}),
}
VISION = tuple(_VISION)
ANIMALS = ("cat", "dog", "horse", "mouse", "cow")


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's, whose every token is a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[])


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """One that ends a text with a token, and pads with another."""
    trained = Tokenizer(models.Unigram(_unigram(["<pad>", "</s>", "<unk>"]), unk_id=2))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_input_names=["input_ids"], **roles)


@made_once
def make_vision(folder: Path, name: str, seed: int = 0, image: int = IMAGE) -> Path:
    """A model of images with random weights that make clear decisions, and its image processor.

    Args:
        image: height and width that its positions are for.
    """
    import transformers

    kind, head, processor, made = _VISION[name]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": 8,
    }
    if name in ("clip", "siglip"):
        words = clip_tokenizer() if name == "clip" else siglip_tokenizer()
        text = {"vocab_size": len(words), "max_position_embeddings": 77 if name == "clip" else 64}
        text |= {key: value for key, value in sizes.items() if "size" not in key or key.startswith(("hidden", "inter"))}
        text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": 0}
        more = {"projection_dim": 24} if name == "clip" else {}
        config = AutoConfig.for_model(kind, text_config=text | more, vision_config=sizes | more, **more)
        words.save_pretrained(folder)
    else:
        labels = {"id2label": dict(enumerate(ANIMALS)), "label2id": {label: row for row, label in enumerate(ANIMALS)}}
        own = {"use_relative_position_bias": True, "use_mean_pooling": True} if name == "beit" else {}
        config = AutoConfig.for_model(kind, **sizes, **labels, **own)
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_((1.5 / parameter[0].numel() ** 0.5) * torch.randn_like(parameter))
            elif not key.startswith("logit"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    getattr(transformers, processor)(**made).save_pretrained(folder)
    return folder


# A template as SmolVLM's: parts in the order in which they come.
VLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VLM_TOKENS = 16  # of a tile


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level one, with the tokens of images of up to two by two tiles."""
    tokenizer = byte_level_tokenizer()
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *places]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = VLM_TEMPLATE
    return tokenizer


@made_once
def make_vlm(folder: Path, kind: str = "smolvlm", seed: int = 0, context: int = 512) -> Path:
    """A vision-language model of SmolVLM's or Idefics3's class with random weights, and its image processor."""
    import transformers

    tokenizer = vlm_tokenizer()
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<end_of_utterance>")}
    roles = {"bos_token_id": 0, "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": 0}
    text = causal_config("llama", context).to_dict() | roles | {"vocab_size": len(tokenizer)}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": 4,
    }
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, scale_factor=2, image_token_id=ids["<image>"], **roles
    )
    torch.manual_seed(seed)
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("vision" in key or "connector" in key):
                parameter.copy_((1.5 / parameter[0].numel() ** 0.5) * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(8)
    model.generation_config = GenerationConfig(**roles)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = getattr(transformers, f"{name}ImageProcessorPil")
    processor(size={"longest_edge": 2 * IMAGE}, max_image_size={"longest_edge": IMAGE}).save_pretrained(folder)
    named = {"processor_class": f"{name}Processor", "image_seq_len": VLM_TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(named))
    return folder


# A template as Qwen2-VL's and Qwen2.5-VL's: a mark between two others for each image.
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_VL_SIDE = 8  # of a token, in pixels: two by two patches
QWEN_VL_PIXELS = (4 * QWEN_VL_SIDE**2, 30 * QWEN_VL_SIDE**2)  # of an image at least and at most


@made_once
def make_qwen_vl(folder: Path, kind: str = "qwen2_5_vl", seed: int = 0, context: int = 512) -> Path:
    """A vision-language model of Qwen2.5-VL's or Qwen2-VL's class with random weights, and its image processor."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = qwen2_tokenizer()
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    marks = [f"<|{name}|>" for name in ("im_start", "im_end", *names.values())]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = QWEN_VL_TEMPLATE
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for role, name in names.items()}
    roles = {"bos_token_id": 0, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": 0}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    # A window has two by two tokens.
    vision = {"num_heads": 2, "patch_size": QWEN_VL_SIDE // 2}
    if kind == "qwen2_5_vl":
        vision |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        vision |= {"window_size": 2 * QWEN_VL_SIDE, "fullatt_block_indexes": [1]}
    else:
        vision |= {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = AutoConfig.for_model(kind, text_config=text | roles, vision_config=vision, **ids)
    torch.manual_seed(seed)
    kinds = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration}
    model = kinds[kind](config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "visual" in key:
                parameter.copy_((1.5 / parameter[0].numel() ** 0.5) * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ends = [roles["eos_token_id"], tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(**roles | {"eos_token_id": ends})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    least, most = QWEN_VL_PIXELS
    size = {"shortest_edge": least, "longest_edge": most}
    Qwen2VLImageProcessorPil(patch_size=QWEN_VL_SIDE // 2, size=size).save_pretrained(folder)
    return folder
