"""config.pbtxt, built as protobuf from models.toml.

The same config serves on Triton's native backends and on ours; docs/reference/requests.md has the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from trident_export.models_file import ModelSpec
from trident_serving import artefacts, encoders
from trident_serving.artefacts import CONFIG, CONFIG_HEADER, UNVERIFIED, read_manifest
from trident_serving.encoders.task import EncoderTask, Tensor
from trident_serving.schema.fields import EXPLANATION, GENERATION, LANGUAGES, SEQ2SEQ, SPEECH, TEMPLATE, Field
from trident_serving.schema.limits import (
    CausalLimits,
    EncoderLimits,
    ExplanationLimits,
    ImageLimits,
    Seq2SeqLimits,
    SpeechLimits,
    TemplateLimits,
)


def build(spec: ModelSpec, unverified: Mapping[str, str] | None = None) -> dict[str, pb.ModelConfig]:
    """The configs of every Triton model that a spec needs, by name.

    Args:
        unverified: variants that the gate refused, with its reason: it becomes a parameter of the public models.
    """
    if spec.causal:
        configs = [_generator(spec, spec.public_name(variant), spec.causal) for variant in spec.variants]
    elif spec.template:
        configs = [_template(spec, spec.template)]
    elif spec.seq2seq:
        configs = [_seq2seq(spec.public_name(variant), spec.seq2seq) for variant in spec.variants]
    elif spec.speech:
        configs = [_speech(spec.public_name(variant), spec.speech) for variant in spec.variants]
    else:
        limits = spec.encoder or spec.images
        assert limits
        configs = list(_ensemble(spec, limits))
    if spec.explain is not None:
        configs.append(_explanation(spec, spec.explain))
    built = {config.name: config for config in configs}
    for variant in spec.variants:  # by which a client finds the model of a task, and its adapters
        _set_parameters(built[spec.public_name(variant)], {"task": spec.task})
        if spec.adapters:
            _set_parameters(built[spec.public_name(variant)], {"adapters": ",".join(spec.adapters)})
        if spec.guard is not None:
            _set_parameters(built[spec.public_name(variant)], {"guard": spec.guard.as_json()})
            built[spec.public_name(variant)].output.append(_tensor(pb.ModelOutput, "guard", "STRING", [-1]))
    for variant, reason in (unverified or {}).items():
        _set_parameters(built[spec.public_name(variant)], {UNVERIFIED: reason})
    return built


def model_part(spec: ModelSpec, variant: str, tower: str = "") -> str:
    """The name of the Triton model that holds a variant's graph in an ensemble.

    Args:
        tower: which of the graphs, where the task has several.
    """
    return spec.public_name(variant).replace(spec.name, f"{spec.name}_model{tower and '-'}{tower}", 1)


def model_parts(spec: ModelSpec, variant: str) -> list[str]:
    """The same for every graph of the task."""
    return [model_part(spec, variant, tower.name) for tower in encoders.TASKS[spec.task].graphs]


def first_stage(spec: ModelSpec) -> str:
    """The name of the Triton model that reads a request of an ensemble."""
    return f"{spec.name}_{encoders.TASKS[spec.task].stage}"


def explanation(spec: ModelSpec) -> str:
    """The name of the Triton model that explains a model's answers."""
    return f"{spec.name}_explain"


def alias(spec: ModelSpec) -> str:
    """The name of the Triton model that is the default variant with other names of its tensors; "": there is none."""
    return f"{spec.name}_texts" if spec.encoder and encoders.TASKS[spec.task].alias else ""


def to_text(config: pb.ModelConfig) -> str:
    """A config as the text of its config.pbtxt."""
    text: str = text_format.MessageToString(config)
    return CONFIG_HEADER + text


def pin(config: pb.ModelConfig, version: int) -> pb.ModelConfig:
    """The config of a version that may lie beside others: it names the version, and an ensemble that of its stages."""
    pinned = pb.ModelConfig()
    pinned.CopyFrom(config)
    pinned.version_policy.specific.versions.append(version)
    for step in pinned.ensemble_scheduling.step if pinned.platform == "ensemble" else ():
        if "_" in step.model_name:  # a stage; an alias asks the public model, whichever version it has
            step.model_version = version
    return pinned


