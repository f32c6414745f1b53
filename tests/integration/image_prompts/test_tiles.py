"""Prompts with images through the real server and the gateway, against transformers' processor and `generate`.

A model of SmolVLM's class with random weights; tiles of 32 by 32 pixels have 16 tokens each. Pixels, tokens and greedy
answers are transformers'; the tower's vectors differ by float32 noise of two libraries, 1e-5.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
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
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Idefics3Processor
from transformers.image_utils import load_image

from tests import doors, image_prompts, tiny_models
from tests.gateways import Gateway
from tests.image_prompts import ANSWER, LIMITS, Channel, message, table, url
from trident_client import Client, DeadlineExceededError, InvalidRequestError, cli
from trident_export import add, configs, fingerprint, install, models_file
from trident_export.errors import FidelityError, ModelsFileError, UnreadableSource, UnsupportedArchitecture
from trident_export.graphs import editing
from trident_export.huggingface import vision_language
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures
from trident_export.tasks import image_parts, text_generation
from trident_serving.artefacts import TOWER, VERSION
from trident_serving.encoders.images import as_files
from trident_serving.errors import Overloaded
from trident_serving.generation.batch import Embeds, SlotTokens
from trident_serving.generation.decoder import OnnxDecoder
from trident_serving.generation.image_tower import ImageTower
from trident_serving.generation.images import ImageReader, PromptImages
from trident_serving.generation.service import GenerationService
from trident_serving.generation.vision import TileVision, VisionSettings
from trident_serving.images.decoding import decode
from trident_serving.launcher.local import LocalServer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "vlm"

FILES = pictures.files(9)
# Two pictures of one size, whose prompts have the same tokens.
SAME_SIZE = [pictures.encoded(Image.fromarray(pictures.drawn(seed, 64, 64))) for seed in (1, 2)]


class Reference:
    """transformers' model and processor."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Idefics3Processor(images, tokenizer, image_seq_len=tiny_models.VLM_TOKENS)

    def inputs(self, messages: list[dict[str, Any]], files: Sequence[bytes]) -> Any:
        prompt = self.processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [[load_image(_image(content)) for content in files]] if files else None
        return self.processor(text=[prompt], images=images, return_tensors="pt", add_special_tokens=False)

    def answer(self, messages: list[dict[str, Any]], files: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the greedy answer's."""
        inputs = self.inputs(messages, files)
        with torch.inference_mode():
            found = self.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0].tolist()
        length = inputs["input_ids"].shape[1]
        return found[:length], found[length:]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def _image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


