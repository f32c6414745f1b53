"""Images of a causal model: the files that its variants share, and what the gate compares.

The gate asks transformers what a prompt with images is and what follows, by the model's image processor, its
processor's text for an image, and the whole model with its own attention. Pixels must be equal to the last bit and
tokens be the same; vectors differ by what another order of sums makes, and the logits behind images go through the gate
of logits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_utils import load_image

from trident_export.errors import FidelityError, ModelsFileError, UnsupportedModel
from trident_export.graphs.image_inputs import add_image_inputs, add_rope_positions, export_tower
from trident_export.graphs.patch_tower import export_patch_tower
from trident_export.huggingface import images as image_files
from trident_export.huggingface import vision_language
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures
from trident_export.models_file import ModelSpec
from trident_export.tasks import Job
from trident_serving.artefacts import TOWER
from trident_serving.chat.template import ChatTemplate
from trident_serving.encoders.images import as_files
from trident_serving.errors import InvalidRequest
from trident_serving.generation.batch import Embeds, RopePositions, SlotTokens
from trident_serving.generation.chat import Chat
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.image_tower import ImageTower
from trident_serving.generation.images import ImageReader
from trident_serving.generation.request import RequestParser
from trident_serving.generation.vision import PatchVision, TileVision, VisionSettings
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

# Tokens at the end of each prompt whose logits are compared, and how many of them run one at a time.
COMPARED, _DECODED = 32, 4
# Of a vector's numbers from transformers', as a share of the largest: what another order of sums makes, and far below
# what a weight that is not the model's makes.
VECTOR_ERROR = 1e-4
_LEAST_TEXT = 128  # tokens of a prompt and its answer beside an image
# Tokens of a prompt's runs, together with others and alone: few, so that images are cut, and each time elsewhere.
RUN, _ALONE = 64, 40


def check(spec: ModelSpec, source: HuggingFaceFolder) -> None:
    """Refuse images that can't be served.

    Raises:
        ExportError: the table, the model or its processor does not allow it.
    """
    assert spec.generation
    if spec.adapters:
        raise ModelsFileError(
            f"[{spec.name}] limits.images is {spec.generation.images}, and adapters that requests choose from are for "
            "models without images: remove one of the two"
        )
    settings = vision_language.settings(source, spec.generation.image_tokens)
    vision_language.sections(source)
    most = settings.most_tokens
    if most + _LEAST_TEXT > spec.generation.context:
        fewer = ", set image_tokens to fewer" if isinstance(settings, PatchVision) else ""
        raise ModelsFileError(
            f"[{spec.name}] limits.context is {spec.generation.context}, an image takes up to {most} tokens, and "
            f"texts need {_LEAST_TEXT} at least: raise context{fewer}, or set images = 0"
        )


def write(job: Job, model: PreTrainedModel) -> None:
    """Write the tower and its settings into the files that all variants share.

    Args:
        model: whole; its tower is changed.
    """
    job.progress("tracing the image tower")
    assert job.spec.generation
    settings = vision_language.settings(job.source, job.spec.generation.image_tokens)
    template = ChatTemplate.load(job.assets)
    if template is not None and settings.token not in _shown(template):
        raise UnsupportedModel(
            f"{job.source}: its chat template writes no {settings.token} for a part of type 'image': set images = 0"
        )
    settings.save(job.assets)
    if isinstance(settings, PatchVision):
        export_patch_tower(model, job.assets / TOWER, str(job.source), settings)
    else:
        assert isinstance(settings, TileVision)
        export_tower(model, job.assets / TOWER, str(job.source), settings.tile)


def add_inputs(model: ir.Model) -> None:
    """See `image_inputs.add_image_inputs`."""
    add_image_inputs(model)


def add_positions(model: ir.Model, source: HuggingFaceFolder) -> None:
    """See `image_inputs.add_rope_positions`; only where the model has them. No pass for weights needs to know them."""
    if sections := vision_language.sections(source):
        add_rope_positions(model, sections)


def _shown(template: ChatTemplate) -> str:
    parts = [{"type": "image"}, {"type": "text", "text": "hello"}]
    try:
        return template.render([{"role": "user", "content": parts}])
    except InvalidRequest:
        return ""


@dataclass(frozen=True)
class Pictured:
    """A prompt with images.

    Attributes:
        ids: its tokens.
        embeds: the vectors of its images, as they are served.
        rope: its positions in time, height and width; None: the model has none.
        reference: transformers' logits of the last `COMPARED` tokens, float32 [tokens, vocabulary].
    """

    ids: list[int]
    embeds: Embeds
    rope: RopePositions | None
    reference: NDArray[np.float32]

    @property
    def compared(self) -> list[int]:
        """The tokens whose logits are compared."""
        return self.ids[-len(self.reference) :]


def ask(source: HuggingFaceFolder, model: Any, folder: Path, limits: GenerationLimits) -> list[Pictured]:
    """Prompts with one image and with several, and what transformers says behind them.

    Args:
        model: transformers', whole.
        folder: a version folder.

    Raises:
        FidelityError: pixels, tokens or vectors are otherwise than transformers has them.
    """
    tower, wanted = ImageTower(folder, limits), vision_language.settings(source, limits.image_tokens)
    settings, processor = tower.settings, image_files.processor(source)
    tokenizer = TextTokenizer.load(folder)
    chat = Chat.load(folder, tokenizer, limits, settings.literals)
    parser = RequestParser(tokenizer, chat, limits, images=ImageReader(settings, limits))
    found = []
    for texts, files in _prompts(settings, limits):
        inputs, said = _request(source, wanted, texts, has_chat=chat is not None)
        request = parser.parse(inputs | {"images": as_files(files)[None], "max_tokens": np.ones((1, 1), np.int32)})
        read = [load_image(Image.open(io.BytesIO(content))) for content in files]
        asked = vision_language.asked(processor, wanted, said, read)
        ids = source.tokenizer(asked.text, add_special_tokens=chat is None).input_ids
        if list(request.prompt_ids) != ids or request.images is None:
            raise FidelityError(f"the prompt {said[:200]!r} with images has other tokens than Hugging Face's")
        pixels = [settings.pixels(image.convert("RGB")) for image in read]
        if not np.array_equal(np.concatenate(pixels), asked.pixels):
            raise FidelityError("the served pixels of an image differ from those of transformers' image processor")
        embeds = tower.embeds(request.images)
        with torch.inference_mode():
            _check_vectors(embeds.vectors, model.get_image_features(**asked.given).pooler_output)
            logits = model(**asked.inputs(ids, wanted.token_id), logits_to_keep=COMPARED).logits[0]
        found.append(Pictured(ids, embeds, request.images.rope, logits.float().numpy()))
    return found


def _request(
    source: HuggingFaceFolder, settings: VisionSettings, texts: Sequence[str | None], *, has_chat: bool
) -> tuple[dict[str, NDArray[Any]], str]:
    """The prompt of a request, and transformers' text of it, in which each image is a mark.

    Args:
        texts: of the prompt; None is an image.
    """
    if not has_chat:
        text = "".join(settings.token if each is None else each for each in texts)
        return {"text_input": encode_texts([text])[None]}, text
    parts = [{"type": "image"} if each is None else {"type": "text", "text": each} for each in texts]
    messages = [{"role": "user", "content": parts}]
    prompt: str = source.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"messages": encode_texts([json.dumps(messages)])[None]}, prompt


def _prompts(settings: VisionSettings, limits: GenerationLimits) -> list[tuple[list[str | None], list[bytes]]]:
    """Texts, in which None is an image, and files: one of another form each, and two where the context has room."""
    files = list(pictures.files(3))
    found: list[tuple[list[str | None], list[bytes]]] = [
        ([None, "What is this?"], files[:1]),
        (["Look at this: ", None, " What is in it?"], files[1:2]),
        (["And this? ", None], files[2:]),
    ]
    if limits.images > 1 and 2 * settings.most_tokens + _LEAST_TEXT <= limits.context:
        found.append(([None, " and ", None, " differ in what?"], files[1:]))
    return found


def _check_vectors(found: NDArray[np.float32], expected: Sequence[torch.Tensor]) -> None:
    wanted = torch.cat(list(expected)).float().numpy()
    largest = float(np.abs(wanted).max())
    error = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not error <= VECTOR_ERROR * max(largest, 1e-6):
        raise FidelityError(
            f"the image tower's vectors differ from transformers' by {error:.3g}, and its largest number is "
            f"{largest:.3g}"
        )


def measure(decoder: OnnxDecoder, prompts: Sequence[Pictured]) -> tuple[list[NDArray[np.float32]], float]:
    """Logits of the compared tokens of prompts that run together, and their largest difference from each run alone.

    Both times chunks cut images; together the last tokens run one by one.
    """
    pieces: list[list[SlotTokens]] = []
    for slot, prompt in enumerate(prompts):
        length, first = len(prompt.ids), len(prompt.ids) - len(prompt.reference)
        bounds = sorted({*range(0, length - _DECODED, RUN - slot), first, *range(length - _DECODED, length + 1)})
        pieces.append([_item(slot, prompt, start, end, end - max(start, first)) for start, end in pairwise(bounds)])
    found: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    for step in range(max(map(len, pieces))):
        items = [each[step] for each in pieces if step < len(each)]
        logits = decoder.run(items)
        begin = 0
        for item in items:
            found[item.slot].append(logits[begin : begin + item.wanted].copy())
            begin += item.wanted
    together = [np.concatenate(parts) for parts in found]
    effect = 0.0
    for prompt, logits in zip(prompts, together, strict=True):
        length, first = len(prompt.ids), len(prompt.ids) - len(prompt.reference)
        bounds = sorted({*range(0, length, _ALONE), first, length})
        items = [_item(0, prompt, start, end, end - max(start, first)) for start, end in pairwise(bounds)]
        alone = np.concatenate([decoder.run([item]).copy() for item in items])
        effect = max(effect, float(np.abs(alone - logits).max()))
    return together, effect


def _item(slot: int, prompt: Pictured, start: int, end: int, wanted: int) -> SlotTokens:
    rope = None if prompt.rope is None else prompt.rope.part(start, end)
    part = prompt.embeds.part(start, end)
    return SlotTokens(slot, start, prompt.ids[start:end], max(wanted, 0), embeds=part, rope=rope)