def pinned_text(text: str, version: int) -> str:
    """The same of a config's text."""
    return to_text(pin(text_format.Parse(text, pb.ModelConfig()), version))


def expected(spec: ModelSpec, repository: Path) -> dict[str, str]:
    """The text of the config.pbtxt of every part of a spec.

    Once a model has had two versions, it is what the export of the one that is served has kept, whatever the table says
    by now; else it is what the table says.
    """
    built = build(spec, _installed(spec, repository))
    manifest = read_manifest(repository, spec.name)
    if manifest is None or not artefacts.is_pinned(repository, spec.name):
        return {name: to_text(config) for name, config in built.items()}
    (*_, version) = artefacts.served_versions(repository, spec.name)
    kept = {name: repository / name / str(version) / CONFIG for name in manifest.triton_models}
    return {
        name: path.read_text(encoding="utf-8") if path.exists() else to_text(pin(built[name], version))
        for name, path in kept.items()
        if path.exists() or name in built
    }


def keeps_guard(spec: ModelSpec, repository: Path, version: int) -> bool:
    """Whether the configs that a version has kept have the guard of the table.

    The fingerprint does not cover it, and once a model has had two versions its configs are those kept ones.
    """
    wanted = spec.guard.as_json() if spec.guard is not None else ""
    for variant in spec.variants:
        kept = repository / spec.public_name(variant) / str(version) / CONFIG
        if not kept.is_file():
            continue
        config = text_format.Parse(kept.read_text(encoding="utf-8"), pb.ModelConfig())
        if config.parameters["guard"].string_value != wanted:
            return False
    return True


def write(spec: ModelSpec, repository: Path, unverified: Mapping[str, str] | None = None) -> list[Path]:
    """Write the config.pbtxt of every part of a spec; a file that is right is left alone.

    Args:
        unverified: see `build`; None: as the installed model is.

    Returns:
        The files that were written.
    """
    if unverified is None:
        texts = expected(spec, repository)
    else:
        texts = {name: to_text(config) for name, config in build(spec, unverified).items()}
    written = []
    for name, text in texts.items():
        path = repository / name / CONFIG
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def drift(
    specs: Iterable[ModelSpec],
    repository: Path,
    models_file: Path = Path("models.toml"),
    without: Collection[str] = (),
) -> list[str]:
    """What is out of step between a models file and a repository's configs, a sentence each.

    A model that is exported on demand has no configs before.

    Args:
        models_file: as the sentences name it.
        without: Triton models that may lack their configs.
    """
    problems = []
    texts: dict[str, str] = {}
    for spec in specs:
        its = expected(spec, repository)
        texts |= its
        if not spec.on_demand or read_manifest(repository, spec.name) is not None:
            missing = [repository / name / CONFIG for name in its if name not in without]
            problems += [f"{path} is missing" for path in missing if not path.exists()]
    for name, text in texts.items():
        path = repository / name / CONFIG
        if path.exists() and path.read_text(encoding="utf-8") != text:
            problems.append(f"{path} differs from {models_file}")
    for path in sorted(repository.glob(f"*/{CONFIG}")):
        if path.parent.name not in texts and path.read_text(encoding="utf-8").startswith(CONFIG_HEADER):
            problems.append(f"{path} belongs to no model of {models_file}")
    return problems


def _installed(spec: ModelSpec, repository: Path) -> Mapping[str, str]:
    """Variants of the installed model that the gate refused, with the reason."""
    manifest = read_manifest(repository, spec.name)
    refused = manifest.unverified if manifest is not None else {}
    return {variant: reason for variant, reason in refused.items() if variant in spec.variants}


