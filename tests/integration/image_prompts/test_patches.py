"""Prompts with images that are read at their own size, through the real server and the gateway, against transformers.

A model of Qwen2.5-VL's class with random weights: a token has 8 by 8 pixels, a window two by two tokens, an image at
most 30 tokens. Pixels, tokens, positions and greedy answers are transformers'; the tower's vectors differ by float32
noise of two libraries, 1e-5.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_utils import load_image

from tests import image_prompts, tiny_models
from tests.gateways import Gateway
from tests.image_prompts import ANSWER, Channel, message, table, url
from trident_client import Client, InvalidRequestError
from trident_export import add, install, models_file
from trident_export.errors import FidelityError, ModelsFileError, UnreadableSource
from trident_export.huggingface import vision_language
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures
from trident_export.tasks import image_parts, text_generation
from trident_serving.artefacts import TOWER, VERSION, read_manifest
from trident_serving.encoders.images import as_files
from trident_serving.errors import InvalidRequest
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.image_tower import ImageTower
from trident_serving.generation.images import ImageReader
from trident_serving.generation.service import GenerationService
from trident_serving.generation.vision import PatchVision
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "qwen"

FILES = pictures.files(9)
# Two pictures of one size, whose prompts have the same tokens, and two others with as many tokens.
SAME_SIZE = [pictures.encoded(Image.fromarray(pictures.drawn(seed, 40, 40))) for seed in (1, 2)]
WIDE, HIGH = (pictures.encoded(Image.fromarray(pictures.drawn(3, *size))) for size in ((48, 32), (32, 48)))
LIMITS = image_prompts.LIMITS | {"prefill_chunk": 16}
MARK = "<|vision_start|><|image_pad|><|vision_end|>"


def _exported(folder: Path, root: Path, *variants: str) -> Path:
    spec = models_file.parse("qwen", table(folder, *variants))
    install.export([spec], root / "repository", root, root / "cache", lambda message: None)
    return root / "repository"


class Reference:
    """transformers' model and image processor."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(self, files: Sequence[bytes]) -> Any:
        return self.images(images=[load_image(Image.open(io.BytesIO(each))) for each in files], return_tensors="pt")

    def inputs(self, prompt: str, files: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """What transformers' processor gives for a text with a mark for each image."""
        read = dict(self.read(files)) if files else {}
        first, *rest = prompt.split("<|image_pad|>")
        counts = [int(grid.prod()) // 4 for grid in read.get("image_grid_thw", ())]
        text = first + "".join("<|image_pad|>" * count + part for count, part in zip(counts, rest, strict=True))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        kinds = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **read}

    def answer(self, messages: list[dict[str, Any]] | str, files: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the greedy answer's."""
        prompt = messages if isinstance(messages, str) else self.rendered(messages)
        inputs = self.inputs(prompt, files)
        with torch.inference_mode():
            found = self.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0].tolist()
        length = inputs["input_ids"].shape[1]
        return found[:length], found[length:]

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        found: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


CONVERSATIONS: list[tuple[list[dict[str, Any]], list[bytes]]] = [
    ([message("Tell me a story of the sea.")], []),
    ([message(None, "What is in this picture?")], [FILES[0]]),
    ([message("Look: ", None, " and ", None, ". Which is larger?")], [FILES[5], FILES[4]]),
    ([message(None, None, None)], [FILES[2], FILES[4], WIDE]),
    (
        [
            message(None, "What is this?"),
            {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
            message("And this?", None),
        ],
        [FILES[6], HIGH],
    ),
]


def test_pixels_are_the_image_processors(folder: Path, reference: Reference) -> None:
    settings = vision_language.settings(HuggingFaceFolder(folder))
    shapes = ((1, 1), (1, 200), (900, 5), (64, 63), (8, 8), (33, 32), (640, 427), (20, 41))
    drawn = [pictures.encoded(Image.fromarray(pictures.drawn(width, width, height))) for width, height in shapes]
    sizes = set()
    for content in (*FILES, *drawn):
        expected = reference.read([content])
        image = load_image(Image.open(io.BytesIO(content))).convert("RGB")
        np.testing.assert_array_equal(settings.pixels(image), expected["pixel_values"].numpy())
        grid = settings.grid(*image.size)
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        assert settings.tokens_of(grid) + 2 <= settings.most_tokens
        sizes.add(grid)
    assert len(sizes) >= 10


def test_the_towers_vectors_are_transformers(repository: Path, reference: Reference) -> None:
    tower = ImageTower(repository / "qwen" / VERSION, GenerationLimits(**LIMITS))
    reader = ImageReader(tower.settings, GenerationLimits(**LIMITS))
    for content in (*FILES[:5], WIDE):
        (image,) = reader.read([("images", content)])
        with torch.inference_mode():
            (expected,) = reference.model.get_image_features(**reference.read([content])).pooler_output
        assert expected.std() > 0.1
        np.testing.assert_allclose(tower.vectors(image), expected.numpy(), atol=1e-5)


def _asked(client: Client, prompt: Any, files: Sequence[bytes], **more: Any) -> Any:
    options: dict[str, Any] = {"return_prompt_token_ids": True, "return_tokens": True, "model": "qwen"}
    return client.generate(prompt, images=files, max_tokens=ANSWER, **(options | more))


def test_answers_are_generates(client: Client, reference: Reference) -> None:
    """The positions of what follows images are right: answers are other ones where they are not."""
    image_prompts.compare(CONVERSATIONS, reference.answer, partial(_asked, client))
    # A text, with nothing before its first image and nothing behind its last.
    text = f"<|image_pad|> or {MARK}: say, {MARK}"
    files = [WIDE, FILES[5], HIGH]
    prompt, expected = reference.answer(text, files)
    found = _asked(client, text, files)
    assert (list(found.prompt_token_ids), list(found.token_ids)) == (prompt, expected)
    assert list(_asked(client, prompt, files).token_ids) == expected


def test_an_answer_is_the_same_in_any_company(client: Client) -> None:
    """To the last bit, with images that are cut by chunks of prompts, and beside texts and images of other sizes."""
    for model in ("qwen", "qwen_int8"):

        def ask(case: tuple[list[dict[str, Any]], list[bytes]], model: str = model) -> Any:
            return _asked(client, case[0], case[1], model=model, return_log_probs=True)

        alone = [ask(case) for case in CONVERSATIONS]
        with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
            assert list(pool.map(ask, CONVERSATIONS[::-1])) == alone[::-1]


def test_prefixes_are_reused_by_image(repository: Path, reference: Reference) -> None:
    """The tokens of prompts are the same, and what they stand for is not; nor are the positions behind them."""
    messages = [message("A long beginning that both share, before the image: ", None, " What is this?")]
    expected = {content: reference.answer(messages, [content]) for content in (*SAME_SIZE, WIDE, HIGH)}
    assert expected[SAME_SIZE[0]][0] == expected[SAME_SIZE[1]][0]
    assert expected[WIDE][0] == expected[HIGH][0]
    assert len({tuple(answer) for _, answer in expected.values()}) == 4
    service = GenerationService(repository / "qwen" / VERSION, GenerationLimits(**LIMITS))

    def asked(**inputs: NDArray[Any]) -> tuple[list[int], int]:
        """The answer, and the tokens of the prompt that were there already."""
        given = {"max_tokens": np.full((1, 1), ANSWER, np.int32), "return_tokens": np.ones((1, 1), np.bool_)}
        channel = Channel()
        service.submit(service.parse(given | inputs), channel)
        assert channel.done.wait(30)
        return list(channel.chunk.token_ids), int(service.recorder.drain().counters["prefix_hit_tokens"])

    def with_image(content: bytes, said: list[dict[str, Any]] = messages) -> tuple[list[int], int]:
        return asked(messages=encode_texts([json.dumps(said)])[None], images=as_files([content])[None])

    for first, second in (SAME_SIZE, (WIDE, HIGH)):
        prompt = expected[first][0]
        image = prompt.index(reference.model.config.image_token_id)
        assert with_image(first)[0] == expected[first][1]
        assert with_image(first) == (expected[first][1], len(prompt) - 1)
        assert with_image(second) == (expected[second][1], image)
    # The conversation goes on behind its answer, whose positions are not its places.
    words = reference.tokenizer.decode(expected[HIGH][1], skip_special_tokens=True)
    more = [*messages, {"role": "assistant", "content": words}, message("And why?")]
    prompt, answer = reference.answer(more, [HIGH])
    found, reused = with_image(HIGH, more)
    assert found == answer
    assert reused >= len(expected[HIGH][0])
    service.stop()


def test_the_gateway_takes_data_urls(image_gateway: Gateway, client: Client) -> None:
    expected = client.chat("What is this?", images=[FILES[0], WIDE], model="qwen", max_tokens=8)
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url(FILES[0], "image/jpeg"), "detail": "high"}},
        {"type": "image_url", "image_url": {"url": url(WIDE)}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {"model": "qwen", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    status, _, answer = image_gateway.ask("/v1/chat/completions", body)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, expected.text)
    assert answer["usage"]["prompt_tokens"] == expected.num_input_tokens
    parts[1] = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    status, _, answer = image_gateway.ask("/v1/chat/completions", body)
    assert status == 400
    assert "messages[0].content[1] is a video, and no model here reads videos" in answer["error"]["message"]
    status, _, answer = image_gateway.ask("/v1/completions", {"model": "qwen", "prompt": "See <|video_pad|>."})
    assert (status, answer["error"]["message"]) == (
        400,
        "the prompt has the token <|video_pad|>, and only <|image_pad|> stands for an image: a text must not hold it",
    )


NARROW = pictures.encoded(Image.fromarray(pictures.drawn(4, 402, 2)))


@pytest.mark.parametrize(
    ("prompt", "files", "said"),
    [
        ([message(None)], [b"hello"], "images is no PNG, JPEG or WebP image: it begins with b'hello'"),
        ([message(None)], [FILES[1][:900]], "images can't be decoded"),
        (
            [message(None, None)],
            [FILES[0], NARROW],
            r"images\[1\]: it is 402 x 2 pixels, and this model reads images whose longer side is at most 200 times",
        ),
        ([message(None, None, None, None)], FILES[:4], "the request has 4 images, the limit is 3"),
        ([message("hello")], FILES[:1], "images holds 1 files, and messages has 0 parts of type 'image'"),
        (
            f"one {MARK}",
            FILES[:2],
            "text_input says 1 times where an image goes .<.image_pad.>., and the request's images are 2",
        ),
        (MARK, [], "text_input says 1 times where an image goes .<.image_pad.>., and the request's images are 0"),
        (f"{MARK} <|video_pad|>", FILES[:1], "the prompt has the token <.video_pad.>, and only <.image_pad.> stands"),
        (f"{MARK} <|vision_start|>.", FILES[:1], "the prompt has the token <.vision_start.> away from <.image_pad.>"),
        ([5, 6, 7], FILES[:1], "the prompt has 0 tokens of <.image_pad.>, its 1 images have"),
        ([message("x" * 1200, None)], FILES[:1], "messages has [0-9]+ tokens, the model's context of 512 allows 511"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "file:///a.mp4"}]}],
            [],
            r"messages\[0\].content\[0\] is a video, and no model here reads videos: send some of its frames as images",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}]}],
            [],
            "is an address, and this server fetches none: send the image itself",
        ),
    ],
)
def test_what_is_refused(client: Client, prompt: Any, files: Sequence[bytes], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        client.generate(prompt, images=list(files), model="qwen")


def test_tokens_of_an_image_that_are_apart_are_refused(client: Client, reference: Reference) -> None:
    ids = reference.inputs(MARK, [WIDE])["input_ids"][0].tolist()
    apart = [*ids[:3], 5, *ids[3:]]
    with pytest.raises(InvalidRequestError, match="the prompt's 24 tokens of <.image_pad.> for images do not stand"):
        client.generate(apart, images=[WIDE], model="qwen")


def test_the_gate_compares_what_follows_images(folder: Path, repository: Path, reference: Reference) -> None:
    """Other positions give other logits, and so do vectors in other places."""
    variant, limits = repository / "qwen" / VERSION, GenerationLimits(**LIMITS)
    prompts = image_parts.ask(HuggingFaceFolder(folder), reference.model, variant, limits)
    assert [len(prompt.reference) for prompt in prompts] == [image_parts.COMPARED] * 4
    decoder = OnnxDecoder(variant / "model.onnx", slots=4, context=400, longest_run=64, threads=1)
    found, effect = image_parts.measure(decoder, prompts)
    assert effect == 0.0
    for prompt, logits in zip(prompts, found, strict=True):
        np.testing.assert_allclose(logits, prompt.reference, atol=1e-3)
    assert all(prompt.rope is not None for prompt in prompts)
    turned = [
        replace(each, rope=replace(each.rope, known=each.rope.known[[0, 2, 1]])) if each.rope else each
        for each in prompts
    ]
    shifted = [replace(each, embeds=replace(each.embeds, vectors=each.embeds.vectors[::-1])) for each in prompts]
    for others in ([replace(each, rope=None) for each in prompts], turned, shifted):
        found, _ = image_parts.measure(decoder, others)
        assert all(
            np.abs(logits - prompt.reference).max() > 0.05 for prompt, logits in zip(prompts, found, strict=True)
        )


def test_the_gate_refuses_a_damaged_tower(folder: Path, repository: Path, reference: Reference, tmp_path: Path) -> None:
    damaged = shutil.copytree(repository / "qwen" / VERSION, tmp_path / "qwen" / VERSION)
    source, limits = HuggingFaceFolder(folder), GenerationLimits(**LIMITS)
    settings = vision_language.settings(source)
    assert isinstance(settings, PatchVision)
    # All windows the whole image: what layers with windows then attend to is too much.
    replace(settings, window=64 * tiny_models.QWEN_VL_SIDE).save(damaged)
    with pytest.raises(FidelityError, match="the image tower's vectors differ from transformers' by"):
        image_parts.ask(source, reference.model, damaged, limits)
    replace(settings, resample=2).save(damaged)
    with pytest.raises(FidelityError, match="the served pixels of an image differ"):
        image_parts.ask(source, reference.model, damaged, limits)
    settings.save(damaged)
    graph = onnx.load(str(damaged / TOWER))
    weights = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("merger.ln_q.weight"))
    numbers = numpy_helper.to_array(weights).copy()
    numbers[3] += 0.05
    weights.CopyFrom(numpy_helper.from_array(numbers, weights.name))
    (damaged / f"{TOWER}.data").unlink(missing_ok=True)
    (damaged / TOWER).unlink()
    onnx.save(graph, str(damaged / TOWER))
    with pytest.raises(FidelityError, match="the image tower's vectors differ from transformers' by"):
        image_parts.ask(source, reference.model, damaged, limits)


