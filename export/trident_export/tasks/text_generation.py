"""Causal language models: one folder a variant, which `trident_generator` serves from text to text."""

from __future__ import annotations

import gc
import inspect
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trident_export import corpora, disk, recipes
from trident_export.errors import FidelityError, ModelsFileError, TextError, UnreadableSource
from trident_export.graphs import decoder_passes, rotary
from trident_export.graphs.causal import export_causal_graph
from trident_export.graphs.editing import save
from trident_export.graphs.lora import Lora, skip_idle_blocks
from trident_export.graphs.read_rows import compute_read_rows
from trident_export.graphs.states import PAST, keeps_states
from trident_export.graphs.tracing import running
from trident_export.huggingface import chat_templates, lora, text_part
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.vocabulary import drop_tokens_beyond, rows_of
from trident_export.measure import fidelity
from trident_export.measure import texts as texts_gate
from trident_export.models_file import ModelSpec
from trident_export.passes import CalibrationRuns, Feeds
from trident_export.progress import Counted, track
from trident_export.recipes import Kind
from trident_export.tasks import Evaluator, Job, image_parts
from trident_serving.artefacts import VERSION
from trident_serving.chat.template import TOOLS_FILE, ChatTemplate
from trident_serving.generation.batch import MIN_KEYS, MIN_POSITIONS, SlotTokens, pack
from trident_serving.generation.decoder import IMAGE_EMBEDS, OnnxDecoder
from trident_serving.generation.drafting import MAX_DRAFT
from trident_serving.runtime.kv_cache import KEYS
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits

# Tokens of each text that the gate compares, and how many of them it runs one at a time.
GATE_TEXTS = 12
GATE_TOKENS = 64
GATE_DECODED = 8
# A text that goes beyond a sliding window or an original context has so many tokens at most.
FAR_TOKENS = 4200
# Logits of such a text that are compared at most, a quarter of a gigabyte.
FAR_LOGITS = 2**26
# Texts that it runs at once.
GATE_ROWS = 4
# Calibration texts that run at once, and tokens of those in a chat template.
CALIBRATION_ROWS = 4
CHAT_TOKENS = 96
# Tokens of an answer that the thorough evaluation compares.
GREEDY_TOKENS = 32


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """See `trident_export.tasks`."""
    source.check_head(AutoModelForCausalLM)
    check_context(spec, source.config)
    check_texts(source)
    if spec.generation and spec.generation.images:
        image_parts.check(spec, source)


def check_texts(source: HuggingFaceFolder) -> None:
    """Refuse a tokenizer, a chat template or a generation config that can't be served.

    Raises:
        ExportError: there is one.
    """
    _ = source.generation_config
    tokenizer = source.fast_tokenizer
    for template in (default_template(source, tokenizer.chat_template), template_for_tools(tokenizer.chat_template)):
        if template is not None:
            chat_templates.check(source, template, tokenizer.special_tokens_map)


def trace(job: Job) -> None:
    """See `trident_export.tasks`."""
    spec = job.spec
    adapters = read_adapters(job)
    job.progress("loading the model")
    assert spec.generation
    limits = spec.generation
    whole = job.source.load_whole(AutoModelForCausalLM) if limits.images else None
    model = load_model(job.source) if whole is None else text_part.of(whole, job.source)
    if unused := texts_gate.not_applied(job.source.generation_config):
        job.progress(f"the generation config's {', '.join(unused)} are not applied: a request gives what it wants")
    check_device(spec, model)
    check_draft(spec, model)
    disk.require(job.staging, (model if whole is None else whole).num_parameters() * 4, spec.recipes)
    save_text_files(job.source, job.assets, rows_of(model))
    if whole is not None:
        image_parts.write(job, whole)
    job.graphs.mkdir()
    job.progress("tracing the graph")
    traced = export_causal_graph(model, positions(limits), limits.context, adapted=bool(adapters))
    optimized = decoder_passes.optimize(traced, ragged=limits.device == "cpu", adapters=adapters)
    if limits.images:
        image_parts.add_inputs(optimized)
    save(optimized, job.graphs / "model.onnx")


