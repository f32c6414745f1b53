"""Adapters: what peft merges is what its base computes with the adapter beside it, for every kind of model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests import tiny_models
from trident_export import add, fingerprint, models_file
from trident_export.errors import ModelsFileError, SourceError, UnreadableSource, UnsupportedModel
from trident_export.huggingface import sources
from trident_export.huggingface.adapters import AdaptedFolder
from trident_export.huggingface.folder import HuggingFaceFolder

# peft asks transformers by names that it will lose.
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 90)[None]


def adapter(folder: Path, base: Path, config: PeftConfig, head: Any = AutoModelForCausalLM, **load: object) -> Path:
    """An adapter with random weights, written by peft."""
    torch.manual_seed(1)
    model = get_peft_model(head.from_pretrained(base, **load), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def spec_of(base: Path, folder: Path | str, root: Path, **source: str) -> models_file.ModelSpec:
    entry = tiny_models.causal_entry(base).replace(f'path = "{base}"', f'path = "{base}", adapter = "{folder}"')
    (root / "models.toml").write_text(tiny_models.models_toml({"tiny": entry}))
    return models_file.load(root / "models.toml")[0]


def fetched(base: Path, folder: Path, root: Path) -> AdaptedFolder:
    found = sources.fetch(spec_of(base, folder, root), root, root, lambda message: None)
    assert isinstance(found, AdaptedFolder)
    return found


def agree(found: AdaptedFolder, base: Path, head: Any = AutoModelForCausalLM, **inputs: torch.Tensor) -> None:
    """The merged model is the unmerged one, and neither is the base."""
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        merged = found.load(head)(**inputs).logits
        unmerged = found.reference(head)(**inputs).logits
        plain = head.from_pretrained(base)(**inputs).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4 * float(unmerged.abs().max()))
    assert plain.shape != merged.shape or float((plain - merged).abs().max()) > 0.01 * float(plain.abs().max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_causal(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=LINEAR, task_type=TaskType.CAUSAL_LM),
        LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
        LoraConfig(r=4, target_modules=LINEAR, use_rslora=True, lora_alpha=16, rank_pattern={"q_proj": 8}),
        LoraConfig(r=4, target_modules=LINEAR, bias="all", alpha_pattern={"down_proj": 2}, fan_in_fan_out=False),
        LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", *LINEAR]),
        LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]),
        LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [5, 9]}),
        AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=LINEAR),
        IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, target_modules=LINEAR),
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_merged_is_unmerged(base: Path, tmp_path: Path, config: PeftConfig) -> None:
    found = fetched(base, adapter(tmp_path / "adapter", base, config), tmp_path)
    agree(found, base)


@pytest.mark.parametrize("target", [["embed_tokens"], ["lm_head"]])
def test_tied_matrices_part_where_one_is_adapted(tmp_path: Path, target: list[str]) -> None:
    tied = tiny_models.make_causal(tmp_path / "tied", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tied)
    found = fetched(tied, adapter(tmp_path / "adapter", tied, LoraConfig(r=4, target_modules=target)), tmp_path)
    agree(found, tied)
    assert not found.config.tie_word_embeddings


def test_grown_vocabulary(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]))
    adapted.save_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|tool|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|bot|>"
    tokenizer.save_pretrained(folder)
    found = fetched(base, folder, tmp_path)
    assert found.config.vocab_size == 515
    agree(found, base, input_ids=torch.tensor([[5, 512, 513, 514, 9]]).clamp(max=511))
    ids = torch.tensor([[5, 512, 513, 514, 9]])
    with torch.no_grad():
        torch.testing.assert_close(found.load(AutoModelForCausalLM)(ids).logits, model(ids).logits)
    assert found.tokenizer("a<|bot|>").input_ids[-1] == 513  # the adapter's own tokenizer and template
    chat = found.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|user|>x<|bot|>"


def test_the_base_keeps_its_template_where_the_adapter_has_none(base: Path, tmp_path: Path) -> None:
    chatty = Path(shutil.copytree(base, tmp_path / "chatty"))
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "base"
    tokenizer.save_pretrained(chatty)
    (chatty / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    folder = adapter(tmp_path / "adapter", chatty, LoraConfig(r=4, target_modules=LINEAR))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    found = fetched(chatty, folder, tmp_path)
    assert found.tokenizer.chat_template == "base"
    assert found.generation_config.eos_token_id == [0, 7]


def test_a_classifier_of_a_model_without_a_head(tmp_path: Path) -> None:
    plain = tiny_models.make_reader(tmp_path / "plain", "bert", AutoModelForSequenceClassification)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    settings = {"num_labels": 5, "ignore_mismatched_sizes": True}
    folder = adapter(tmp_path / "adapter", plain, config, AutoModelForSequenceClassification, **settings)
    entry = (
        f'task = "text-classification"\nsource = {{ path = "{plain}", adapter = "{folder}" }}\nvariants = ["fp32"]\n'
        "limits = { labels = 5, max_tokens = 32 }\n"
    )
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"tiny": entry}))
    (spec,) = models_file.load(tmp_path / "models.toml")
    found = sources.fetch(spec, tmp_path, tmp_path, lambda message: None)
    assert isinstance(found, AdaptedFolder)
    assert found.config.num_labels == 5
    agree(found, plain, AutoModelForSequenceClassification, input_ids=torch.arange(1, 20)[None])


def test_an_encoder_decoder(tmp_path: Path) -> None:
    plain = tiny_models.make_seq2seq(tmp_path / "plain", "t5")
    config = LoraConfig(r=4, target_modules=["q", "v"], task_type=TaskType.SEQ_2_SEQ_LM)
    folder = adapter(tmp_path / "adapter", plain, config, AutoModelForSeq2SeqLM)
    entry = (
        f'task = "summarization"\nsource = {{ path = "{plain}", adapter = "{folder}" }}\nvariants = ["fp32"]\n'
        "limits = { max_source_tokens = 64, max_target_tokens = 16 }\n"
    )
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"tiny": entry}))
    (spec,) = models_file.load(tmp_path / "models.toml")
    found = sources.fetch(spec, tmp_path, tmp_path, lambda message: None)
    assert isinstance(found, AdaptedFolder)
    ids = torch.arange(3, 20)[None]
    agree(found, plain, AutoModelForSeq2SeqLM, input_ids=ids, decoder_input_ids=ids)


def refusal(base: Path, folder: Path, root: Path) -> str:
    with pytest.raises((SourceError, UnsupportedModel)) as refused:
        fetched(base, folder, root)
    assert "\n" not in str(refused.value)
    assert not list((root / "sources").glob("*")) if (root / "sources").exists() else True
    return str(refused.value)


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=LINEAR)
    same_shapes = tiny_models.make_causal(tmp_path / "other", "llama", seed=5)
    folder = adapter(tmp_path / "adapter", base, lora)
    assert "is an adapter of another base: it was trained on" in refusal(same_shapes, folder, tmp_path)
    other_type = tiny_models.make_causal(tmp_path / "gpt2", "gpt2")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/gone"}))
    assert "is no adapter of" in refusal(other_type, folder, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    for change in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 128}):
        config = tiny_models.causal_config("llama")
        for key, value in change.items():
            setattr(config, key, value)
        another = tmp_path / "-".join(map(str, change.items()))
        AutoModelForCausalLM.from_config(config).save_pretrained(another)
        assert "is no adapter of" in refusal(another, folder, tmp_path)


def test_a_base_in_another_format_is_the_same_only_with_the_same_numbers(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    model = AutoModelForCausalLM.from_pretrained(base)
    half, changed = (Path(shutil.copytree(base, tmp_path / name)) for name in ("half", "changed"))
    model.half().save_pretrained(half)
    agree(fetched(half, folder, tmp_path), half)
    model.model.layers[1].self_attn.q_proj.weight.data.neg_()
    model.save_pretrained(changed)
    shutil.rmtree(tmp_path / "sources")
    assert "is an adapter of another base: it was trained on" in refusal(changed, folder, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    other = tiny_models.make_causal(tmp_path / "gpt2", "gpt2")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    assert f"it was trained on {other}, and the source is {base}" in refusal(base, folder, tmp_path)


@pytest.mark.parametrize("named", [5, "a" * 5000, "~nosuchuser/x", ["a"]])
def test_a_base_that_cannot_be_named_so(base: Path, tmp_path: Path, named: object) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": named}))
    assert "adapter_config.json can't be read (" in unreadable(base, folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("chat_template.jinja", b"\xff\xfe")],
)
def test_an_adapter_with_a_damaged_tokenizer(base: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    (folder / name).write_bytes(content)
    assert f"{folder}: {name} can't be read (" in unreadable(base, folder, tmp_path)


def unreadable(base: Path, folder: Path, root: Path) -> str:
    with pytest.raises(UnreadableSource) as refused:
        fetched(base, folder, root)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["extra", "nan", "shape"])
def test_the_base_is_checked_as_without_an_adapter(base: Path, tmp_path: Path, kind: str) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    damaged = Path(shutil.copytree(base, tmp_path / "damaged"))
    (file,) = damaged.glob("*.safetensors")
    weights = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    if kind == "extra":
        weights |= {name.replace("layers.1", "layers.2"): value + 0 for name, value in weights.items() if ".1." in name}
    elif kind == "nan":
        weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    else:
        weights[norm] = weights[norm][:8].clone()
    save_file(weights, file, metadata={"format": "pt"})
    said = {
        "extra": "which config.json leaves out",
        "nan": "holds numbers that are not finite",
        "shape": f"{norm} is [8]",
    }
    found = unreadable(damaged, folder, tmp_path)
    assert said[kind] in found
    with pytest.raises(UnreadableSource) as alone:
        HuggingFaceFolder(damaged).load(AutoModelForCausalLM)
    assert str(alone.value) == found


def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path) -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type=TaskType.CAUSAL_LM)
    folder = adapter(tmp_path / "prompt", base, prompt)
    assert "is an adapter of kind PROMPT_TUNING, which can't be merged" in refusal(base, folder, tmp_path)
    folder = adapter(tmp_path / "activated", base, LoraConfig(target_modules=LINEAR, alora_invocation_tokens=[5]))
    assert "is an adapter of kind activated LoRA" in refusal(base, folder, tmp_path)


def test_damaged_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    for name, content, message in (
        ("tokenizer_config.json", b"[]", "tokenizer_config.json must be an object, found '[]'"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json can't be read"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja can't be read"),
    ):
        (folder / name).write_bytes(content)
        assert message in refusal(base, folder, tmp_path)
        (folder / name).unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] * float("nan")}, folder / "adapter_model.safetensors")
    assert "has values that are not finite" in refusal(base, folder, tmp_path)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "adapter_model.safetensors")
    assert "is no adapter of" in refusal(base, folder, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 40)
    assert "the adapter's weights can't be read" in refusal(base, folder, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refusal(base, folder, tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LATER"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "LATER" in refusal(base, folder, tmp_path)
    (folder / "adapter_config.json").unlink()
    assert "is no adapter, it has no adapter_config.json" in refusal(base, folder, tmp_path)
    assert "does not exist" in refusal(base, tmp_path / "nowhere", tmp_path)


def test_an_adapter_is_part_of_the_fingerprint(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    spec = spec_of(base, folder, tmp_path)
    before = fingerprint.fingerprint(spec, tmp_path)
    plain = models_file.parse(
        "tiny", {"task": spec.task, "source": {"path": str(base)}, "variants": ["fp32"], "limits": {}}
    )
    assert fingerprint.fingerprint(plain, tmp_path) != before
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert fingerprint.fingerprint(spec, tmp_path) != before


def test_an_adapter_as_the_source_is_told_apart(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=LINEAR))
    with pytest.raises(SourceError, match="is a PEFT adapter: name its base as the source"):
        sources.fetch(spec_of(folder, folder, tmp_path), tmp_path, tmp_path, lambda message: None)


def test_add_writes_the_adapter(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "my-lora", base, LoraConfig(r=4, target_modules=LINEAR))
    proposal = add.propose(base, {"path": str(base), "adapter": str(folder)})
    assert proposal.name == "my-lora"
    assert proposal.table["source"] == {"path": str(base), "adapter": str(folder)}


def test_a_revision_is_an_adapters(tmp_path: Path) -> None:
    table: dict[str, Any] = {"task": "text-generation", "variants": ["fp32"], "limits": {}}
    with pytest.raises(ModelsFileError, match="each with an adapter or without"):
        models_file.parse("m", table | {"source": {"path": "x", "adapter_revision": "1"}})
    hub = {"hub": "a/b", "revision": "1", "adapter": "c/d", "adapter_revision": "2"}
    assert models_file.parse("m", table | {"source": hub}).source.adapter_revision == "2"
