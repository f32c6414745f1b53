"""Pruning and distillation on tiny models: what says nothing is taken first, and nothing else changes."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from tests.tiny_models import causal_config
from trident_export import cli, models_file
from trident_export.compression import distillation, layouts, models, pruning
from trident_export.compression.pruning import Method
from trident_export.errors import ExportError, NoSpace, NotWritable
from trident_export.huggingface.folder import HuggingFaceFolder

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 43).reshape(2, 20)
RUNS = [{"input_ids": IDS}]


def make(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if architecture == "bert":
        config = BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
        )
        model = AutoModel.from_config(config)
    elif architecture == "distilbert":
        model = AutoModel.from_config(DistilBertConfig(vocab_size=64, dim=32, hidden_dim=96, n_layers=3, n_heads=4))
    else:
        model = AutoModelForCausalLM.from_config(causal_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.config.pad_token_id = None
    return model.eval()


def answer(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=IDS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def silence(model: PreTrainedModel, matmul: str, kept: Callable[[int], list[int]]) -> None:
    """Nothing but some inputs of a matmul of each layer says anything."""
    for number, layer in enumerate(layouts.layers_of(model)):
        weight = layouts.matrix(layer.get_submodule(matmul))
        quiet = sorted(set(range(weight.shape[1])) - set(kept(number)))
        weight[:, quiet] = 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "bert", "distilbert"])
def test_columns_that_say_nothing_are_taken_first(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    layout = layouts.layout_of(model)
    width = layouts.matrix(layouts.layers_of(model)[0].get_submodule(layout.outer)).shape[1]
    left = width - 32
    silence(model, layout.outer, lambda number: [(7 * n + number) % width for n in range(left)])
    expected = answer(model)
    reached = pruning.prune(model, Method.COLUMNS, 32 / width, RUNS)
    assert reached == pytest.approx(32 / width)
    smaller = reloaded(model, tmp_path)
    assert layouts.matrix(layouts.layers_of(smaller)[1].get_submodule(layout.outer)).shape[1] == left
    torch.testing.assert_close(answer(smaller), expected, atol=2e-5, rtol=1e-4)
    # One more block of columns does say something.
    pruning.prune(model, Method.COLUMNS, 32 / left, RUNS)
    assert (answer(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_heads_that_say_nothing_are_taken_first(architecture: str, tmp_path: Path) -> None:
    """Of llama two of four heads share keys and values and go together."""
    model = make(architecture)
    layout = layouts.layout_of(model)
    groups = model.config.num_key_value_heads
    wide = layouts.matrix(layouts.layers_of(model)[0].get_submodule(layout.joined)).shape[1] // groups

    def speaking(number: int) -> list[int]:
        return [g * wide + n for g in range(groups) if g != number % groups for n in range(wide)]

    silence(model, layout.joined, speaking)
    expected = answer(model)
    assert pruning.prune(model, Method.HEADS, 1 / groups, RUNS) == pytest.approx(1 / groups)
    smaller = reloaded(model, tmp_path)
    torch.testing.assert_close(answer(smaller), expected, atol=2e-5, rtol=1e-4)
    joined = layouts.matrix(layouts.layers_of(smaller)[1].get_submodule(layout.joined))
    assert joined.shape[1] == wide * (groups - 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_layer_that_does_nothing_is_taken_first(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    layer = layouts.layers_of(model)[0]
    for name, module in layer.named_modules():
        if name.endswith(("o_proj", "out_proj", "c_proj", "down_proj", "fc2")):
            module.weight.data.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
    expected = answer(model)
    with torch.no_grad():
        influence = pruning.layer_influence(model, RUNS)
    assert float(influence[0]) == pytest.approx(0, abs=1e-6)
    assert pruning.prune(model, Method.LAYERS, 0.5, RUNS) == 0.5
    smaller = reloaded(model, tmp_path)
    assert len(layouts.layers_of(smaller)) == 1
    torch.testing.assert_close(answer(smaller), expected, atol=2e-5, rtol=1e-4)
    # The cache numbers layers from 0 again.
    with torch.inference_mode():
        model.generation_config.eos_token_id = None
        ids = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape == (1, 23)


def test_magnitude_takes_the_smallest_weights_and_no_embedding() -> None:
    model = make("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert pruning.prune(model, Method.MAGNITUDE, 0.3, RUNS) == pytest.approx(0.3, abs=0.01)
    for name, value in model.named_parameters():
        gone = (value == 0) & (before[name] != 0)
        if "proj" not in name:
            assert not gone.any(), name
            continue
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        torch.testing.assert_close(value[~gone], before[name][~gone])


def test_wanda_weighs_by_the_inputs_norm() -> None:
    model = make("gpt2")
    before = {name: value.clone() for name, value in model.named_parameters()}
    modules = layouts.linear_layers(model)
    norms = pruning.input_norms(model, modules, RUNS)
    pruning.prune(model, Method.WANDA, 0.5, RUNS)
    name = "transformer.h.0.attn.c_attn"  # Conv1D: inputs by outputs
    scores = before[f"{name}.weight"].T.abs() * norms[name]
    gone = layouts.matrix(modules[name]) == 0
    assert (gone.sum(dim=1) == scores.shape[1] // 2).all()
    for row, taken in zip(scores, gone, strict=True):
        assert row[taken].max() <= row[~taken].min()
    with torch.inference_mode():
        inputs = model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(20))
        normed = model.transformer.h[0].ln_1(inputs).reshape(-1, 64)
    torch.testing.assert_close(norms[name], normed.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_two_of_each_four_are_zero() -> None:
    model = make("llama")
    assert pruning.prune(model, Method.TWO_OF_FOUR, 0.5, RUNS) == 0.5
    for module in layouts.linear_layers(model).values():
        assert ((layouts.matrix(module) == 0).reshape(-1, 4).sum(dim=1) == 2).all()


@pytest.mark.parametrize(
    ("architecture", "method", "sparsity", "message"),
    [
        ("llama", Method.TWO_OF_FOUR, 0.4, "2:4 takes half of the weights: sparsity must be 0.5, found 0.4"),
        ("llama", Method.LAYERS, 0.1, "takes 0 of 2 layers: the smallest step is 0.5"),
        ("llama", Method.LAYERS, 0.9, "takes 2 of 2 layers"),
        ("llama", Method.HEADS, 0.1, "takes 0 of 2 groups of heads"),
        ("gpt2", Method.HEADS, 0.5, "heads of gpt2 models can't be removed; columns and layers can"),
        ("bert", Method.HEADS, 0.5, "heads of bert models can't be removed; columns and layers can"),
        ("llama", Method.WANDA, 1.0, "sparsity must be between 0 and 1, found 1"),
    ],
)
def test_impossible_shares(architecture: str, method: Method, sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.prune(make(architecture), method, sparsity, RUNS)


def test_an_architecture_that_is_not_known() -> None:
    model = make("llama")
    model.config.model_type = "rwkv"
    with pytest.raises(ValueError, match="models of type rwkv can't be pruned or distilled; known are llama"):
        pruning.prune(model, Method.LAYERS, 0.5, RUNS)


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("old")
    model = make("bert")

    def full(path: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", full)
        with pytest.raises(NoSpace, match=f"the disk of {tmp_path} is full"):
            models.save(model, HuggingFaceFolder(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 10})
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(NoSpace, match="and 0 MiB are free|, 0 MiB are free"):
            models.save(model, HuggingFaceFolder(source), tmp_path / "out")
    models.save(model, HuggingFaceFolder(source), tmp_path / "out")
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    torch.testing.assert_close(answer(AutoModel.from_pretrained(tmp_path / "out").eval()), answer(model))


# Distillation


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[models_file.ModelSpec]:
    make("llama").save_pretrained(tmp_path / "llama")
    table = {"task": "text-generation", "source": {"path": "llama"}, "variants": ["fp32"], "limits": {"context": 64}}
    yield models_file.parse("llama", table)


def test_softened_divergence_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    found, expected = torch.randn(3, 7), torch.randn(3, 7)
    assert torch.allclose(distillation.soft_divergence(found, found, 2.0), torch.zeros(3), atol=1e-6)
    p, q = (expected / 2).softmax(-1), (found / 2).softmax(-1)
    torch.testing.assert_close(
        distillation.soft_divergence(found, expected, 2.0), 4 * (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6
    )


def test_states_count_by_token() -> None:
    expected = torch.tensor([[3.0, 4.0], [3000.0, 4000.0]])
    found = torch.tensor([[3.0, 3.0], [3000.0, 3000.0]])
    torch.testing.assert_close(distillation.state_distance(found, expected), torch.tensor([1 / 25, 1 / 25]))


def test_a_layer_learns_what_the_next_one_is_used_to_read() -> None:
    assert distillation.targets([0, 1, 4, 5, 7], 10) == [0, 3, 4, 6, 9]


@pytest.mark.parametrize(("count", "total", "expected"), [(2, 4, [1, 3]), (3, 3, [0, 1, 2]), (3, 8, [2, 5, 7])])
def test_layers_are_spread_evenly(count: int, total: int, expected: list[int]) -> None:
    assert distillation.spread(count, total) == expected


def test_a_students_matrices_begin_like_its_teachers(spec: models_file.ModelSpec, tmp_path: Path) -> None:
    teacher = models.load(spec, HuggingFaceFolder(tmp_path / "llama"))
    config = LlamaConfig.from_pretrained(tmp_path / "llama")
    config.num_hidden_layers, config.intermediate_size = 1, 64
    config.save_pretrained(tmp_path / "small")
    student, origin = distillation.make_student(
        spec, HuggingFaceFolder(tmp_path / "llama"), str(tmp_path / "small" / "config.json")
    )
    assert origin == [1]
    mine, theirs = layouts.layers_of(student)[0], layouts.layers_of(teacher)[1]
    torch.testing.assert_close(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    torch.testing.assert_close(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight[:64])
    torch.testing.assert_close(mine.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:, :64])
    torch.testing.assert_close(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


def test_a_folder_with_weights_starts_from_them(spec: models_file.ModelSpec, tmp_path: Path) -> None:
    pruned = models.load(spec, HuggingFaceFolder(tmp_path / "llama"))
    pruning.prune(pruned, Method.COLUMNS, 1 / 3, RUNS)
    pruned.save_pretrained(tmp_path / "pruned")
    student, origin = distillation.make_student(spec, HuggingFaceFolder(tmp_path / "llama"), str(tmp_path / "pruned"))
    assert origin == [0, 1]
    torch.testing.assert_close(answer(student), answer(pruned))


def test_impossible_students(spec: models_file.ModelSpec, tmp_path: Path) -> None:
    other = LlamaConfig.from_pretrained(tmp_path / "llama", vocab_size=99)
    other.save_pretrained(tmp_path / "other")
    for student, message in (
        ("2", "a student has fewer layers than its teacher, 1 to 1: found 2"),
        ("0", "1 to 1: found 0"),
        ("nowhere", "a number of layers, a Hugging Face folder or a config.json: found 'nowhere'"),
        (str(tmp_path / "other"), "is a llama of 99 tokens, the teacher a llama of 512"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation.make_student(spec, HuggingFaceFolder(tmp_path / "llama"), student)


def test_what_is_wrong_is_told_before_the_teacher_is_read(tmp_path: Path) -> None:
    """Whose source is not there, so that reading it would fail with another sentence."""
    table = 'task = "text-generation"\nsource = { path = "gone" }\nvariants = ["fp32"]\nlimits = { context = 64 }\n'
    (tmp_path / "models.toml").write_text(f"[m]\n{table}")
    (tmp_path / "t.txt").write_text("A text.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "t.txt").touch()
    asked = {"--student": "1", "--text": str(tmp_path / "t.txt"), "--output": str(tmp_path / "student")}
    for flag, value, message in (
        ("--student", str(tmp_path / "none"), "a student is a number of layers, .*: found '.*/none'"),
        ("--student", str(tmp_path / "empty"), "a student is a number of layers, .*: found '.*/empty'"),
        ("--text", str(tmp_path / "none"), "none can't be read: No such file or directory"),
        ("--output", str(tmp_path / "full"), "full is there and is no model's folder"),
        ("--student", "1", "gone"),
    ):
        arguments = [each for pair in {**asked, flag: value}.items() for each in pair]
        options = cli._parse(["distill", "m", "--models-file", str(tmp_path / "models.toml"), *arguments])
        with pytest.raises(ExportError, match=message):
            cli._distill(options)


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"temperature": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"minutes": -1.0},
        {"minutes": math.nan},
        {"hidden_weight": math.inf},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_impossible_settings(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must"):
        distillation.Settings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "variants"), [("fp32", ["fp32"]), ("int8", ["int8", "fp32"]), ("int4", ["int4", "fp32"])]
)
def test_a_compressed_model_is_served_by_what_it_was_measured(
    spec: models_file.ModelSpec, tmp_path: Path, variant: str, variants: list[str]
) -> None:
    (table,) = tomllib.loads(models.table(spec, "small", tmp_path, variant)).values()
    assert (table["variants"], table["default_variant"]) == (variants, variant)
    parsed = models_file.parse("small", table)
    assert (parsed.default_variant, list(parsed.variants)) == (variant, variants)


def test_nothing_is_learned_for_an_output_that_is_taken(spec: models_file.ModelSpec, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("")
    source = HuggingFaceFolder(tmp_path / "llama")
    for output, message in ((taken, "taken is there and is no model's folder"), (taken / "mine.txt" / "out", "a file")):
        with pytest.raises(NotWritable, match=message):
            distillation.distill(spec, source, "1", ["a text"], output, distillation.Settings(), print)
