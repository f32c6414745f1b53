"""Zero-shot classification of images: which of a request's labels an image shows, by two graphs of one model.

One graph embeds the images, the other a sentence for each label. The algorithm is that of the transformers pipeline.
Reference: transformers, `ZeroShotImageClassificationPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_serving.encoders.images import PARAMETERS, PIXELS, STAGE, pixels_of, preprocessor
from trident_serving.encoders.labels import Activation, Floats, activate
from trident_serving.encoders.pooling import normalize
from trident_serving.encoders.task import SINGLE, EncoderTask, Stage, Tensor, Tensors, Tower
from trident_serving.encoders.tokens import EncodingSettings, TextEncoder
from trident_serving.encoders.zero_shot import hypothesis
from trident_serving.errors import InvalidRequest
from trident_serving.schema import reading
from trident_serving.text import decode_texts, numbered

DEFAULT_TEMPLATE = "This is a photo of {}."
IMAGES, LABELS = "image", "text"  # the towers
_SETTINGS = "similarity.json"
_LABEL_BYTES = 4096  # of a label and of a template


@dataclass(frozen=True)
class SimilaritySettings:
    """How scores come of embeddings; `similarity.json` in the version folder, which the export writes.

    Attributes:
        scale: what the cosine of an image and a label is multiplied by.
        bias: what is added then.
        activation: what makes scores of it: softmax over the labels, or sigmoid of each.
    """

    scale: float
    bias: float
    activation: Activation

    @classmethod
    def load(cls, folder: Path) -> SimilaritySettings:
        """Read `folder/similarity.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path) -> None:
        """Write `folder/similarity.json`."""
        reading.save(self, folder / _SETTINGS)


def scores(images: Floats, labels: Floats, settings: SimilaritySettings) -> Floats:
    """Scores of each image for each label, [images, labels].

    Args:
        images: vectors of any length, [images, dimensions].
        labels: the same, [labels, dimensions].
    """
    # Each cosine is a sum of its own: a product of matrices would depend on how many images there are.
    cosines: NDArray[np.float32] = (normalize(images)[:, None] * normalize(labels)[None]).sum(axis=-1)
    return activate(cosines * np.float32(settings.scale) + np.float32(settings.bias), settings.activation)


def _read(folder: Path, parameters: Mapping[str, str]) -> Stage:
    read, most = preprocessor(folder, parameters), int(parameters["max_batch_size"])
    tokens = int(parameters["max_tokens"])
    encoder = TextEncoder.load(folder, EncodingSettings(tokens, _LABEL_BYTES, (tokens,), truncate=False))

    def preprocess(tensors: Tensors) -> Tensors:
        labels = decode_texts(tensors["candidate_labels"], "candidate_labels", _LABEL_BYTES)
        files = tensors["image"].reshape(-1) if "image" in tensors else None
        counts = {} if files is None else {"image": len(files)}
        counts["candidate_labels"] = len(labels)
        for field, count in counts.items():
            if not 1 <= count <= most:
                raise InvalidRequest(f"{field} must hold between 1 and {most}, found {count}")
        template = DEFAULT_TEMPLATE
        if "hypothesis_template" in tensors:
            template = decode_texts(tensors["hypothesis_template"][:1], "hypothesis_template", _LABEL_BYTES)[0]
        names = numbered("candidate_labels", len(labels))
        for name, label in zip(names, labels, strict=True):
            if not label.strip():
                raise InvalidRequest(f"{name} is empty: {label[:80]!r} names no class")
        sentences = [hypothesis(template, label) for label in labels]
        encoded = encoder.encode(sentences, names=[(name,) for name in names])
        wanted = {tensor.name: encoded[tensor.name] for tensor in SINGLE}
        return wanted if files is None else {"pixel_values": pixels_of(files, read), **wanted}

    return preprocess


def _load(folder: Path, parameters: Mapping[str, str]) -> Stage:
    settings = SimilaritySettings.load(folder)

    def postprocess(tensors: Tensors) -> Tensors:
        labels = tensors["candidate_labels"].reshape(-1)
        found = scores(tensors["image_embeds"], tensors["text_embeds"], settings)
        order = np.argsort(-found, axis=-1, kind="stable")
        return {"label": labels[order], "score": np.take_along_axis(found, order, axis=-1)}

    return postprocess


_IMAGE_EMBEDS = Tensor("image_embeds", "FP32", ("dimensions",))
_TEXT_EMBEDS = Tensor("text_embeds", "FP32", ("dimensions",))
_FILES = Tensor("image", "STRING", (-1,))
_NAMES = Tensor("candidate_labels", "STRING", (-1,))
TASK = EncoderTask(
    name="zero-shot-image-classification",
    stage=STAGE,
    texts=(_FILES, _NAMES),
    options=(Tensor("hypothesis_template", "STRING", (1,)),),
    model_inputs=(PIXELS, *SINGLE),
    model_outputs=(_IMAGE_EMBEDS, _TEXT_EMBEDS),
    towers=(Tower(IMAGES, (_FILES,), (PIXELS,), (_IMAGE_EMBEDS,)), Tower(LABELS, (_NAMES,), SINGLE, (_TEXT_EMBEDS,))),
    read=("candidate_labels", "image_embeds", "text_embeds"),
    answers=(Tensor("label", "STRING", (-1, -1)), Tensor("score", "FP32", (-1, -1))),
    batched=False,
    parameters={**PARAMETERS, "max_tokens": "max_tokens", "max_batch_size": "max_batch_size"},
    preprocess=_read,
    postprocess=_load,
)
