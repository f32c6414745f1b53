"""The export of every encoder task: trace, write, evaluate. What differs between tasks is an `EncoderExport`."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from tokenizers.normalizers import Lowercase, Normalizer
from tokenizers.normalizers import Sequence as Normalizers
from transformers import PreTrainedModel

from trident_export import configs, corpora, disk, recipes
from trident_export.errors import ModelsFileError, TextError, UnsupportedArchitecture
from trident_export.graphs.encoder import export_encoder_graph
from trident_export.huggingface.folder import HuggingFaceFolder, reason
from trident_export.huggingface.vocabulary import drop_tokens_beyond, rows_of
from trident_export.measure import fidelity
from trident_export.models_file import PROMPT_TASKS, ModelSpec
from trident_export.passes import CalibrationRuns, Feeds
from trident_export.progress import track
from trident_export.recipes import Kind
from trident_export.tasks import Evaluator, Job
from trident_serving.artefacts import VERSION
from trident_serving.encoders.labels import softmax
from trident_serving.encoders.task import EncoderTask
from trident_serving.encoders.tokens import TOKENIZER, TokenRoles, load_tokenizer
from trident_serving.errors import InvalidRequest
from trident_serving.schema.limits import EncoderLimits
from trident_serving.text import encode_texts
from trident_serving.triton.adapter import parameters
from trident_serving.triton.onnx_backend import OnnxModel

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
# One text, or the texts that a request gives together.
Texts = tuple[str, ...]
Limits = TypeVar("Limits", bound=EncoderLimits)

_GATE_BATCH = 4
# Texts that are asked for once more with padding beyond their bucket, and how many tokens of it.
_PADDED, _PADDING = 2, 32
# Room beside a long text for a prompt, a query and special tokens.
_AROUND = 48
# The longest text that the gate compares: tokens, by themselves and times the model's parameters, and numbers of one
# layer's attention in Hugging Face's own form, [heads, tokens, tokens].
FAR_TOKENS, FAR_WORK, FAR_SCORES = 4200, 10**12, 2**27
# Share of a calibration text's tokens that may be unknown; more, and the text is in another tokenizer's language.
_MOST_UNKNOWN = 0.1


class EncoderExport(Generic[Limits]):
    """What differs between the exports of encoder tasks; the methods here are those of a task that scores tokens.

    Attributes:
        task: the serving side's declaration.
        head: the Auto class of transformers.
        architecture: how the names of transformers' classes with that head end.
        proposed_tokens: the longest input that `trident-export add` writes.
        tokenizer_in_postprocess: whether the postprocess stage reads the tokenizer too.
    """

    task: ClassVar[EncoderTask]
    head: ClassVar[Any]
    architecture: ClassVar[str] = ""
    proposed_tokens: ClassVar[int] = 512
    tokenizer_in_postprocess: ClassVar[bool] = False

    def problems(self, limits: Limits, source: HuggingFaceFolder) -> Iterator[str]:
        """What of the limits does not fit the model, a sentence each; it names the model's value."""
        return iter(())

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        """What `trident-export add` writes as limits besides `max_tokens`."""
        return {}

    def head_of(self, source: HuggingFaceFolder) -> Any:
        """The Auto class of transformers for a model."""
        return self.head

    def prepare(self, model: PreTrainedModel, source: HuggingFaceFolder) -> None:
        """Change the model before it is traced."""

    def part(self, source: HuggingFaceFolder) -> Callable[[PreTrainedModel], Any] | None:
        """What gives the part of a model that is traced; None: all of it is."""
        return None

    def settings(self, source: HuggingFaceFolder) -> Any:
        """What the postprocess stage reads of the model, as an object that can `save` itself; None: nothing."""
        return None

    def load_settings(self, folder: Path) -> Any:
        """The same from the postprocess stage's folder, as far as `read` looks at it."""
        return None

    def finish(self, model: ir.Model, limits: Limits, source: HuggingFaceFolder) -> None:
        """Add to the traced graph the outputs that the task is served with."""

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        """Texts as a request would bring them."""
        return [(text,) for text in texts]

    def far_sample(self, text: str, sample: Texts, source: HuggingFaceFolder) -> Texts | None:
        """A sample that a long text is part of; None where the task has none.

        Args:
            sample: one of `samples`.
        """
        return (text,)

    def tokenize(self, tokenizer: Any, texts: Texts, max_tokens: int) -> Any:
        """What Hugging Face reads for one of the samples, as torch tensors of one row."""
        return tokenizer(*texts, truncation=True, max_length=max_tokens, return_tensors="pt")

    def read(self, tensors: Arrays, settings: Any) -> list[Floats]:
        """From the tensors of a batch, the graph's or Hugging Face's, to what is compared of each text.

        Scores are [choices, classes]: [tokens, labels] here. NaN stands for classes that the graph does not name.
        """
        kept = [mask > 0 for mask in tensors["attention_mask"]]
        return [softmax(row[real]) for row, real in zip(tensors["logits"], kept, strict=True)]

    def reference(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], list[Floats]]:
        """What Hugging Face makes of a text, by itself and without padding, in float32; see `read`."""
        assert spec.encoder is not None
        limit = spec.encoder.max_tokens
        tokenizer, model, settings = source.tokenizer, source.reference(self.head_of(source)), self.settings(source)

        def ask(texts: Texts) -> list[Floats]:
            batch = self.tokenize(tokenizer, texts, limit)
            tensors = {name: t.numpy() for name, t in model(**batch).items() if isinstance(t, torch.Tensor)}
            inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            return self.read({**tensors, **inputs}, settings)

        return ask

    def compare(self, reference: Sequence[Floats], found: Sequence[Floats]) -> dict[str, float]:
        """What a variant's answers get wrong."""
        return fidelity.compare_scores(reference, found)

    def searched(self) -> Sequence[Sequence[Texts]]:
        """Sets of texts that the thorough comparison asks for besides."""
        return ()

    def compare_thoroughly(
        self,
        reference: Sequence[Floats],
        found: Sequence[Floats],
        searched: Sequence[tuple[Sequence[Floats], Sequence[Floats]]],
    ) -> dict[str, float]:
        """More measures than the gate needs.

        Args:
            searched: of each set of `searched`, the reference and what was found.
        """
        return {}

    def check(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        """See `trident_export.tasks`."""
        source.check_head(self.head_of(source))
        _ = source.fast_tokenizer
        self._check_limits(spec, source)
        self._check_prompts(spec, source)
        self.settings(source)

    def trace(self, job: Job) -> None:
        """See `trident_export.tasks`."""
        spec, source, limits = job.spec, job.source, job.spec.encoder
        disk.require(job.staging, max(source.weight_bytes, 4 * source.parameters), spec.recipes)
        tokenizer, postprocess = (
            job.staging / f"{spec.name}_{name}" / VERSION for name in ("tokenizer", "postprocess")
        )
        readers = (tokenizer, *([postprocess] if self.tokenizer_in_postprocess else []))
        for folder in readers:
            save_tokenizer(source, spec.own_prompts, folder)
        postprocess.mkdir(parents=True, exist_ok=True)
        if name := configs.alias(spec):
            (job.staging / name / VERSION).mkdir(parents=True)
        if (settings := self.settings(source)) is not None:
            settings.save(postprocess)
        job.graphs.mkdir()
        job.progress("tracing the graph")

        def prepare(model: PreTrainedModel) -> None:
            for folder in readers:
                drop_tokens_beyond(source, folder / TOKENIZER, rows_of(model))
            self.prepare(model, source)

        export_encoder_graph(
            source,
            job.graphs / "model.onnx",
            self.head_of(source),
            inputs=[tensor.name for tensor in self.task.model_inputs],
            outputs=[tensor.name for tensor in self.task.model_outputs],
            prepare=prepare,
            part=self.part(source),
            finish=lambda model: self.finish(model, cast("Limits", limits), source),
        )

    def write(self, job: Job, variant: str) -> None:
        """See `trident_export.tasks`."""
        spec = job.spec
        path = job.staging / configs.model_part(spec, variant) / VERSION / "model.onnx"
        runs = calibration_runs(job, self)
        recipes.apply(spec.recipes[variant], Kind.ENCODER, job.graphs / "model.onnx", path, runs)
        # An ensemble has no files, and Triton wants the folder.
        (job.staging / spec.public_name(variant) / VERSION).mkdir(parents=True, exist_ok=True)

    def evaluator(
        self, spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
    ) -> Evaluator:
        """See `trident_export.tasks`; the measures are those of `fidelity.compare_embeddings` or `compare_scores`.

        The thorough ones are `recall_at_10` of embeddings, and `exact_match` and `f1` of answers (see `fidelity`).
        """
        served = Served(spec, root, self)
        samples = [taken for taken, _ in served.readable(self.samples(texts, source))]
        if not samples:
            raise TextError(f"the tokenizer of {spec.name} knows none of the texts: give some of its language")
        searched = self.searched() if thorough else ()
        far = self._far(spec, source, texts, samples[0])
        reference, far_reference, *expected = (
            reference_outputs(spec, source, self, given) for given in (samples, far, *searched)
        )
        longest = served.longest([*samples, *far])

        def evaluate(variant: str) -> dict[str, float]:
            found, *given = served.answers(variant, (samples, *searched), _GATE_BATCH)
            alone, far_found = served.answers(variant, (samples, far), 1)
            (padded,) = served.answers(variant, (samples[:_PADDED],), 1, padding=_PADDING)
            both = [*zip(found, alone, strict=True), *zip(padded, alone, strict=False)]
            effect = max(_difference(a, b) for a, b in both)
            measured = self.compare([*reference, *far_reference], [*found, *far_found])
            measured |= {"batch_effect": effect, fidelity.LONGEST: float(longest)}
            if "texts" in measured:
                measured["texts"] = float(len(samples))  # without the far one
            if thorough:
                measured |= self.compare_thoroughly(reference, found, list(zip(expected, given, strict=True)))
            return measured

        return evaluate

    def _far(self, spec: ModelSpec, source: HuggingFaceFolder, texts: Sequence[str], sample: Texts) -> list[Texts]:
        """The sample with the longest text that is compared, as far as the budget goes: positions have vectors too."""
        assert spec.encoder is not None
        most, tokenizer = far_tokens(spec.encoder.max_tokens, source), source.fast_tokenizer
        text = "\n".join(texts)
        while True:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            if len(found.input_ids) > most:
                break
            text = f"{text}\n{text}"
        if most < spec.encoder.max_tokens:
            text = text[: found.offset_mapping[most - _AROUND][0]]
        else:
            text = text[: found.offset_mapping[most][1]]
        made = self.far_sample(text, sample, source)
        return [] if made is None else [made]

    def _check_prompts(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        """A table must say whether a request can name a prompt.

        Raises:
            ModelsFileError: it says something else than the model's files.
        """
        source.roles(spec.own_prompts)
        own = source.sentence.prompts
        if spec.prompts is True and not own:
            raise ModelsFileError(f"[{spec.name}] prompts is true, and the model's files have none: leave it out")
        if spec.prompts is False and spec.task in PROMPT_TASKS and (named := [name for name in own if own[name]]):
            raise ModelsFileError(
                f"[{spec.name}] the model has prompts ({', '.join(named)}): set prompts = true, so that a request can "
                "name one, or prompts = {} to leave them out"
            )

    def _check_limits(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        """The limits of models.toml must be those of the model.

        Raises:
            ModelsFileError: a limit does not fit; the message names the model's value.
        """
        assert spec.encoder is not None
        for problem in self.problems(cast("Limits", spec.encoder), source):
            raise ModelsFileError(f"[{spec.name}] {problem}")
        longest, asked = source.longest_input, spec.encoder.max_tokens
        if longest is not None and asked > longest:
            raise ModelsFileError(f"[{spec.name}] limits.max_tokens is {asked}, the model's longest text is {longest}")


def save_tokenizer(source: HuggingFaceFolder, prompts: Mapping[str, str] | None, folder: Path) -> None:
    """Write tokenizer.json with the padding token named in it, and the tokens' roles, as the runtime reads them."""
    folder.mkdir(parents=True)
    tokenizer = source.fast_tokenizer
    backend = tokenizer.backend_tokenizer
    if source.sentence.lower_case:
        own: list[Normalizer] = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = Normalizers([Lowercase(), *own])
    backend.no_truncation()
    padding = source.padding_token
    backend.enable_padding(
        pad_id=(tokenizer.pad_token_id or 0) if padding is None else padding,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token or "[PAD]",
    )
    backend.save(str(folder / TOKENIZER))
    source.roles(prompts).save(folder)


def far_tokens(max_tokens: int, source: HuggingFaceFolder) -> int:
    """Tokens of the longest text that is compared, special tokens included."""
    heads = getattr(source.config.get_text_config(), "num_attention_heads", None)
    bounds = [FAR_TOKENS, FAR_WORK // max(source.parameters, 1)]
    if isinstance(heads, int) and heads > 0:
        bounds.append(math.isqrt(FAR_SCORES // heads))
    return min(max_tokens, max(min(bounds), 2 * _AROUND))


class Served:
    """A spec's stages and variants as they are served, without a server.

    Args:
        root: holds the version folders, as `<root>/<triton model>/<version>`.
    """

    def __init__(self, spec: ModelSpec, root: Path, task: EncoderExport[Any]) -> None:
        self._spec = spec
        self._task = task
        self._root = root
        self._built = {name: configs.as_backend_json(config) for name, config in configs.build(spec).items()}
        name = f"{spec.name}_tokenizer"
        self._preprocess = task.task.preprocess(root / name / VERSION, parameters(self._built[name]))
        assert spec.encoder is not None
        self._longest = spec.encoder.max_tokens
        self._pad_id = (load_tokenizer(root / name / VERSION).padding or {}).get("pad_id", 0)
        self.settings = task.load_settings(root / f"{spec.name}_postprocess" / VERSION)

    def readable(self, samples: Sequence[Texts]) -> Sequence[tuple[Texts, Arrays]]:
        """The texts that the tokenizer stage takes, each with the graph's inputs for it alone."""
        found: list[tuple[Texts, Arrays]] = []
        for texts in samples:
            with contextlib.suppress(InvalidRequest):
                found += [(texts, inputs) for inputs in self._inputs([texts], 1)]
        return found

    def longest(self, samples: Sequence[Texts]) -> int:
        """Tokens of the longest of some texts, as the tokenizer stage reads it."""
        return max(int((inputs["attention_mask"] > 0).sum()) for inputs in self._inputs(samples, 1))

    def answers(
        self, variant: str, sets: Sequence[Sequence[Texts]], batch: int, padding: int = 0
    ) -> list[list[Floats]]:
        """What a variant makes of each set of texts in padded batches; see `EncoderExport.read`.

        Args:
            padding: tokens of it beyond the bucket, as far as the model has positions.
        """
        part = configs.model_part(self._spec, variant)
        model = OnnxModel(self._root / part / VERSION, self._built[part])
        return [
            [row for inputs in self._inputs(texts, batch, padding) for row in self._run(model, inputs)]
            for texts in sets
        ]

    def _run(self, model: OnnxModel, inputs: dict[str, NDArray[Any]]) -> list[Floats]:
        result = model.run([inputs])[0]
        if isinstance(result, Exception):
            raise unrunnable(self._spec.name, inputs["input_ids"].shape, result) from result
        return self._task.read({**inputs, **result}, self.settings)

    def _inputs(self, samples: Sequence[Texts], batch: int, padding: int = 0) -> Iterator[dict[str, NDArray[Any]]]:
        task = self._task.task
        for start in track(range(0, len(samples), batch), f"texts, {batch} at a time"):
            chosen = samples[start : start + batch]
            # Where a request's texts are no batch, they are one request each; of its rows the first is what Hugging
            # Face's side reads, such as the first window of a long context.
            requests = [chosen] if task.batched else [[sample] for sample in chosen]
            rows = [{name: t[: len(r)] for name, t in self._read(r).items()} for r in requests]
            width = max(row["input_ids"].shape[1] for row in rows)
            width = max(width, min(width + padding, self._longest))
            yield {
                tensor.name: np.concatenate([self._padded(tensor.name, row[tensor.name], width) for row in rows])
                for tensor in task.model_inputs
            }

    def _read(self, samples: Sequence[Texts]) -> Arrays:
        task = self._task.task
        columns = [encode_texts(column) for column in zip(*samples, strict=True)]
        request = {tensor.name: column for tensor, column in zip(task.texts, columns, strict=True)}
        tensors = self._preprocess(request | {"truncate": np.ones(1, np.bool_)})
        return {tensor.name: tensors[tensor.name] for tensor in task.model_inputs}

    def _padded(self, name: str, rows: NDArray[Any], width: int) -> NDArray[Any]:
        value = self._pad_id if name == "input_ids" else 0
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)


def unrunnable(name: str, shape: Sequence[int], error: Exception) -> UnsupportedArchitecture:
    """What it means that ONNX Runtime can't run a graph: sizes were taken for constants when it was traced."""
    logger.warning("%s", reason(error))  # which --verbose shows
    return UnsupportedArchitecture(
        f"the graph of {name} can't be run on {' x '.join(map(str, shape))} tokens: the architecture fixes sizes when "
        "it is traced: choose another model"
    )


def reference_outputs(
    spec: ModelSpec, source: HuggingFaceFolder, task: EncoderExport[Any], samples: Sequence[Texts]
) -> list[Floats]:
    """What Hugging Face makes of the texts; see `EncoderExport.reference`."""
    ask = task.reference(spec, source)
    with torch.inference_mode():
        return [row for texts in track(samples, "Hugging Face") for row in ask(texts)]


def _difference(one: Floats, other: Floats) -> float:
    """The largest, where both have a number."""
    width = min(one.shape[-1], other.shape[-1])
    return float(np.nanmax(np.abs(one[..., :width] - other[..., :width])))


def calibration_runs(job: Job, task: EncoderExport[Any]) -> CalibrationRuns:
    """Calibration texts as the graph's inputs, a text a run.

    Raises:
        TextError: when texts are drawn: the file has none, or the tokenizer does not know their language.
    """
    spec = job.spec

    def feeds(samples: int, seed: int) -> Feeds:
        unknown = TokenRoles.load(job.staging / f"{spec.name}_tokenizer" / VERSION).unk_token_id
        texts = corpora.calibration(spec.calibration, samples, seed)
        found = Served(spec, job.staging, task).readable(task.samples(texts, job.source))
        known = [inputs for _, inputs in found if _unknown_share(inputs, unknown) <= _MOST_UNKNOWN]
        if 2 * len(known) < len(texts):
            raise TextError(
                f"the calibration text {spec.calibration or 'that is packaged'} does not fit the tokenizer, which does "
                f"not know what {len(texts) - len(known)} of {len(texts)} texts are written in: name a file of the "
                "model's own language with calibration = ..."
            )
        return iter(known)

    return feeds


def _unknown_share(inputs: Arrays, unknown: int | None) -> float:
    return float((inputs["input_ids"][inputs["attention_mask"] > 0] == unknown).mean()) if unknown is not None else 0.0