def _tensor(
    kind: type[pb.ModelInput] | type[pb.ModelOutput], name: str, data_type: str, dims: Iterable[int], **more: bool
) -> pb.ModelInput | pb.ModelOutput:
    return kind(name=name, data_type=pb.DataType.Value(f"TYPE_{data_type}"), dims=list(dims), **more)


def _add_fields(config: pb.ModelConfig, fields: Iterable[Field]) -> None:
    config.input.extend(_tensor(pb.ModelInput, field.name, field.dtype, field.shape, optional=True) for field in fields)


def _set_parameters(config: pb.ModelConfig, parameters: dict[str, object]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = str(value).lower() if isinstance(value, bool) else str(value)


def _base(name: str, backend: str, max_batch_size: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, max_batch_size=max_batch_size)
    if backend == "ensemble":
        config.platform = "ensemble"
    else:
        config.backend = backend
        config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def _generator(spec: ModelSpec, name: str, limits: CausalLimits) -> pb.ModelConfig:
    # A batch of one, not none: TensorRT-LLM's clients send [1, 1], and Triton's generate endpoint either.
    config = _base(name, "trident_vllm" if spec.vllm_limits else "trident_generator", max_batch_size=1)
    if spec.generation and spec.generation.device == "cuda":
        config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    config.model_transaction_policy.decoupled = True
    for name_of_prompt in ("text_input", "messages"):
        config.input.append(_tensor(pb.ModelInput, name_of_prompt, "STRING", [1], optional=True))
    config.input.append(_tensor(pb.ModelInput, "input_ids", "INT32", [-1], optional=True))
    if spec.generation and spec.generation.images:
        config.input.append(_tensor(pb.ModelInput, "images", "STRING", [-1], optional=True))
    _add_fields(config, GENERATION)
    outputs = [
        ("text_output", "STRING", [-1]),
        ("finish_reason", "STRING", [-1]),
        ("index", "INT32", [-1]),
        ("num_input_tokens", "INT32", [1]),
        ("num_output_tokens", "INT32", [-1]),
        ("output_ids", "INT32", [-1]),
        ("output_tokens", "STRING", [-1]),
        ("output_log_probs", "FP32", [-1]),
        ("output_top_token_ids", "INT32", [-1, -1]),
        ("output_top_tokens", "STRING", [-1, -1]),
        ("output_top_log_probs", "FP32", [-1, -1]),
        ("prompt_token_ids", "INT32", [-1]),
        ("prompt_tokens", "STRING", [-1]),
        ("prompt_log_probs", "FP32", [-1]),
        ("prompt_top_token_ids", "INT32", [-1, -1]),
        ("prompt_top_tokens", "STRING", [-1, -1]),
        ("prompt_top_log_probs", "FP32", [-1, -1]),
        ("reasoning", "STRING", [-1]),
        ("tool_calls", "STRING", [-1]),
    ]
    config.output.extend(_tensor(pb.ModelOutput, *item) for item in outputs)
    values = asdict(limits)
    if not values.get("images"):
        values = {name: value for name, value in values.items() if not name.startswith("image")}
    _set_parameters(config, values)
    if spec.vllm_limits:
        _set_parameters(config, {"vllm": spec.vllm.as_json()})
    return config


def _seq2seq(name: str, limits: Seq2SeqLimits) -> pb.ModelConfig:
    # Not decoupled: one response, which every client and endpoint can take, and a request still can be cancelled.
    config = _base(name, "trident_seq2seq", max_batch_size=1)
    config.input.append(_tensor(pb.ModelInput, "text_input", "STRING", [1]))
    _add_fields(config, SEQ2SEQ)
    config.output.extend(_tensor(pb.ModelOutput, *item) for item in _TEXT_OUTPUTS)
    config.output.append(_tensor(pb.ModelOutput, "sequence_scores", "FP32", [-1]))
    _set_parameters(config, asdict(limits))
    return config


def _speech(name: str, limits: SpeechLimits) -> pb.ModelConfig:
    config = _base(name, "trident_speech", max_batch_size=1)
    config.model_transaction_policy.decoupled = True
    config.input.append(_tensor(pb.ModelInput, "audio", "STRING", [1]))
    _add_fields(config, SPEECH)
    outputs = [
        ("text_output", "STRING", [1]),
        ("finish_reason", "STRING", [1]),
        ("language", "STRING", [1]),
        ("duration", "FP32", [1]),
        ("num_output_tokens", "INT32", [1]),
        ("output_ids", "INT32", [-1]),
        ("segment_text", "STRING", [-1]),
        ("segment_start", "FP32", [-1]),
        ("segment_end", "FP32", [-1]),
        ("segment_tokens", "INT32", [-1]),
        ("segment_log_prob", "FP32", [-1]),
        ("segment_no_speech", "FP32", [-1]),
    ]
    config.output.extend(_tensor(pb.ModelOutput, *item) for item in outputs)
    _set_parameters(config, asdict(limits))
    return config


_TEXT_OUTPUTS: list[tuple[str, str, list[int]]] = [
    ("text_output", "STRING", [1]),
    ("finish_reason", "STRING", [1]),
    ("num_input_tokens", "INT32", [1]),
    ("num_output_tokens", "INT32", [1]),
    ("output_log_probs", "FP32", [-1]),
]


def _template(spec: ModelSpec, limits: TemplateLimits) -> pb.ModelConfig:
    """The tensors are those of the task's other models."""
    answers = spec.task == "question-answering"
    config = _base(spec.name, "trident_template", max_batch_size=0 if answers else 1)
    if answers:
        task = encoders.TASKS[spec.task]
        _add_tensors(config, limits, task.texts, (), task.answers)
    else:
        config.input.append(_tensor(pb.ModelInput, "text_input", "STRING", [1]))
        config.output.extend(_tensor(pb.ModelOutput, *item) for item in _TEXT_OUTPUTS)
    _add_fields(config, (*TEMPLATE, *LANGUAGES) if spec.task == "translation" else TEMPLATE)
    languages = {"source_lang": spec.source_lang, "target_lang": spec.target_lang}
    _set_parameters(config, {"task": spec.task, **asdict(limits), **languages})
    return config


def _explanation(spec: ModelSpec, limits: ExplanationLimits) -> pb.ModelConfig:
    config = _base(explanation(spec), "trident_explain", max_batch_size=1)
    config.input.append(_tensor(pb.ModelInput, "text_input", "STRING", [1]))
    _add_fields(config, EXPLANATION)
    config.output.extend(_tensor(pb.ModelOutput, name, "STRING", [1]) for name in ("explanation", "page"))
    first = sorted(spec.variants, key=lambda variant: variant != spec.default_variant)
    variants = ",".join(f"{variant}={spec.public_name(variant)}" for variant in first)
    its = asdict(spec.encoder) if spec.encoder else {}
    values = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in its.items()}
    known = {name: value for name, value in values.items() if value != ""}  # an empty list is a default
    _set_parameters(config, {**known, **asdict(limits), "task": spec.task, "explains": spec.name, "variants": variants})
    return config


