"""The gate of an encoder-decoder's text side: whole artefacts pass, and each kind of damage is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel, MarianTokenizer

from tests import tiny_models
from trident_export import corpora, models_file, tasks
from trident_export.errors import FidelityError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.seq2seq import task_generation_config
from trident_export.measure import fidelity, seq2seq_texts
from trident_export.models_file import ModelSpec
from trident_serving.artefacts import VERSION
from trident_serving.seq2seq.source import SourceText

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Recommended. pip install")]
LIMITS = {"max_source_tokens": 96, "max_target_tokens": 40, "slots": 8, "threads": 1}
SETTINGS = {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "min_length": 5}


def spec_of(folder: Path) -> ModelSpec:
    table = {"task": "translation", "source": {"path": str(folder)}, "variants": ["fp32"], "limits": LIMITS}
    return models_file.parse("m", table)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seq2seq-gate")
    folder = tiny_models.make_seq2seq(root / "t5", "t5", 0, **SETTINGS)
    tasks.build(tasks.Job(spec_of(folder), HuggingFaceFolder(folder), root / "staging", lambda message: None))
    return root


def check(root: Path, folder: Path) -> None:
    source, spec = HuggingFaceFolder(root / "t5"), spec_of(root / "t5")
    seq2seq_texts.check_sources(source.tokenizer, folder, corpora.held_out())
    model = source.load(AutoModelForSeq2SeqLM)
    assert spec.seq2seq
    seq2seq_texts.check_answers(model, task_generation_config(spec, source), folder, spec.seq2seq, corpora.held_out())


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def swapped_words(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    places = {word: place for place, (word, _) in enumerate(words)}
    words[places["e"]], words[places["t"]] = words[places["t"]], words[places["e"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))


ANSWERED = "a request that names only its text is answered by the tokens"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "words": (swapped_words, "the source 'Hello, world!' has the tokens "),
    "no end behind the source": (changed("source.json", suffix=[]), "the source 'Hello, world!' has the tokens"),
    "beams": (changed("generation.json", num_beams=1), ANSWERED),
    "no repeats": (changed("generation.json", no_repeat_ngram_size=0), ANSWERED),
    "other end": (changed("generation.json", eos_token_ids=[9]), ANSWERED),
    "other start": (changed("generation.json", prompt=[7]), ANSWERED),
}


@pytest.mark.parametrize("name", ["nothing", *DAMAGES])
def test_damaged_artefacts_are_refused(built: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / VERSION
    shutil.copytree(built / "staging" / "m" / VERSION, folder)
    if name == "nothing":
        check(built, folder)
        return
    damage, reason = DAMAGES[name]
    damage(folder)
    with pytest.raises(FidelityError, match=reason):
        check(built, folder)


def test_marian_with_a_vocabulary_for_each_side(tmp_path: Path) -> None:
    """Texts become the source's ids, answers are written with the target's; the gate compares both."""
    folder = tmp_path / "marian"
    tiny_models.make_seq2seq(folder, "marian")
    shared = json.loads((folder / "vocab.json").read_text())
    order = [word for word in shared if not word.startswith(">>")]
    pieces = order[2:-1]
    target = ["</s>", "<unk>", *pieces[len(pieces) // 2 :], *pieces[: len(pieces) // 2], "<pad>"]
    for name, words in (("vocab.json", order), ("target_vocab.json", target)):
        (folder / name).write_text(json.dumps({word: index for index, word in enumerate(words)}))
    files = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json", "target_vocab.json")]
    words = MarianTokenizer(*files, separate_vocabs=True, model_max_length=512)
    words.save_pretrained(folder)
    size = len(order)
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=size,
        decoder_vocab_size=size,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        decoder_start_token_id=size - 1,
        pad_token_id=size - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    source, spec = HuggingFaceFolder(folder), spec_of(folder)
    checked = tasks.build(tasks.Job(spec, source, tmp_path / "staging", lambda message: None))
    assert checked.measures["fp32"]["kl"] < 1e-9
    served = SourceText.load(tmp_path / "staging" / "m" / VERSION, 96)
    answer = words(text_target="The quick brown fox").input_ids
    assert served.decode(answer) == words.decode(answer, skip_special_tokens=True)
    assert words(text_target="The quick brown fox").input_ids != words("The quick brown fox").input_ids


@pytest.fixture(scope="module")
def built_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bart-gate")
    folder = tiny_models.make_seq2seq(root / "hf", "bart", 3)
    tasks.build(tasks.Job(bart(folder), HuggingFaceFolder(folder), root / "root", lambda message: None))
    return root


def bart(folder: Path) -> ModelSpec:
    limits = LIMITS | {"max_source_tokens": 120, "max_target_tokens": 110}
    table = {"task": "summarization", "source": {"path": str(folder)}, "variants": ["fp32"], "limits": limits}
    return models_file.parse("m", table)


@pytest.mark.parametrize("graph", ["encoder.onnx", "decoder.onnx"])
def test_a_table_of_positions_is_compared_to_its_end(built_bart: Path, tmp_path: Path, graph: str) -> None:
    """Sources and answers of the gate's usual length read the first 48 and 24 positions."""
    spec, source = bart(built_bart / "hf"), HuggingFaceFolder(built_bart / "hf")
    shutil.copytree(built_bart / "root", tmp_path / "root")
    file = tmp_path / "root/m/1" / graph
    model = onnx.load(str(file))
    tables = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and 100 < tensor.dims[0] <= 130]
    for table in tables:
        rows = numpy_helper.to_array(table).copy()
        rows[90:] = np.roll(rows[90:], 1, axis=0)
        table.CopyFrom(numpy_helper.from_array(rows, table.name))
    assert len(tables) == 1
    onnx.save(model, str(file))
    with pytest.raises(FidelityError, match="kl is|top1 is"):
        fidelity.check("summarization", "fp32", tasks.evaluate(spec, source, tmp_path / "root")["fp32"])