def test_texts_are_what_the_text_part_gives(folder: Path, repository: Path, tmp_path: Path) -> None:
    """Logits of texts, to the last bit, from the graph with three positions and from that of a table without images."""
    spec = models_file.parse("text", table(folder, images=0))
    install.export([spec], tmp_path / "repository", tmp_path, tmp_path / "cache", lambda message: None)
    texts = [[5, 40, 33, 7, 250, 18, 90, 3], [44, 3, 8, 100]]
    found = []
    for name, root in (("qwen", repository), ("text", tmp_path / "repository")):
        path = root / name / VERSION / "model.onnx"
        inputs = {value.name for value in onnx.load(str(path), load_external_data=False).graph.input}
        assert ("rope_positions" in inputs) == ("image_embeds" in inputs) == (name == "qwen")
        decoder = OnnxDecoder(path, slots=2, context=64, longest_run=16, threads=1)
        found.append(decoder.run([SlotTokens(slot, 0, ids, len(ids)) for slot, ids in enumerate(texts)]).copy())
    np.testing.assert_array_equal(found[0], found[1])
    manifests = [read_manifest(root, name) for name, root in (("qwen", repository), ("text", tmp_path / "repository"))]
    # An image so narrow that it has one row may have more tokens than its pixels need.
    assert [manifest.image_tokens for manifest in manifests if manifest] == [79, 0]
    service = GenerationService(tmp_path / "repository" / "text" / VERSION, GenerationLimits(**LIMITS | {"images": 0}))
    try:
        with pytest.raises(
            InvalidRequest, match="the token <.image_pad.>, a mark of images, .* by its text part: a text"
        ):
            service.parse({"text_input": encode_texts(["one <|image_pad|>"])[None]})
    finally:
        service.stop()