def _ensemble(spec: ModelSpec, limits: EncoderLimits | ImageLimits) -> Iterable[pb.ModelConfig]:
    task = encoders.TASKS[spec.task]
    batch = limits.max_batch_size
    outer = batch if task.batched else 0
    has = {"": True, "prompts": bool(spec.prompts), "matryoshka": bool(getattr(limits, "matryoshka", ()))}
    options, answer_options = (
        [tensor for tensor in tensors if has[tensor.of]] for tensors in (task.options, task.answer_options)
    )

    first = _base(first_stage(spec), "trident_tokenizer", outer)
    always = [text for text in task.texts if text not in task.once]
    _add_tensors(first, limits, always, (*task.once, *options, *task.awaited), task.tokens)
    _set_parameters(first, {"task": spec.task} | _taken(limits, task.parameters))
    yield first

    postprocess = _base(f"{spec.name}_postprocess", "trident_postprocess", outer)
    _add_tensors(postprocess, limits, task.read_tensors, answer_options, task.answers)
    _set_parameters(postprocess, {"task": spec.task} | _taken(limits, task.answer_parameters))
    yield postprocess

    for variant in spec.variants:
        models = []
        for tower in task.graphs:
            model = _base(model_part(spec, variant, tower.name), "onnxruntime", batch)
            _add_tensors(model, limits, tower.inputs, (), tower.outputs)
            _set_parameters(model, {"intra_op_thread_count": limits.threads})
            models.append(model)
        yield from models

        ensemble = _base(spec.public_name(variant), "ensemble", outer)
        _add_tensors(ensemble, limits, task.texts, (*options, *answer_options), task.answers)
        known: tuple[Tensor, ...] = task.texts
        for index, (tower, model) in enumerate(zip(task.graphs, models, strict=True)):
            if index:
                known = (*task.graphs[index - 1].outputs, *tower.texts)
            made = tower.inputs if task.towers else task.tokens
            _add_step(ensemble, first, [*known, *options], made)
            _add_step(ensemble, model)
        _add_step(ensemble, postprocess)
        yield ensemble

    if name := alias(spec):
        yield _alias(spec, name, limits, task)