CONVERSATIONS: list[tuple[list[dict[str, Any]], list[bytes]]] = [
    ([message("Tell me a story of the sea.")], []),
    ([message(None, "What is in this picture?")], [FILES[0]]),
    ([message("Look: ", None, " and ", None, ". Which is larger?")], [FILES[1], FILES[5]]),
    ([message(None, None, None)], [FILES[2], FILES[3], FILES[4]]),
    (
        [
            message(None, "What is this?"),
            {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
            message("And this?", None),
        ],
        [FILES[6], FILES[2]],
    ),
]


def _asked(client: Client, messages: list[dict[str, Any]], files: Sequence[bytes], **more: Any) -> Any:
    options: dict[str, Any] = {"return_prompt_token_ids": True, "return_tokens": True, "return_log_probs": True}
    return client.generate(messages, images=files, model="vlm", max_tokens=ANSWER, **(options | more))


def test_pixels_are_the_image_processors(folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    settings = vision_language.settings(HuggingFaceFolder(folder))
    assert isinstance(settings, TileVision)
    shapes = ((1, 1), (1, 700), (900, 3), (64, 63), (63, 64), (33, 32), (640, 427), (20, 41))
    drawn = [pictures.encoded(Image.fromarray(pictures.drawn(width, width, height))) for width, height in shapes]
    grids = set()
    for content in (*FILES, *drawn):
        expected = processor(images=[[load_image(_image(content))]], return_tensors="np", return_row_col_info=True)
        decoded = decode(content, "image", 2**24, 2**24)
        np.testing.assert_array_equal(np.stack(list(settings.tiles(decoded))), expected["pixel_values"][0])
        grid = settings.grid(*decoded.size)
        assert (grid.rows, grid.columns) == (expected["rows"][0][0], expected["cols"][0][0])
        assert grid.tiles <= settings.most_tiles().tiles
        grids.add(grid)
    assert len(grids) >= 3
    whole = replace(settings, split=False)
    processor.do_image_splitting = False
    expected = processor(images=[[load_image(_image(FILES[0]))]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(np.stack(list(whole.tiles(decode(FILES[0], "image", 2**24, 2**24)))), expected)


def test_the_towers_vectors_are_transformers(repository: Path, reference: Reference) -> None:
    tower = ImageTower(repository / "vlm" / VERSION, GenerationLimits(**LIMITS))
    reader = ImageReader(tower.settings, GenerationLimits(**LIMITS))
    for content in FILES[:4]:
        (image,) = reader.read([("images", content)])
        pixels = reference.inputs([message(None)], [content])["pixel_values"]
        with torch.inference_mode():
            (expected,) = reference.model.get_image_features(pixels).pooler_output
        assert expected.std() > 0.1
        np.testing.assert_allclose(tower.vectors(image), expected.numpy(), atol=1e-5)
        assert tower.vectors(image) is tower.vectors(image)  # kept


def test_answers_are_generates(client: Client, reference: Reference) -> None:
    image_prompts.compare(CONVERSATIONS, reference.answer, partial(_asked, client))


def test_an_answer_is_the_same_in_any_company(client: Client) -> None:
    """To the last bit, with images that are cut by chunks of prompts, and beside texts."""
    for model in ("vlm", "vlm_int8"):

        def ask(case: tuple[list[dict[str, Any]], list[bytes]], model: str = model) -> Any:
            return client.generate(
                case[0], images=case[1], model=model, max_tokens=ANSWER, return_log_probs=True, return_tokens=True
            )

        alone = [ask(case) for case in CONVERSATIONS]
        with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
            assert list(pool.map(ask, CONVERSATIONS[::-1])) == alone[::-1]


def test_prefixes_are_reused_by_image(repository: Path, reference: Reference) -> None:
    """The tokens of both prompts are the same, and what they stand for is not."""
    messages = [message("A long beginning that both share, before the image: ", None, " What is this?")]
    expected = [reference.answer(messages, [content]) for content in SAME_SIZE]
    assert expected[0][0] == expected[1][0]
    assert expected[0][1] != expected[1][1]
    prompt = expected[0][0]
    first_of_image = prompt.index(reference.model.config.image_token_id)
    service = GenerationService(repository / "vlm" / VERSION, GenerationLimits(**LIMITS))

    def asked(**inputs: NDArray[Any]) -> tuple[list[int], int]:
        """The answer, and the tokens of the prompt that were there already."""
        given = {"max_tokens": np.full((1, 1), ANSWER, np.int32), "return_tokens": np.ones((1, 1), np.bool_)}
        channel = Channel()
        service.submit(service.parse(given | inputs), channel)
        assert channel.done.wait(30)
        return list(channel.chunk.token_ids), int(service.recorder.drain().counters["prefix_hit_tokens"])

    def with_image(content: bytes) -> tuple[list[int], int]:
        return asked(messages=encode_texts([json.dumps(messages)])[None], images=as_files([content])[None])

    with_image(SAME_SIZE[0])
    assert with_image(SAME_SIZE[0]) == (expected[0][1], len(prompt) - 1)
    assert with_image(SAME_SIZE[1]) == (expected[1][1], first_of_image)
    service.stop()


def test_an_unload_ends_what_waits_for_images(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose images are not begun fail at once; the one whose are read fails behind that, and nothing answers."""
    begun, go_on, unloaded = threading.Event(), threading.Event(), threading.Event()
    service = GenerationService(repository / "vlm" / VERSION, GenerationLimits(**LIMITS), unloaded.is_set)
    read = ImageTower.embeds

    def slowly(tower: ImageTower, images: PromptImages) -> Embeds:
        begun.set()
        assert go_on.wait(20)
        return read(tower, images)

    monkeypatch.setattr(ImageTower, "embeds", slowly)
    inputs = {"messages": encode_texts([json.dumps([message(None)])])[None], "images": as_files(FILES[:1])[None]}
    channels = [Channel() for _ in range(4)]
    for channel in channels:
        service.submit(service.parse(inputs), channel)
    assert begun.wait(20)
    unloaded.set()
    assert all(channel.done.wait(20) for channel in channels[1:])
    assert not channels[0].done.is_set()
    go_on.set()
    assert channels[0].done.wait(20)
    assert [(type(channel.chunk), str(channel.chunk)) for channel in channels] == [
        (Overloaded, "the model is being unloaded")
    ] * 4
    counters = service.recorder.drain().counters
    assert (counters["requests_rejected"], counters["generated_tokens"]) == (4, 0)
    service.stop()


def test_texts_are_what_they_were(repository: Path, tmp_path: Path) -> None:
    """Logits of texts, to the last bit, from the graph and from the same without its inputs for images."""
    texts = [[5, 40, 33, 7, 250, 18, 90, 3], [44, 3, 8, 100]]
    for variant in ("vlm", "vlm_int8"):
        model = editing.load(repository / variant / VERSION / "model.onnx")
        (scatter,) = [node for node in model.graph if node.op_type == "ScatterND"]
        scatter.outputs[0].replace_all_uses_with(scatter.inputs[0])
        model.graph.remove(scatter, safe=True)
        editing.drop_unused(model, inputs=True)
        editing.save(model, tmp_path / variant / "model.onnx")
        assert not {"image_embeds", "image_positions"} & {value.name for value in model.graph.inputs}
        found = []
        for path in (repository / variant / VERSION / "model.onnx", tmp_path / variant / "model.onnx"):
            decoder = OnnxDecoder(path, slots=2, context=64, longest_run=16, threads=1)
            items = [SlotTokens(slot, 0, ids, len(ids)) for slot, ids in enumerate(texts)]
            found.append(decoder.run(items).copy())
        np.testing.assert_array_equal(found[0], found[1])


def test_text_prompts_and_tokens(client: Client, reference: Reference) -> None:
    text = "Compare <image> with <image> now."
    images = [[load_image(_image(content)) for content in FILES[:2]]]
    inputs = reference.processor(text=[text], images=images, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        expected = reference.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0, len(ids) :].tolist()
    options: dict[str, Any] = {"model": "vlm", "max_tokens": ANSWER, "return_tokens": True}
    found = client.generate(text, images=FILES[:2], return_prompt_token_ids=True, **options)
    assert (list(found.prompt_token_ids), list(found.token_ids)) == (ids, expected)
    assert list(client.generate(ids, images=FILES[:2], **options).token_ids) == expected
    # What a text holds is text, also where it reads like the token of an image.
    messages = [message("Is <image> a tag? ", None)]
    assert len(client.generate(messages, images=FILES[:1], **options).token_ids) == ANSWER


def test_grammars_and_prompts_log_probabilities(client: Client) -> None:
    messages, files = CONVERSATIONS[1]
    options: dict[str, Any] = {"images": files, "model": "vlm", "max_tokens": ANSWER}
    found = client.generate(messages, guided_regex="[a-z]{5}", **options)
    assert re.fullmatch("[a-z]{5}", found.text)
    plain = client.generate(messages, return_log_probs=True, **options)
    scored = client.generate(messages, prompt_logprobs=0, return_log_probs=True, **options)
    assert len(scored.prompt_log_probs) == scored.num_input_tokens - 1
    assert (scored.text, scored.log_probs) == (plain.text, plain.log_probs)


def test_every_door_gives_the_same(image_server: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(FILES[0])
    parts = [{"type": "image", "image": path}, {"type": "text", "text": "What is this?"}]
    by_hand = [{"role": "user", "content": parts}]
    options: dict[str, Any] = {"model": "vlm", "max_tokens": 8}
    sampled = options | {"temperature": 1.0, "random_seed": 5}
    found = doors.answers(
        image_server,
        lambda client: client.chat("What is this?", images=str(path), **options),
        lambda client: client.chat(by_hand, **options),
        lambda client: client.generate(by_hand, **options),
        lambda client: client.generate_many([message(None, "Why?")], 2, images=[FILES[1]], **sampled),
    )
    assert found[0] == found[1] == found[2]
    assert len({answer.text for answer in found[3]}) == 2
    with Client(image_server.grpc_url) as client:
        streamed = client.stream(by_hand, **options)
        assert "".join(chunk.text for chunk in streamed) == found[0].text
    assert found[0].num_input_tokens > 5 * tiny_models.VLM_TOKENS


def test_command_line(
    image_server: LocalServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(tmp_path / name) for name in ("a.jpg", "b.png")]
    for name, content in zip(names, FILES, strict=False):
        Path(name).write_bytes(content)
    at = ["--model", "vlm", "--max-tokens", "8", "--url", image_server.grpc_url]
    images = ["--image", names[0], "--image", names[1]]
    expected = client.chat("What is this?", images=FILES[:2], model="vlm", max_tokens=8)
    assert cli.main(["chat", "What is this?", *images, *at]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    expected = client.generate("<image> and <image>", images=FILES[:2], model="vlm", max_tokens=8)
    assert cli.main(["generate", "<image> and <image>", *images, *at]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert cli.main(["chat", "What is this?", "--image", str(tmp_path / "none.png"), *at]) == 2
    assert "none.png: No such file" in capsys.readouterr().err


def test_the_gateway_takes_data_urls(image_gateway: Gateway, client: Client) -> None:
    expected = client.chat("What is this?", images=FILES[:2], model="vlm", max_tokens=8)
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url(FILES[0], "image/jpeg"), "detail": "high"}},
        {"type": "image_url", "image_url": {"url": url(FILES[1])}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {"model": "vlm", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    status, _, answer = image_gateway.ask("/v1/chat/completions", body)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, expected.text)
    assert answer["usage"]["prompt_tokens"] == expected.num_input_tokens
    items = [
        {"type": "input_image", "image_url": url(FILES[0])},
        {"type": "input_image", "image_url": url(FILES[1])},
        {"type": "input_text", "text": "What is this?"},
    ]
    given = {"model": "vlm", "input": [{"role": "user", "content": items}], "max_output_tokens": 8}
    status, _, answer = image_gateway.ask("/v1/responses", given)
    assert (status, answer["output"][0]["content"][0]["text"]) == (200, expected.text)
    images = [base64.b64encode(content).decode() for content in FILES[:2]]
    message = {"role": "user", "content": "What is this?", "images": images}
    told = {"model": "vlm", "messages": [message], "stream": False, "options": {"num_predict": 8}}
    status, _, answer = image_gateway.ask("/api/chat", told)
    assert (status, answer["message"]["content"]) == (200, expected.text)
    told = {"model": "vlm", "prompt": "What is this?", "images": images, "stream": False, "options": {"num_predict": 8}}
    status, _, answer = image_gateway.ask("/api/generate", told)
    assert (status, answer["response"]) == (200, expected.text)
    parts[0]["image_url"]["url"] = "https://127.0.0.1/cat.png"
    status, _, answer = image_gateway.ask("/v1/chat/completions", body)
    assert status == 400
    assert (
        "messages[0].content[0]: 'https://127.0.0.1/cat.png' is an address, and this server fetches none"
        in (answer["error"]["message"])
    )


BOMB = pictures.encoded(Image.new("1", (9000, 9000)))
WIDE = pictures.encoded(Image.fromarray(pictures.drawn(7, 128, 128)))


@pytest.mark.parametrize(
    ("messages", "files", "said"),
    [
        ([message(None)], [b""], "images is empty: send the bytes of a file"),
        ([message(None)], [b"hello"], "images is no PNG, JPEG or WebP image: it begins with b'hello'"),
        ([message(None, None)], [FILES[0], FILES[1][:900]], r"images\[1\] can't be decoded"),
        ([message(None)], [BOMB], "images is 9000 x 9000 pixels, the limit is 33554432 pixels"),
        ([message(None, None, None, None)], FILES[:4], "the request has 4 images, the limit is 3"),
        ([message(None)], [], r"messages\[0\].content\[0\] is an image, and images holds 0 files"),
        ([message("hello")], FILES[:1], "images holds 1 files, and messages has 0 parts of type 'image'"),
        ([message(None, "x" * 900)], FILES[:1], "messages has [0-9]+ tokens, the model's context of 512 allows 511"),
        (
            "one <image>",
            FILES[:2],
            "text_input says 1 times where an image goes .<image>., and the request's images are 2",
        ),
        ("one <image>", [], "text_input says 1 times where an image goes .<image>., and the request's images are 0"),
        ([5, 6, 7], FILES[:1], "the prompt has 0 tokens of <image>, its 1 images have"),
        ("one <row_1_col_1>", [], "the prompt has the token <row_1_col_1> where its images have none: a text must not"),
        (
            "<global-img><image>",
            FILES[:1],
            "the prompt has the token <global-img> where its images have <fake_token_ar",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}]}],
            [],
            r"messages\[0\].content\[0\] is no base64",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}]}],
            [],
            "is an address, and this server fetches none: send the image itself",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            [],
            r'messages\[0\].content\[0\] must be like {"type": "image_url"',
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            [],
            "but this model reads parts of type 'text' and 'image' and 'image_url' only",
        ),
    ],
)
def test_what_is_refused(client: Client, messages: Any, files: Sequence[bytes], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        client.generate(messages, images=list(files), model="vlm")


def test_a_mark_without_an_image_is_text_or_refused(client: Client, reference: Reference) -> None:
    """In a message it is text, unless the request reads special tokens there; no token of an image stands for none."""
    token = reference.model.config.image_token_id
    alone = reference.inputs([message(None)], FILES[:1])["input_ids"][0].tolist().count(token)
    assert alone > 0
    for messages, files in (([message("What is <image>?")], []), ([message(None, "What is <image>?")], FILES[:1])):
        found = _asked(client, messages, files).prompt_token_ids
        assert found.count(token) == len(files) * alone
        with pytest.raises(InvalidRequestError, match="<image>.* image"):
            _asked(client, messages, files, split_special_tokens=False)
    for model in ("vlm", "vlm_int8"):
        with pytest.raises(InvalidRequestError, match="the prompt has 1 tokens of <image>, its 0 images have 0"):
            client.generate([5, token, 7], model=model)


def test_cut_prompts_and_other_models(client: Client, repository: Path) -> None:
    with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens can't be used with images"):
        client.generate([message(None)], images=FILES[:1], model="vlm", truncate_prompt_tokens=-1)
    with pytest.raises(DeadlineExceededError):
        client.generate([message(None)], images=FILES[:1], model="vlm", timeout=1e-4)


def test_nobody_else_is_hurt(client: Client, reference: Reference) -> None:
    """Answers beside broken images are what they are without them."""
    messages, files = CONVERSATIONS[1]
    _, expected = reference.answer(messages, files)

    def ask(broken: bool) -> Any:
        content = FILES[1][:900] if broken else files[0]
        try:
            return list(_asked(client, messages, [content]).token_ids)
        except InvalidRequestError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [index % 2 == 1 for index in range(16)]))
    assert found == [None if index % 2 else expected for index in range(16)]


def test_the_gate_refuses_a_damaged_tower(folder: Path, repository: Path, reference: Reference, tmp_path: Path) -> None:
    damaged = tmp_path / "vlm" / VERSION
    shutil.copytree(repository / "vlm" / VERSION, damaged)
    source, limits = HuggingFaceFolder(folder), GenerationLimits(**LIMITS)
    prompts = image_parts.ask(source, reference.model, damaged, limits)
    assert [len(prompt.reference) for prompt in prompts] == [image_parts.COMPARED] * 4
    graph = onnx.load(str(damaged / TOWER))
    weights = next(tensor for tensor in graph.graph.initializer if "layer_norm1.weight" in tensor.name)
    numbers = numpy_helper.to_array(weights).copy()
    numbers.reshape(-1)[3] += 0.05
    weights.CopyFrom(numpy_helper.from_array(numbers, weights.name))
    (damaged / f"{TOWER}.data").unlink(missing_ok=True)
    (damaged / TOWER).unlink()
    onnx.save(graph, str(damaged / TOWER))
    with pytest.raises(FidelityError, match="the image tower's vectors differ from transformers' by"):
        image_parts.ask(source, reference.model, damaged, limits)
    settings = VisionSettings.load(repository / "vlm" / VERSION)
    assert isinstance(settings, TileVision)
    for file in (repository / "vlm" / VERSION).glob(f"{TOWER}*"):
        shutil.copyfile(file, damaged / file.name)
    replace(settings, mean=(0.4, 0.5, 0.5)).save(damaged)
    with pytest.raises(FidelityError, match="the served pixels of an image differ"):
        image_parts.ask(source, reference.model, damaged, limits)
    replace(settings, tokens=15).save(damaged)
    with pytest.raises(FidelityError, match="has other tokens than Hugging Face's"):
        image_parts.ask(source, reference.model, damaged, limits)


def test_the_gate_compares_what_follows_images(folder: Path, repository: Path, reference: Reference) -> None:
    """Vectors in other places give other logits."""
    variant = repository / "vlm" / VERSION
    prompts = image_parts.ask(HuggingFaceFolder(folder), reference.model, variant, GenerationLimits(**LIMITS))
    decoder = OnnxDecoder(variant / "model.onnx", slots=4, context=400, longest_run=64, threads=1)
    found, effect = image_parts.measure(decoder, prompts)
    assert effect == 0.0
    for prompt, logits in zip(prompts, found, strict=True):
        np.testing.assert_allclose(logits, prompt.reference, atol=1e-3)
    shifted = [replace(each, embeds=replace(each.embeds, vectors=each.embeds.vectors[::-1])) for each in prompts]
    found, _ = image_parts.measure(decoder, shifted)
    assert all(np.abs(logits - prompt.reference).max() > 0.1 for prompt, logits in zip(prompts, found, strict=True))


def test_tables_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    source = HuggingFaceFolder(folder)

    def check(**more: Any) -> None:
        text_generation.check(models_file.parse("vlm", table(folder) | more), source)

    check()
    with pytest.raises(ModelsFileError, match="limits.context is 128, an image takes up to 94 tokens, and texts need"):
        check(limits=LIMITS | {"context": 128})
    with pytest.raises(ModelsFileError, match="limits.images is 3, and adapters that requests choose from are for"):
        check(adapters={"a": str(tmp_path)})
    with pytest.raises(ModelsFileError, match="images is 3 and device 'cuda': images are read on the CPU only"):
        check(limits=LIMITS | {"device": "cuda"})
    text = HuggingFaceFolder(tiny_models.make_causal(tmp_path / "llama", "llama"))
    with pytest.raises(UnsupportedArchitecture, match="a model of type 'llama', whose images are not read here"):
        text_generation.check(models_file.parse("m", table(text.path, context=128)), text)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "processor_config.json").write_text(json.dumps({"image_seq_len": 64}))
    with pytest.raises(UnreadableSource, match="has image_seq_len 64, a tile of this model has 16 tokens"):
        vision_language.settings(HuggingFaceFolder(other))


def test_only_a_model_with_images_has_a_tensor_for_them(folder: Path) -> None:
    for images in (3, 0):
        config = configs.build(models_file.parse("vlm", table(folder, images=images)))["vlm"]
        assert ("images" in [tensor.name for tensor in config.input]) == bool(images)
        assert ("image_pixels" in config.parameters) == bool(images)
        makers = fingerprint.makers(models_file.parse("vlm", table(folder, images=images)))
        assert ("tasks.image_parts" in makers) == ("graphs.vision" in makers) == bool(images)


def test_add_proposes_images(folder: Path) -> None:
    proposal = add.propose(folder, {"path": str(folder)})
    assert proposal.table["limits"]["images"] == 4
    assert "images 4: of a request at most; its image tower becomes a graph of its own" in proposal.reasons


@pytest.mark.slow
def test_idefics3(tmp_path: Path) -> None:
    """The same of Idefics3's class, without a server."""
    folder = tiny_models.make_vlm(tmp_path / "vlm", "idefics3", seed=3)
    spec = models_file.parse("vlm", table(folder, "fp32", "int8"))
    install.export([spec], tmp_path / "repository", tmp_path, tmp_path / "cache", lambda message: None)
    reference = Reference(folder)
    prompts = image_parts.ask(
        HuggingFaceFolder(folder), reference.model, tmp_path / "repository/vlm" / VERSION, GenerationLimits(**LIMITS)
    )
    assert len(prompts) == 4