def test_tables_and_folders_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    source = HuggingFaceFolder(folder)

    def check(source: HuggingFaceFolder = source, **limits: Any) -> None:
        text_generation.check(models_file.parse("qwen", table(source.path, **limits)), source)

    check()
    check(image_tokens=20)
    smaller = vision_language.settings(source, 20)
    assert isinstance(smaller, PatchVision)
    assert smaller.max_pixels == 20 * 64
    with pytest.raises(ModelsFileError, match="an image takes up to 79 tokens.*: raise context, set image_tokens to"):
        check(context=160)
    with pytest.raises(ModelsFileError, match="limits.image_tokens is 3, and .* reads no image with fewer than 4"):
        check(image_tokens=3)
    with pytest.raises(ModelsFileError, match="cuts images into tiles of one size"):
        check(HuggingFaceFolder(tiny_models.make_vlm(tmp_path / "vlm")), image_tokens=3)
    other = shutil.copytree(folder, tmp_path / "other")
    processor = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(processor | {"merge_size": 4}))
    with pytest.raises(UnreadableSource, match="has merge_size 4, the model's is 2: one is another model's"):
        check(HuggingFaceFolder(other))
    other = shutil.copytree(folder, tmp_path / "another")
    config = json.loads((other / "config.json").read_text())
    del config["text_config"]["rope_parameters"]["mrope_section"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadableSource, match="config.json must have an mrope_section of three numbers, found None"):
        check(HuggingFaceFolder(other))


