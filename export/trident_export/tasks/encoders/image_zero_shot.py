"""Zero-shot classification of images by a model with two towers: the gate compares scores of pictures and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForZeroShotImageClassification, PreTrainedModel

from trident_export.errors import UnsupportedArchitecture
from trident_export.graphs import towers
from trident_export.graphs.encoder import export_encoder_graph
from trident_export.huggingface.folder import TWO_TOWERS, HuggingFaceFolder
from trident_export.huggingface.vocabulary import drop_tokens_beyond, rows_of
from trident_export.models_file import ModelSpec
from trident_export.tasks import Job
from trident_export.tasks.encoders.base import Floats, save_tokenizer
from trident_export.tasks.encoders.images import ImageExport, graph_of
from trident_serving.artefacts import VERSION
from trident_serving.encoders import image_zero_shot
from trident_serving.encoders.image_zero_shot import DEFAULT_TEMPLATE, LABELS, SimilaritySettings, scores
from trident_serving.encoders.labels import Activation
from trident_serving.encoders.task import SINGLE, Tensors
from trident_serving.encoders.tokens import TOKENIZER
from trident_serving.encoders.zero_shot import hypothesis
from trident_serving.schema.limits import ImageZeroShotLimits

_LABELS = ("a red disc", "waves", "a street at night", "noise", "a grey square on a wall", "two cats asleep on a sofa")


class ImageZeroShot(ImageExport):
    """`zero-shot-image-classification`; `read_images` gives scores of an image, [1, labels of the gate]."""

    task = image_zero_shot.TASK
    head = AutoModelForZeroShotImageClassification
    output = "image_embeds"

    def check(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        if not towers.has_towers(source):
            raise UnsupportedArchitecture(
                f"{source} is a model of type {source.config.model_type!r}; zero-shot classification of images takes "
                f"models with two towers: {', '.join(TWO_TOWERS)}"
            )
        _ = source.fast_tokenizer
        towers.check_texts(source)
        super().check(spec, source)

    def problems(self, limits: ImageZeroShotLimits, source: HuggingFaceFolder) -> Iterator[str]:
        dimensions, longest = towers.dimensions(source), source.text_config.max_position_embeddings
        if limits.dimensions != dimensions:
            yield f"limits.dimensions is {limits.dimensions}, the model's is {dimensions}"
        if limits.max_tokens > longest or (source.padded_to and limits.max_tokens != longest):
            yield f"limits.max_tokens is {limits.max_tokens}, the model's text is of {longest}"

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        longest = source.text_config.max_position_embeddings
        return {"dimensions": towers.dimensions(source), "max_tokens": longest}

    def outputs(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return towers.image_vectors(model, pixels)

    def files_of(self, model: Any, source: HuggingFaceFolder, folder: Path) -> None:
        bias = getattr(model, "logit_bias", None)
        activation = Activation.SIGMOID if source.padded_to else Activation.SOFTMAX
        shift = 0.0 if bias is None else float(bias.detach())
        SimilaritySettings(float(model.logit_scale.detach().exp()), shift, activation).save(folder)

    def prepare_stage(self, source: HuggingFaceFolder, folder: Path) -> None:
        save_tokenizer(source, None, folder)

    def trace_graphs(self, job: Job, postprocess: Path) -> None:
        super().trace_graphs(job, postprocess)
        source, first = job.source, job.staging / f"{job.spec.name}_{self.task.stage}" / VERSION

        def prepare(model: PreTrainedModel) -> None:
            drop_tokens_beyond(source, first / TOKENIZER, rows_of(model))

        export_text_tower(source, graph_of(job, LABELS), "text_embeds", prepare)

    def texts(self) -> Mapping[str, Sequence[str]]:
        return {"candidate_labels": _LABELS}

    def of_texts(self, model: Any, source: HuggingFaceFolder, max_tokens: int) -> Mapping[str, Floats]:
        sentences = [hypothesis(DEFAULT_TEMPLATE, label) for label in _LABELS]
        batch = towers.tokenize(source, source.tokenizer, sentences, max_tokens)
        return {"text_embeds": towers.text_vectors(model, batch).numpy()}

    def read_images(self, tensors: Tensors, folder: Path) -> list[Floats]:
        found = scores(tensors["image_embeds"], tensors["text_embeds"], SimilaritySettings.load(folder))
        return list(found[:, None])


def export_text_tower(source: HuggingFaceFolder, path: Path, output: str, prepare: Any) -> None:
    """Write the graph of the tower of texts, which gives `output`, float32 [texts, dimensions]."""

    def finish(model: Any) -> None:
        (pooled,) = model.graph.outputs
        pooled.name = output

    export_encoder_graph(
        source,
        path,
        AutoModelForZeroShotImageClassification,
        inputs=[tensor.name for tensor in SINGLE],
        outputs=[output],
        prepare=prepare,
        part=towers.TextTower,
        finish=finish,
    )


EXPORT = ImageZeroShot()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