def _add_step(
    ensemble: pb.ModelConfig, part: pb.ModelConfig, inputs: Iterable[Tensor] = (), outputs: Iterable[Tensor] = ()
) -> None:
    """A step that reads and gives these tensors of a stage; none are named: all of them."""
    step = ensemble.ensemble_scheduling.step.add(model_name=part.name, model_version=-1)
    for tensor in inputs or part.input:
        step.input_map[tensor.name] = tensor.name
    for tensor in outputs or part.output:
        step.output_map[tensor.name] = tensor.name


def _alias(spec: ModelSpec, name: str, limits: EncoderLimits | ImageLimits, task: EncoderTask) -> pb.ModelConfig:
    """The default variant with other names: a list of texts is one tensor [texts], and the batch is a dimension."""
    config = _base(name, "ensemble", 0)
    step = config.ensemble_scheduling.step.add(model_name=spec.name, model_version=-1)
    ours = {tensor.name: tensor for tensor in (*task.texts, *task.answers)}
    for theirs, our in task.alias.items():
        tensor = ours[our]
        if tensor in task.texts:
            text = config.input.add(name=theirs, data_type=pb.TYPE_STRING, dims=[-1])
            text.reshape.shape.extend([-1, *tensor.dims(limits)])
            step.input_map[our] = theirs
        else:
            config.output.append(_tensor(pb.ModelOutput, theirs, tensor.data_type, tensor.rows.dims(limits)))
            step.output_map[our] = theirs
    return config


def _taken(limits: EncoderLimits | ImageLimits, parameters: Mapping[str, str]) -> dict[str, object]:
    """Parameters of a stage with the values of the limits that they come from; lists as "32,64"."""
    values = {name: getattr(limits, limit) for name, limit in parameters.items()}
    return {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in values.items()}


def _add_tensors(
    config: pb.ModelConfig,
    limits: object,
    inputs: Iterable[Tensor],
    optional: Iterable[Tensor],
    outputs: Iterable[Tensor],
) -> None:
    def add(kind: Any, tensors: Iterable[Tensor], **more: bool) -> Iterable[Any]:
        return (_tensor(kind, tensor.name, tensor.data_type, tensor.dims(limits), **more) for tensor in tensors)

    config.input.extend(add(pb.ModelInput, inputs))
    config.input.extend(add(pb.ModelInput, optional, optional=True))
    config.output.extend(add(pb.ModelOutput, outputs))
    # Triton fails all requests of a batch for one whose BYTES are malformed (decision 0035), so texts are not batched.
    if config.max_batch_size and not any(tensor.data_type == pb.TYPE_STRING for tensor in config.input):
        config.dynamic_batching.SetInParent()


def as_backend_json(config: pb.ModelConfig) -> dict[str, Any]:
    """A config as Triton hands it to a backend."""
    data: dict[str, Any] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    data["max_batch_size"] = config.max_batch_size
    return data
