"""The gate of a causal model's text side: whole artefacts pass, and each kind of damage is refused with its reason."""

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
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from tests import tiny_models
from trident_export import corpora
from trident_export.errors import FidelityError, UnreadableSource
from trident_export.graphs import decoder_passes, editing
from trident_export.graphs.causal import export_causal_graph
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.vocabulary import rows_of
from trident_export.measure import fidelity, texts
from trident_export.tasks import text_generation
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits

LIMITS = GenerationLimits(context=128, slots=2, prefill_chunk=16, threads=1)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.make_causal(tmp_path_factory.mktemp("gate") / "llama", "llama")
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def change(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    known = {key: value for key, value in (known | values).items() if value is not None}
    file.write_text(json.dumps(known))


def written(folder: Path, to: Path) -> tuple[HuggingFaceFolder, Any]:
    """The artefacts' text files, and Hugging Face's model."""
    source = HuggingFaceFolder(folder)
    model = source.load_whole(AutoModelForCausalLM)
    text_generation.save_text_files(source, to, rows_of(model))
    return source, model


def swapped_words(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def other_decoder(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [state["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))


def unmarked_end(folder: Path) -> None:
    """The end token as plain text."""
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(" | trim", ""))


def other_end(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[0, 5])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped words": (swapped_words, "the served tokenizer gives .* in place of .* for "),
    "other decoder": (other_decoder, "the served tokenizer writes 'one leading space' where .* ' one leading space'"),
    "unmarked end": (unmarked_end, "the prompt '<user>Hello.* has the tokens .* unlike Hugging Face's"),
    "other template": (other_template, "the chat template makes .* apply_chat_template makes "),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "the artefacts have none"),
    "other end": (other_end, r"answers end at the tokens \[0, 5\], Hugging Face's at \[0\]"),
}


@pytest.mark.parametrize("name", ["nothing", *DAMAGES])
def test_damaged_artefacts_are_refused(original: Path, tmp_path: Path, name: str) -> None:
    source, model = written(original, tmp_path / "1")
    if name == "nothing":
        texts.check(source, model, tmp_path / "1", LIMITS, corpora.held_out())
        return
    damage, reason = DAMAGES[name]
    damage(tmp_path / "1")
    with pytest.raises(FidelityError, match=reason):
        texts.check(source, model, tmp_path / "1", LIMITS, corpora.held_out())


SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": "FIRST"},
    "suppress_tokens": {"suppress_tokens": "FIRSTS"},
    "begin_suppress_tokens": {"begin_suppress_tokens": "FIRSTS"},
    "min_length": {"eos_token_id": "SOON", "min_length": 20},
    "min_new_tokens": {"eos_token_id": "SOON", "min_new_tokens": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_defaults_are_those_of_generate(original: Path, tmp_path: Path, name: str) -> None:
    """They are applied to requests that are silent; without them the gate refuses the artefacts."""
    shutil.copytree(original, tmp_path / "source")
    source, model = written(original, tmp_path / "plain")
    words = TextTokenizer.load(tmp_path / "plain")
    prompts = [text[: texts.PROMPT_CHARACTERS] for text in texts.EDGES[:4]]
    answers = [texts._generated(model, words.encode(prompt), texts.ANSWER_TOKENS)[0] for prompt in prompts]
    fill = {"FIRST": [answers[0][:1]], "FIRSTS": sorted({tokens[0] for tokens in answers}), "SOON": answers[0][3]}
    settings = {
        key: fill.get(value, value) if isinstance(value, str) else value for key, value in SETTINGS[name].items()
    }
    change(tmp_path / "source" / "generation_config.json", **settings)
    source, model = written(tmp_path / "source", tmp_path / "1")
    texts.check_generation(source, model, tmp_path / "1", LIMITS, prompts)
    changed = [texts._generated(model, words.encode(prompt), texts.ANSWER_TOKENS)[0] for prompt in prompts]
    assert changed != answers
    assert texts.not_applied(source.generation_config) == []
    change(tmp_path / "1" / "generation_config.json", **{name: None})
    with pytest.raises(FidelityError, match="in place of .* of Hugging Face's logits|, Hugging Face's at"):
        texts.check_generation(source, model, tmp_path / "1", LIMITS, prompts)


def test_what_is_not_applied_is_named(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "source")
    settings = {"num_beams": 3, "sequence_bias": [[[5], -2.0]], "do_sample": True, "top_p": 0.8, "top_h": 0.4}
    change(tmp_path / "source" / "generation_config.json", **settings)
    source, model = written(tmp_path / "source", tmp_path / "1")
    assert texts.not_applied(source.generation_config) == ["num_beams", "sequence_bias", "top_h"]
    texts.check_generation(source, model, tmp_path / "1", LIMITS, ["Hello"])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 7},
        {"top_p": 0.6, "repetition_penalty": 1.3},
        {"min_p": 0.2, "top_k": 0},
        {"typical_p": 0.5, "temperature": 2.0},
    ],
)
def test_a_config_that_samples_gives_hugging_faces_chances(
    original: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """And a folder without one of its settings is caught."""
    shutil.copytree(original, tmp_path / "source")
    change(tmp_path / "source" / "generation_config.json", do_sample=True, **settings)
    source, model = written(tmp_path / "source", tmp_path / "1")
    texts.check_generation(source, model, tmp_path / "1", LIMITS, ["Hello", "The rain in Spain"])
    for name in settings:
        if settings[name] or name == "top_k":
            change(tmp_path / "1" / "generation_config.json", **settings | {name: 3 if name == "top_k" else None})
            with pytest.raises(FidelityError, match="off Hugging Face's|as its own generate does not"):
                texts.check_generation(source, model, tmp_path / "1", LIMITS, ["Hello", "The rain in Spain"])


def test_a_tokenizer_that_transformers_reads_otherwise_than_it_is_written(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "source")
    state = json.loads((original / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    source = HuggingFaceFolder(tmp_path / "source")
    _ = source.tokenizer
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnreadableSource, match="gives other tokens for 'Hello, world!' than the folder's tokenizer"):
        texts.check_file(source)


@pytest.mark.parametrize(
    "call", [{"padding": "max_length", "max_length": 32}, {"padding": True, "pad_to_multiple_of": 8}]
)
def test_a_tokenizer_that_was_called_before_it_was_saved(original: Path, tmp_path: Path, call: dict[str, Any]) -> None:
    """Training scripts leave padding and truncation in tokenizer.json; neither is the served tokenizer's."""
    shutil.copytree(original, tmp_path / "source")
    words = HuggingFaceFolder(original).tokenizer
    words("a b c", truncation=True, **call)
    words.save_pretrained(tmp_path / "source")
    assert json.loads((tmp_path / "source" / "tokenizer.json").read_text())["padding"]
    written(tmp_path / "source", tmp_path / "1")
    assert (
        TextTokenizer.load(tmp_path / "1").encode("Hello") == HuggingFaceFolder(original).tokenizer("Hello").input_ids
    )


def test_added_tokens_beyond_the_embedding(original: Path, tmp_path: Path) -> None:
    """A text that names one is read letter by letter, for the model has no such token; an end token must be there."""
    shutil.copytree(original, tmp_path / "source")
    words = HuggingFaceFolder(original).tokenizer
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.save_pretrained(tmp_path / "source")
    source = HuggingFaceFolder(tmp_path / "source")
    assert source.tokenizer("<image>").input_ids == [512]
    with pytest.raises(UnreadableSource, match="gives the token 512 .'<image>'., the model has 512: it is another"):
        written(tmp_path / "source", tmp_path / "special")
    words = HuggingFaceFolder(original).tokenizer
    words.add_tokens(["<image>"])
    words.save_pretrained(tmp_path / "source")
    written(tmp_path / "source", tmp_path / "1")
    served = TextTokenizer.load(tmp_path / "1")
    assert served.encode("a<image>b") == HuggingFaceFolder(original).tokenizer("a<image>b").input_ids
    assert max(served.encode("a<image>b")) < 512


def test_a_template_that_inserts_a_token_beyond_the_embedding(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "source")
    inserted = {"special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [70000], "tokens": ["<|end|>"]}}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}]
    parts = {"type": "TemplateProcessing", "single": single, "pair": []}
    change(tmp_path / "source" / "tokenizer.json", post_processor=parts | inserted)
    with pytest.raises(UnreadableSource, match="gives the token 70000 .*, the model has 512: it is another model's"):
        written(tmp_path / "source", tmp_path / "1")


def test_a_table_of_positions_is_compared_to_its_end(tmp_path: Path) -> None:
    """Texts of the gate's usual length read the first 64 positions of 128; the others could be anything."""
    source = HuggingFaceFolder(tiny_models.make_causal(tmp_path / "gpt2", "gpt2"))
    model = source.load(AutoModelForCausalLM)
    editing.save(decoder_passes.optimize(export_causal_graph(model, 160)), tmp_path / "model.onnx")
    words = TextTokenizer(source.tokenizer.backend_tokenizer)
    samples = text_generation.sample_ids(words, 128, 512, corpora.held_out())[:2]
    reference = text_generation.reference_logits(model, samples)
    limits = GenerationLimits(context=128, slots=2, prefill_chunk=16, threads=1)
    far = text_generation.far_text(source, model, words, limits, corpora.held_out())
    assert far is not None
    assert (len(far.ids), far.parts) == (127, [range(64), range(64, 127)])
    measured = text_generation.measure(tmp_path, samples, reference, "cpu", far)
    fidelity.check("text-generation", "fp32", measured)
    assert (measured["longest_text"], measured["tokens"]) == (127, 2 * 64 + 127)
    graph = onnx.load(str(tmp_path / "model.onnx"))
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.dims == [128, 64])
    rows = numpy_helper.to_array(table).copy()
    rows[100:] = np.roll(rows[100:], 1, axis=0)
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    fidelity.check("text-generation", "fp32", text_generation.measure(tmp_path, samples, reference))
    measured = text_generation.measure(tmp_path, samples, reference, "cpu", far)
    with pytest.raises(FidelityError, match="kl is"):
        fidelity.check("text-generation", "fp32", measured)


def test_parts_of_a_text_that_is_too_much_to_compare() -> None:
    assert text_generation.far_parts(130, 512) == [range(64), range(64, 128), range(128, 130)]
    few = text_generation.far_parts(4096, 262144)  # a large vocabulary: four parts of 64 tokens
    assert few == [range(64), range(1344, 1408), range(2688, 2752), range(4032, 4096)]


def test_a_window_is_compared_beyond_its_end(tmp_path: Path) -> None:
    """Texts of the gate's usual length never leave a window of 80 tokens; a graph without one is refused."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=512, num_key_value_heads=2, sliding_window=80, max_position_embeddings=200, **sizes
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(tmp_path / "hf")
    tiny_models.byte_level_tokenizer().save_pretrained(tmp_path / "hf")
    source = HuggingFaceFolder(tmp_path / "hf")
    model = source.load(AutoModelForCausalLM)
    editing.save(decoder_passes.optimize(export_causal_graph(model, 260)), tmp_path / "model.onnx")
    words = TextTokenizer(source.tokenizer.backend_tokenizer)
    samples = text_generation.sample_ids(words, 200, 512, corpora.held_out())[:2]
    reference = text_generation.reference_logits(model, samples)
    limits = GenerationLimits(context=200, slots=2, prefill_chunk=16, threads=1)
    far = text_generation.far_text(source, model, words, limits, corpora.held_out())
    assert far is not None
    assert len(far.ids) == 144
    measured = text_generation.measure(tmp_path, samples, reference, "cpu", far)
    fidelity.check("text-generation", "fp32", measured)
    assert measured["kl"] < 1e-9
    graph = onnx.load(str(tmp_path / "model.onnx"))
    windows = [a for node in graph.graph.node for a in node.attribute if a.name == "local_window_size"]
    assert [a.i for a in windows] == [80, 80]
    for attribute in windows:
        attribute.i = -1
    onnx.save(graph, str(tmp_path / "model.onnx"))
    fidelity.check("text-generation", "fp32", text_generation.measure(tmp_path, samples, reference))
    measured = text_generation.measure(tmp_path, samples, reference, "cpu", far)
    with pytest.raises(FidelityError, match="kl is .*top1 is"):
        fidelity.check("text-generation", "fp32", measured)
    assert np.isfinite(measured["kl"])


def test_texts_begin_as_a_requests_do() -> None:
    """Gemma and Llama begin each text with a token, without which they compute what no request sees."""
    words = tiny_models.roberta_tokenizer("modernbert")
    served = TextTokenizer(words.backend_tokenizer)
    texts = corpora.held_out()
    plain = text_generation.sample_ids(served, 128, 512, texts)
    assert {ids[0] for ids in plain} == {words.cls_token_id}
    asked = [words(text).input_ids[: text_generation.GATE_TOKENS] for text in texts]
    assert all(ids in asked for ids in plain)