def read_adapters(job: Job) -> list[Lora]:
    """The adapters of a job's source; the base is in memory once meanwhile."""
    found = []
    for name, folder in lora.adapters_of(job.source).items():
        job.progress(f"reading the adapter {name}")
        found.append(lora.read(job.source, name, folder, AutoModelForCausalLM))
        gc.collect()
    return found


def positions(limits: GenerationLimits) -> int:
    """Positions of a slot: its context, and room for the padding of the longest run behind it, or of a short text."""
    return max(limits.context + max(limits.prefill_chunk, MAX_DRAFT + 1), MIN_KEYS)


def write(job: Job, variant: str) -> None:
    """See `trident_export.tasks`."""
    folder = job.staging / job.spec.public_name(variant) / VERSION
    graph, runs = job.graphs / "model.onnx", calibration_runs(job)
    assert job.spec.generation
    images = job.spec.generation.images > 0
    branches = bool(job.spec.adapters) and job.spec.generation.device == "cpu"  # a GPU would wait at each for the CPU

    def finish(model: ir.Model) -> None:
        compute_read_rows(model)
        decoder_passes.sum_scores_alike(model)
        if images:
            image_parts.add_positions(model, job.source)
        if branches:
            skip_idle_blocks(model)

    recipes.apply(job.spec.recipes[variant], Kind.DECODER, graph, folder / "model.onnx", runs, finish)
    shutil.copytree(job.assets, folder, dirs_exist_ok=True)


def calibration_runs(job: Job) -> CalibrationRuns:
    """Calibration texts as the graph's inputs, some in a run, each from an empty cache.

    Where there are adapters, all texts run once more, each with one of them: keys and activations can have larger
    numbers with an adapter than without. Where the model has a chat template, a third of the texts run once more as a
    user's message: its tokens are in no text.

    Raises:
        TextError: when texts are drawn: the file has none.
    """

    def feeds(samples: int, seed: int) -> Feeds:
        tokenizer = TextTokenizer.load(job.assets)
        graph = onnx.load(str(job.graphs / "model.onnx"), load_external_data=False).graph
        texts = corpora.calibration(job.spec.calibration, samples, seed)
        assert job.spec.generation
        room = positions(job.spec.generation) - 1  # `pack` may add a position
        tokens = [tokenizer.encode(text)[: min(GATE_TOKENS, room)] for text in texts]
        if (template := ChatTemplate.load(job.assets)) is not None:
            chats = [template.render([{"role": "user", "content": text}]) for text in texts[::3]]
            tokens += [tokenizer.encode(chat, add_special_tokens=False)[: min(CHAT_TOKENS, room)] for chat in chats]
        tokens = [ids for ids in tokens if len(ids) >= MIN_POSITIONS]
        groups = [tokens[start : start + CALIBRATION_ROWS] for start in range(0, len(tokens), CALIBRATION_ROWS)]
        runs = [(group, [0] * len(group)) for group in groups]
        if count := len(job.spec.adapters):
            numbers = cycle(range(1, count + 1))
            runs += [(group, list(islice(numbers, len(group)))) for group in groups]
        return Counted((inputs_of(graph, *group, adapters=chosen) for group, chosen in runs), len(runs))

    return feeds


