"""The export of every task that reads images: trace, write, evaluate. What differs between them is an `ImageExport`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.image_utils import load_image

from trident_export import configs, disk, recipes
from trident_export.errors import FidelityError, ModelsFileError
from trident_export.graphs.vision import export_image_graph
from trident_export.huggingface import images as image_files
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures
from trident_export.models_file import ModelSpec
from trident_export.progress import track
from trident_export.recipes import Kind
from trident_export.tasks import Evaluator, Job
from trident_export.tasks.encoders.base import Arrays, EncoderExport, Floats, unrunnable
from trident_serving.artefacts import VERSION
from trident_serving.encoders.images import as_files
from trident_serving.encoders.task import Tensors
from trident_serving.schema.limits import ImageLimits
from trident_serving.text import encode_texts
from trident_serving.triton.adapter import parameters
from trident_serving.triton.onnx_backend import OnnxModel

# Pictures that the gate compares, and images in one of its runs.
PICTURES, _BATCH = 24, 4


class ImageExport(EncoderExport[Any]):
    """What differs between the exports of tasks that read images.

    Attributes:
        output: the graph's name for what it says of an image.
    """

    output: ClassVar[str]

    def outputs(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What the model says of images, by transformers."""
        raise NotImplementedError

    def files_of(self, model: Any, source: HuggingFaceFolder, folder: Path) -> None:
        """Write what the postprocess stage reads.

        Args:
            model: with its weights.
        """

    def texts(self) -> Mapping[str, Sequence[str]]:
        """What a request of the gate gives besides images, by tensor."""
        return {}

    def of_texts(self, model: Any, source: HuggingFaceFolder, max_tokens: int) -> Mapping[str, Floats]:
        """What transformers makes of those texts, as tensors that `read` takes."""
        return {}

    def read_images(self, tensors: Tensors, folder: Path) -> list[Floats]:
        """From what the graphs give, or Hugging Face's model, to what is compared of each image.

        Args:
            folder: the postprocess stage's.
        """
        raise NotImplementedError

    def check(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        """See `trident_export.tasks`."""
        source.check_head(self.head_of(source))
        limits = _limits(spec)
        size = image_files.size_of(image_files.settings(source))
        if (limits.height, limits.width) != size:
            raise ModelsFileError(
                f"[{spec.name}] limits.height and limits.width are {limits.height} and {limits.width}, the model's "
                f"image processor makes images of {size[0]} and {size[1]}"
            )
        for problem in self.problems(limits, source):
            raise ModelsFileError(f"[{spec.name}] {problem}")

    def trace(self, job: Job) -> None:
        """See `trident_export.tasks`."""
        spec, source = job.spec, job.source
        disk.require(job.staging, max(source.weight_bytes, 4 * source.parameters), spec.recipes)
        first = job.staging / configs.first_stage(spec) / VERSION
        postprocess = job.staging / f"{spec.name}_postprocess" / VERSION
        self.prepare_stage(source, first)
        first.mkdir(parents=True, exist_ok=True)
        postprocess.mkdir(parents=True)
        image_files.settings(source).save(first)
        job.graphs.mkdir()
        job.progress("tracing the graph")
        self.trace_graphs(job, postprocess)

    def prepare_stage(self, source: HuggingFaceFolder, folder: Path) -> None:
        """Write what the preprocess stage reads besides the image processor's settings."""

    def trace_graphs(self, job: Job, postprocess: Path) -> None:
        """Write the float32 graphs, by the names of their towers."""
        limits, source = _limits(job.spec), job.source
        model = source.load(self.head_of(source))
        self.files_of(model, source, postprocess)
        size, path = (limits.height, limits.width), graph_of(job, self.task.graphs[0].name)
        export_image_graph(model, path, str(source), size, self.outputs, self.output)

    def write(self, job: Job, variant: str) -> None:
        """See `trident_export.tasks`."""
        spec = job.spec
        for tower in self.task.graphs:
            path = job.staging / configs.model_part(spec, variant, tower.name) / VERSION / "model.onnx"
            recipes.apply(spec.recipes[variant], Kind.ENCODER, graph_of(job, tower.name), path)
        # An ensemble has no files, and Triton wants the folder.
        (job.staging / spec.public_name(variant) / VERSION).mkdir(parents=True, exist_ok=True)

    def evaluator(
        self, spec: ModelSpec, source: HuggingFaceFolder, root: Path, texts: Sequence[str], *, thorough: bool = False
    ) -> Evaluator:
        """See `trident_export.tasks`; the pictures are drawn, and what the preprocess stage makes of each is compared.

        Raises:
            FidelityError: it makes something else than transformers' image processor.
        """
        served = _Served(spec, root, self)
        files = pictures.files(PICTURES)
        processor = image_files.processor(source)
        expected = [_processed(processor, content) for content in files]
        inputs = served.inputs(files)
        _check_pixels(inputs["pixel_values"], expected)
        folder = root / f"{spec.name}_postprocess" / VERSION
        reference = self.reference_of(spec, source, expected, folder)

        def evaluate(variant: str) -> dict[str, float]:
            together, alone = (self.read_images(served.run(variant, inputs, size), folder) for size in (_BATCH, 1))
            effect = max(float(np.abs(a - b).max()) for a, b in zip(together, alone, strict=True))
            measured = self.compare(reference, together)
            measured.pop("texts", None)
            return measured | {"batch_effect": effect, "images": float(len(files))}

        return evaluate

    def reference_of(
        self, spec: ModelSpec, source: HuggingFaceFolder, pixels: Sequence[Floats], folder: Path
    ) -> list[Floats]:
        """What Hugging Face makes of each image, by itself, in float32; see `read_images`."""
        model = source.reference(self.head_of(source))
        with torch.inference_mode():
            found = [
                self.outputs(model, torch.from_numpy(image)[None]).numpy() for image in track(pixels, "Hugging Face")
            ]
            texts = self.of_texts(model, source, getattr(spec.limits, "max_tokens", 0))
        return self.read_images({self.output: np.concatenate(found), **texts}, folder)


def graph_of(job: Job, tower: str) -> Path:
    """The float32 graph of a tower, or the only one, whose name is ""."""
    return job.graphs / tower / "model.onnx"


class _Served:
    """A spec's stages and variants as they are served, without a server."""

    def __init__(self, spec: ModelSpec, root: Path, export: ImageExport) -> None:
        self._spec, self._root, self._export = spec, root, export
        self._built = {name: configs.as_backend_json(config) for name, config in configs.build(spec).items()}
        name = configs.first_stage(spec)
        self._preprocess = export.task.preprocess(root / name / VERSION, parameters(self._built[name]))

    def inputs(self, files: Sequence[bytes]) -> Arrays:
        """The graphs' inputs for files, and for the texts of the gate, from as few requests as the limits allow."""
        most = _limits(self._spec).max_batch_size
        given = {name: encode_texts(texts) for name, texts in self._export.texts().items()}
        parts = [
            self._preprocess({"image": as_files(files[start : start + most]), **given})
            for start in range(0, len(files), most)
        ]
        return {**parts[0], "pixel_values": np.concatenate([part["pixel_values"] for part in parts])}

    def run(self, variant: str, inputs: Arrays, size: int) -> dict[str, NDArray[Any]]:
        """What a variant's graphs give, in batches of a size."""
        found: dict[str, NDArray[Any]] = {}
        for tower in self._export.task.graphs:
            part = configs.model_part(self._spec, variant, tower.name)
            model = OnnxModel(self._root / part / VERSION, self._built[part])
            own = {tensor.name: inputs[tensor.name] for tensor in tower.inputs}
            results = [self._run(model, batch) for batch in _batches(own, size)]
            found |= {tensor.name: np.concatenate([each[tensor.name] for each in results]) for tensor in tower.outputs}
        return found

    def _run(self, model: OnnxModel, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        result = model.run([batch])[0]
        if isinstance(result, Exception):
            raise unrunnable(self._spec.name, next(iter(batch.values())).shape, result) from result
        return result


def _batches(inputs: Arrays, size: int) -> Iterator[dict[str, NDArray[Any]]]:
    rows = len(next(iter(inputs.values())))
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


def _processed(processor: Any, content: bytes) -> Floats:
    """What transformers makes of a file, float32 [3, height, width]."""
    image = load_image(Image.open(io.BytesIO(content)))
    found: Floats = processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32)
    return found


def _check_pixels(found: Floats, expected: Sequence[Floats]) -> None:
    """The served numbers of pictures against transformers', which are the same to the last bit.

    Raises:
        FidelityError: one is another.
    """
    for row, (served, wanted) in enumerate(zip(found, expected, strict=True)):
        if not np.array_equal(served, wanted):
            same = served.shape == wanted.shape
            by = f"{np.abs(served - wanted).max():g}" if same else f"its size, {served.shape} for {wanted.shape}"
            raise FidelityError(f"the served pixels of picture {row} differ from transformers' image processor by {by}")


def _limits(spec: ModelSpec) -> ImageLimits:
    assert spec.images is not None
    return spec.images