def test_add_proposes_images_that_fit(folder: Path, tmp_path: Path) -> None:
    proposal = add.propose(folder, {"path": str(folder)})
    assert (proposal.table["limits"]["images"], "image_tokens" in proposal.table["limits"]) == (4, False)
    large = shutil.copytree(folder, tmp_path / "large")
    processor = json.loads((large / "preprocessor_config.json").read_text())
    size = {"shortest_edge": 256, "longest_edge": 64 * 16384}
    (large / "preprocessor_config.json").write_text(json.dumps(processor | {"size": size}))
    proposal = add.propose(large, {"path": str(large)})
    assert (proposal.table["limits"]["images"], proposal.table["limits"]["image_tokens"]) == (3, 128)
    assert "image_tokens 128: larger images are made smaller; its image processor allows 16386" in proposal.reasons


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_every_variant(tmp_path: Path, kind: str) -> None:
    """Each passes the gate, which compares what follows images; and Qwen2-VL, whose layers all see the whole image."""
    folder = tiny_models.make_qwen_vl(tmp_path / "model", kind, seed=3)
    variants = ["fp32", "int8", "int8_cache", "int8_mixed", "int8_streams", "int4", "int4_mixed"]
    repository = _exported(folder, tmp_path, *variants)
    manifest = read_manifest(repository, "qwen")
    assert manifest is not None
    assert (set(manifest.fidelity), manifest.unverified) == (set(variants), {})
    assert all(measured["batch_effect"] == 0.0 for measured in manifest.fidelity.values())
    service = GenerationService(repository / "qwen" / VERSION, GenerationLimits(**LIMITS))
    reference = Reference(folder)
    for messages, files in CONVERSATIONS:
        channel = Channel()
        inputs = {"messages": encode_texts([json.dumps(messages)])[None], "images": as_files(files)[None]}
        given = {"max_tokens": np.full((1, 1), ANSWER, np.int32), "return_tokens": np.ones((1, 1), np.bool_)}
        service.submit(service.parse(inputs | given), channel)
        assert channel.done.wait(60)
        assert list(channel.chunk.token_ids) == reference.answer(messages, files)[1]
    service.stop()