def inputs_of(
    graph: onnx.GraphProto, *texts: Sequence[int], adapters: Sequence[int] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of a float32 graph that run the tokens of texts, each at least `MIN_POSITIONS`, from an empty cache.

    Args:
        adapters: of each text; None: none has one.
    """
    chosen = adapters or [0] * len(texts)
    items = [SlotTokens(row, 0, ids, adapter=chosen[row]) for row, ids in enumerate(texts)]
    packed = pack(items)
    longest = packed.attention_tokens.shape[1]
    capacity = -(-longest // KEYS) * KEYS  # attention by plain operators reads as many keys
    feed: dict[str, NDArray[Any]] = {}
    for value in graph.input:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name.startswith(PAST):
            feed[value.name] = np.zeros((len(texts), *sizes[1:]), np.float32)
        elif value.name.startswith("past"):
            _, heads, _, size = sizes
            feed[value.name] = np.zeros((len(texts), heads, capacity, size), np.float32)
        elif value.name == "total_sequence_length":
            feed[value.name] = np.array(longest, np.int32)
        elif value.name == IMAGE_EMBEDS:
            feed[value.name] = np.zeros((0, sizes[1]), np.float32)
        else:
            feed[value.name] = getattr(packed, value.name)
    return feed


def evaluator(
    spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
) -> Evaluator:
    """See `trident_export.tasks`; the measures are those of `fidelity.compare_logits`.

    `greedy_match`, the thorough one, is how many of the first `GREEDY_TOKENS` tokens that the variant answers greedily
    are Hugging Face's, up to the first that is not, the mean over the texts' beginnings.
    """
    assert spec.generation
    model = source.reference(AutoModelForCausalLM)
    tokenizer = TextTokenizer.load(root / spec.name / VERSION)
    texts_gate.check(source, model, root / spec.name / VERSION, spec.generation, corpora.held_out())
    # A text runs whole, so a slot needs twice its length.
    samples = sample_ids(tokenizer, positions(spec.generation) // 2, source.text_config.vocab_size, texts)
    reference = reference_logits(model, samples)
    far = far_text(source, model, tokenizer, spec.generation, texts)
    # Where the model will run, if that device is here; a machine without a GPU measures the same graph on its CPU.
    device = spec.generation.device if _has(spec.generation.device) else "cpu"
    prompts = [ids[: min(len(ids), spec.generation.context - GREEDY_TOKENS) // 2 or 1] for ids in samples]
    expected = [greedy_answer(model, ids) for ids in prompts] if thorough else []
    folder = root / spec.name / VERSION
    pictured = image_parts.ask(source, model, folder, spec.generation) if spec.generation.images else []
    name = type(model).__name__
    del model  # so that sessions have its memory
    adapters = adapter_references(source, samples)

    def evaluate(variant: str) -> dict[str, float]:
        folder = root / spec.public_name(variant) / VERSION
        with running(f"the graph of a {name}", "be run over the gate's texts"):
            measured = measure(folder, samples, reference, device, far, pictured)
            for adapter, found in measure_adapters(folder, samples, adapters, device).items():
                measured |= fidelity.of_adapter(found, adapter)
        if thorough:
            measured["greedy_match"] = fidelity.mean_match(expected, served_answers(folder, prompts, device))
        return measured

    return evaluate


def _has(device: str) -> bool:
    return device == "cpu" or "CUDAExecutionProvider" in ort.get_available_providers()


def load_model(source: HuggingFaceFolder) -> PreTrainedModel:
    """The model in float32, in evaluation mode."""
    return source.load(AutoModelForCausalLM)


def check_context(spec: ModelSpec, config: PretrainedConfig) -> None:
    """The context of models.toml must be one that the model was built for.

    Raises:
        ModelsFileError: it is larger.
    """
    assert spec.generation
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and spec.generation.context > longest:
        raise ModelsFileError(
            f"[{spec.name}] limits.context is {spec.generation.context}, the model was built for {longest} positions"
        )
    fixed = fixed_context(config)
    if fixed is not None and spec.generation.context > fixed:
        raise ModelsFileError(
            f"[{spec.name}] limits.context is {spec.generation.context}, but this model's rotary embedding changes "
            f"with every token beyond its original context: set it to {fixed} at most"
        )
    original = rotary.original_context(_only_config(config))
    if original is not None and spec.generation.context > original and spec.generation.device != "cpu":
        raise ModelsFileError(
            f"[{spec.name}] limits.context is {spec.generation.context}, but on a GPU a model with two rotations "
            f"(longrope) is served within its original context only: set it to {original} at most"
        )


def fixed_context(config: PretrainedConfig) -> int | None:
    """Positions up to which a model's rotary embedding stays the same; None where it never changes."""
    return rotary.longest_context(_only_config(config))


def _only_config(config: PretrainedConfig) -> PreTrainedModel:
    """What stands in for a model where nothing else is asked of it."""
    return cast("PreTrainedModel", SimpleNamespace(config=config))


def check_device(spec: ModelSpec, model: PreTrainedModel) -> None:
    """States beside the KV cache are kept on the CPU only.

    Raises:
        ModelsFileError: the model keeps some, and its device is another.
    """
    assert spec.generation
    if spec.generation.device != "cpu" and keeps_states(model):
        raise ModelsFileError(
            f"[{spec.name}] device is {spec.generation.device!r}, but models of type {model.config.model_type!r} keep "
            'states that are served on the CPU only: set device = "cpu"'
        )


def check_draft(spec: ModelSpec, model: PreTrainedModel) -> None:
    """A token of a draft that is refused can't be taken back from a state.

    Raises:
        ModelsFileError: the model keeps some, and another is to draft for it.
    """
    if spec.draft and keeps_states(model):
        raise ModelsFileError(
            f"[{spec.name}] has the draft {spec.draft!r}, but models of type {model.config.model_type!r} keep states, "
            "from which a token that is refused can't be taken back: remove the key"
        )


def save_text_files(source: HuggingFaceFolder, folder: Path, rows: int) -> None:
    """Write the tokenizer, the chat template and the generation config that the runtime reads.

    Args:
        rows: of the model's embedding.

    Raises:
        UnreadableSource: the tokenizer is another model's, or a template can't be used.
    """
    folder.mkdir(parents=True)
    tokenizer = source.fast_tokenizer
    texts_gate.check_file(source)
    named = tokenizer.chat_template
    tokenizer.chat_template = default_template(source, named)
    tokenizer.save_pretrained(str(folder))
    tokenizer.chat_template = named
    for name in ("config.json", "generation_config.json"):
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    }
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (for_tools := template_for_tools(named)) is not None:
        (folder / TOOLS_FILE).write_text(for_tools, encoding="utf-8")
    drop_tokens_beyond(source, folder / "tokenizer.json", rows)
    if not (folder / "generation_config.json").exists():
        # Older models keep these settings in their config.
        source.generation_config.save_pretrained(str(folder))


def default_template(source: HuggingFaceFolder, templates: str | dict[str, str] | None) -> str | None:
    """The chat template that is served: the only one, or of several that are named the one called default.

    Raises:
        UnreadableSource: none of several is called default.
    """
    if not isinstance(templates, dict):
        return templates
    if "default" not in templates:
        raise UnreadableSource(
            f"{source}: of the chat templates {', '.join(sorted(templates))} none is named default, which is the one "
            "that is served: name it so, or take them away to serve the model without messages"
        )
    return templates["default"]


def template_for_tools(templates: str | dict[str, str] | None) -> str | None:
    """Of several templates that are named, the one that transformers takes for conversations with tools."""
    return templates.get("tool_use") if isinstance(templates, dict) else None


def greedy_answer(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """Hugging Face's likeliest tokens, one after the other; nothing ends them."""
    tokens = list(ids)
    with torch.inference_mode():
        for _ in range(GREEDY_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def served_answers(folder: Path, prompts: list[list[int]], device: str = "cpu") -> list[list[int]]:
    """The same by the decoder in a version folder, several at once."""
    context = max(len(ids) for ids in prompts) + GREEDY_TOKENS
    decoder = OnnxDecoder(
        folder / "model.onnx",
        slots=GATE_ROWS,
        context=context,
        longest_run=context,
        threads=0,
        device=device,
    )
    answers: list[list[int]] = []
    for start in range(0, len(prompts), GATE_ROWS):
        group = prompts[start : start + GATE_ROWS]
        items = [SlotTokens(row, 0, ids, 1, decoder.rotation(len(ids))) for row, ids in enumerate(group)]
        found: list[list[int]] = [[] for _ in group]
        for step in range(GREEDY_TOKENS):
            for tokens, likeliest in zip(found, decoder.run(items).argmax(axis=-1), strict=True):
                tokens.append(int(likeliest))
            items = []
            for row, ids in enumerate(group):
                place = len(ids) + step
                rotation = decoder.rotation(place + 1)
                again = rotation != decoder.rotation(place)
                tokens = [*ids, *found[row]] if again else found[row][-1:]
                items.append(SlotTokens(row, 0 if again else place, tokens, 1, rotation))
        answers += found
    return answers


def sample_ids(tokenizer: TextTokenizer, longest: int, vocabulary: int, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of some of the texts as a request has them, each at most GATE_TOKENS long.

    Where the tokenizer begins a text with a token, as Gemma's and Llama's do, so do these: without it such a model
    computes what no request sees, and quantization is judged by that.

    Raises:
        UnreadableSource: the tokenizer is not this model's.
        TextError: the texts are too short for it.
    """
    length = min(GATE_TOKENS, longest)
    samples = [tokenizer.encode(text)[:length] for text in texts]
    largest = max((token for ids in samples for token in ids), default=0)
    if largest >= vocabulary:
        raise UnreadableSource(
            f"the tokenizer gives the token {largest}, the model has {vocabulary}: it is another model's"
        )
    samples = [ids for ids in samples if len(ids) >= length // 2]
    if not samples:
        raise TextError("the tokenizer gives too few tokens for the texts: is it the model's own, are they too short?")
    step = max(1, len(samples) // GATE_TEXTS)
    return samples[::step][:GATE_TEXTS]


def reference_logits(model: PreTrainedModel, samples: list[list[int]]) -> list[NDArray[np.float32]]:
    """Hugging Face's logits, float32 [tokens, vocabulary] for each text."""
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in track(samples, "Hugging Face")]


@dataclass(frozen=True)
class FarText:
    """A text that goes beyond a model's sliding window and the context that it was first trained for.

    Of a model with a table of positions it is as long as the context, and as many of its tokens are compared as fit
    into `FAR_LOGITS`, in parts that are spread over it; of another, the last `GATE_TOKENS`.

    Attributes:
        parts: ranges of tokens that are compared, rising.
        reference: Hugging Face's logits of each, float32 [tokens, vocabulary].
        chunk: tokens that run at once.
    """

    ids: list[int]
    parts: list[range]
    reference: list[NDArray[np.float32]]
    chunk: int


def far_text(
    source: HuggingFaceFolder,
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    limits: GenerationLimits,
    texts: Sequence[str],
) -> FarText | None:
    """See `FarText`; None where the model has no such bound within its context and `FAR_TOKENS`."""
    within = min(limits.context, FAR_TOKENS)
    reached = [bound for bound in far_bounds(source.text_config) if GATE_TOKENS // 2 <= bound < within - GATE_DECODED]
    length = min(within - 1, max(reached) + GATE_TOKENS) if reached else 0
    table = has_position_table(model)
    if table:
        length = within - 1
    if length < GATE_TOKENS // 2:
        return None
    ids: list[int] = []
    for text in cycle(texts):
        if len(ids) >= length:
            break
        ids += tokenizer.encode(text + "\n", add_special_tokens=not ids)
    kept = min(GATE_TOKENS, length)
    parts = far_parts(length, source.text_config.vocab_size) if table else [range(length - kept, length)]
    chunk = positions(limits) - limits.context
    return FarText(ids[:length], parts, part_logits(model, ids[:length], parts), chunk)


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether a model learns a vector for each position, so that each is right or wrong by itself."""
    tables = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding))
    return any("pos" in name or name.endswith("wpe") for name in tables)


def far_parts(length: int, vocabulary: int) -> list[range]:
    """Parts of a text that are compared: all of it in parts of `GATE_TOKENS`, or some that are spread over it."""
    parts = [range(start, min(start + GATE_TOKENS, length)) for start in range(0, length, GATE_TOKENS)]
    most = max(1, FAR_LOGITS // (vocabulary * GATE_TOKENS))
    if len(parts) <= most:
        return parts
    return [parts[index] for index in np.linspace(len(parts) - 1, 0, most).round().astype(int)[::-1]]


def far_bounds(config: Any) -> list[int]:
    """Lengths behind which a model computes otherwise: its sliding window, its chunks, its original context."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    found += [part.get("original_max_position_embeddings") for part in ropes]
    found.append(getattr(config, "original_max_position_embeddings", None))
    return [int(bound) for bound in found if isinstance(bound, int) and bound > 0]


def part_logits(model: PreTrainedModel, ids: list[int], parts: Sequence[range]) -> list[NDArray[np.float32]]:
    """Hugging Face's logits of parts of a long text, float32 [tokens, vocabulary] each."""
    wanted = torch.tensor([place for part in parts for place in part])
    kept = len(ids) - int(wanted[0])
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    # One part is the end of the text, and a number says so to every model.
    few = {"logits_to_keep": kept if len(parts) == 1 else wanted} if keeps else {}
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), **few).logits[0].float()
        if len(logits) > len(wanted):
            logits = logits[wanted - (len(ids) - len(logits))]
    return [rows.numpy() for rows in logits.split([len(part) for part in parts])]


def far_logits(folder: Path, far: FarText, device: str) -> list[NDArray[np.float32]]:
    """The same by the decoder in a version folder: in chunks, and the last tokens one by one."""
    length = len(far.ids)
    decoder = OnnxDecoder(
        folder / "model.onnx", slots=1, context=length, longest_run=far.chunk, threads=0, device=device
    )
    bounds = [*range(0, length - GATE_DECODED, far.chunk), *range(length - GATE_DECODED, length + 1)]
    wanted = {place for part in far.parts for place in part}
    logits = []
    for start, stop in pairwise(bounds):
        inside = [place for place in range(start, stop) if place in wanted]
        first = inside[0] if inside else stop - 1
        rows = decoder.run([SlotTokens(0, start, far.ids[start:stop], stop - first, decoder.rotation(length))])
        if inside:
            logits.append(rows[np.array(inside) - first])
    cuts = np.cumsum([len(part) for part in far.parts])[:-1]
    return np.split(np.concatenate(logits), cuts)


def measure(
    folder: Path,
    samples: list[list[int]],
    reference: list[NDArray[np.float32]],
    device: str = "cpu",
    far: FarText | None = None,
    pictured: Sequence[image_parts.Pictured] = (),
) -> dict[str, float]:
    """Compare the decoder in a version folder with Hugging Face; see `fidelity.compare_logits`.

    The texts run as they would be served, several at once: each in two chunks, then token by token, beside rows
    that are somewhere else. `batch_effect` is the largest difference of a logit from a text that runs alone and whole.
    """
    longest = max(len(ids) for ids in samples)
    context = max(longest, *(len(prompt.ids) for prompt in pictured)) if pictured else longest
    run = max(longest, image_parts.RUN) if pictured else longest
    decoder = OnnxDecoder(
        folder / "model.onnx", slots=GATE_ROWS, context=context, longest_run=run, threads=0, device=device
    )
    found: list[NDArray[np.float32]] = []
    for start in track(range(0, len(samples), GATE_ROWS), folder.parent.name):
        found += _served_logits(decoder, samples[start : start + GATE_ROWS])
    pairs = track(list(zip(samples, found, strict=True)), f"{folder.parent.name}, one at a time")
    effect = max(_effect(decoder, ids, served) for ids, served in pairs)
    if pictured:
        behind, with_images = image_parts.measure(decoder, pictured)
        effect = max(effect, with_images)
        reference, found = [*reference, *(prompt.reference for prompt in pictured)], [*found, *behind]
        samples = [*samples, *(prompt.compared for prompt in pictured)]
    del decoder  # one session at a time
    if far is not None:
        reference, found = [*reference, *far.reference], [*found, *far_logits(folder, far, device)]
        samples = [*samples, *(far.ids[part.start : part.stop] for part in far.parts)]
        longest = max(longest, len(far.ids))
    compared = fidelity.compare_logits(reference, found, samples)
    return compared | {"batch_effect": effect, fidelity.LONGEST: float(longest)}


class AdapterReferences:
    """What Hugging Face's model says with each adapter, in files: of many adapters it is gigabytes.

    Args:
        names: of the adapters, in their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def keep(self, adapter: int, logits: Sequence[NDArray[np.float32]]) -> None:
        """Write the logits of each text."""
        for text, rows in enumerate(logits):
            np.save(self._file(adapter, text), rows)

    def logits(self, adapter: int, text: int) -> NDArray[np.float32]:
        """Of one text, float32 [tokens, vocabulary]."""
        found: NDArray[np.float32] = np.load(self._file(adapter, text))
        return found

    def _file(self, adapter: int, text: int) -> Path:
        return self._folder / f"{adapter}-{text}.npy"


def adapter_references(source: HuggingFaceFolder, samples: list[list[int]]) -> AdapterReferences:
    """Ask Hugging Face's model with each adapter of a source."""
    references = AdapterReferences(list(lora.adapters_of(source)))
    for adapter, name in enumerate(references.names):
        assert isinstance(source, lora.BaseWithAdapters)
        references.keep(adapter, reference_logits(source.reference_with(name, AutoModelForCausalLM), samples))
        gc.collect()
    return references


def measure_adapters(
    folder: Path, samples: list[list[int]], references: AdapterReferences, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Compare a decoder's adapters with Hugging Face's model that has each of them; the measures are `measure`'s.

    Neighbours in a run have different adapters, or none.

    Raises:
        FidelityError: the graph has other adapters.
    """
    names = references.names
    if not names:
        return {}
    longest = max(len(ids) for ids in samples)
    decoder = OnnxDecoder(
        folder / "model.onnx", slots=GATE_ROWS, context=longest, longest_run=longest, threads=0, device=device
    )
    if decoder.adapters != names:
        raise FidelityError(f"{folder.parent.name} has the adapters {decoder.adapters}, models.toml says {names}")
    compared: list[list[NDArray[np.float64]]] = [[] for _ in names]
    effects = [0.0] * len(names)
    for text, ids in enumerate(track(samples, f"{folder.parent.name}, adapters")):
        jobs = range(len(names) + 1)
        found: list[NDArray[np.float32]] = []
        for start in jobs[::GATE_ROWS]:
            group = jobs[start : start + GATE_ROWS]
            found += _served_logits(decoder, [ids] * len(group), group)
        for adapter, served in enumerate(found[1:]):
            compared[adapter].append(fidelity.compare_tokens(references.logits(adapter, text), served))
            effects[adapter] = max(effects[adapter], _effect(decoder, ids, served, adapter + 1))
    return {
        name: fidelity.summary(each) | {"batch_effect": effect}
        for name, each, effect in zip(names, compared, effects, strict=True)
    }


def _effect(decoder: OnnxDecoder, ids: list[int], served: NDArray[np.float32], adapter: int = 0) -> float:
    """The largest difference of a text's logits from those that it has when it runs alone and whole."""
    alone = decoder.run([SlotTokens(0, 0, ids, len(ids), decoder.rotation(len(ids)), adapter)])
    return float(np.abs(alone - served).max())


def _served_logits(
    decoder: OnnxDecoder, samples: list[list[int]], adapters: Sequence[int] = ()
) -> list[NDArray[np.float32]]:
    """Logits of texts that run together, a row each; float32 [tokens, vocabulary] for each text.

    Args:
        adapters: of each text; (): none.
    """
    pieces: list[list[SlotTokens]] = []
    for row, ids in enumerate(samples):
        adapter = adapters[row] if adapters else 0
        decoded = min(GATE_DECODED + row, len(ids) - 2)
        middle = (len(ids) - decoded) // (2 + row)
        bounds = [0, middle, *range(len(ids) - decoded, len(ids) + 1)]
        rotation = decoder.rotation(len(ids))
        pieces.append([SlotTokens(row, a, ids[a:b], b - a, rotation, adapter) for a, b in pairwise(bounds) if a < b])
    logits: list[list[NDArray[np.float32]]] = [[] for _ in samples]
    for step in zip_longest(*pieces):
        items = [item for item in step if item is not None]
        result = decoder.run(items)
        begin = 0
        for item in items:
            logits[item.slot].append(result[begin : begin + item.wanted].copy())
            begin += item.wanted
    return [np.concatenate(parts) for parts in logits]
