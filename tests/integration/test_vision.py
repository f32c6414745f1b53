"""Images through the real server, against the transformers pipelines: classes, labels, and embeddings.

Random weights, images of 32 by 32. Tolerance: float32 noise of two libraries through two layers, 1e-4 on probabilities
and on vectors of length 1.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline
from transformers.image_utils import load_image

from tests import doors, tiny_models
from tests.conftest import some_slow
from trident_client import Client, DeadlineExceededError, InvalidRequestError, NotFoundError, cli
from trident_export import add, install, models_file, recipes, tasks
from trident_export.errors import FidelityError, ModelsFileError, UnsupportedArchitecture
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.measure import pictures, quality
from trident_export.tasks import encoders
from trident_export.tasks.encoders import base
from trident_serving.artefacts import VERSION
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
FILES = pictures.files(9)
LABELS = ["a dog", "two cats", "rain on a window", "music"]
SIZE = {"height": tiny_models.IMAGE, "width": tiny_models.IMAGE, "threads": 1}
DIMENSIONS = {"clip": 24, "siglip": 32, "dinov2": 32}
TASKS = {
    "vit": "image-classification",
    "deit": "image-classification",
    "beit": "image-classification",
    "clip": "zero-shot-image-classification",
    "siglip": "zero-shot-image-classification",
    "clip-images": "image-feature-extraction",
    "siglip-images": "image-feature-extraction",
    "dinov2": "image-feature-extraction",
    "clip-texts": "feature-extraction",
    "siglip-texts": "feature-extraction",
}
# Random weights are no measure of what rounding costs; that a variant's numbers depend on nothing else still is.
OPEN = {
    "image-classification": {"agreement": 0.5, "score_error": 1.0},
    "zero-shot-image-classification": {"score_error": 1.0, "agreement": 0.0},
}


def _spec(folder: Path, name: str, *variants: str) -> models_file.ModelSpec:
    task, family = TASKS[name], name.partition("-")[0]
    limits: dict[str, Any] = dict(SIZE) if "image" in task else {"threads": 1}
    if task == "image-classification":
        limits["labels"] = len(tiny_models.ANIMALS)
    else:
        limits["dimensions"] = DIMENSIONS[family]
    if task in ("zero-shot-image-classification", "feature-extraction"):
        limits["max_tokens"] = 64 if family == "siglip" else 77
    table = {
        "task": task,
        "source": {"path": str(folder / family)},
        "variants": list(variants or ["fp32"]),
        "limits": limits,
        "gates": {variant: OPEN[task] for variant in variants if variant != "fp32"},
    }
    return models_file.parse(name, table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision")
    for seed, name in enumerate(tiny_models.VISION):
        tiny_models.make_vision(path / name, name, seed)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    specs = [_spec(folder, "vit", "fp32", "int8"), _spec(folder, "clip"), _spec(folder, "clip-images")]
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected


def _image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _assert_equal(found: list[Any], expected: list[dict[str, Any]]) -> None:
    """The scores label by label, in falling order; labels whose scores are equal have none."""
    wanted = {each["label"]: each["score"] for each in expected}
    np.testing.assert_allclose([item.score for item in found], [each["score"] for each in expected], atol=TOLERANCE)
    np.testing.assert_allclose([item.score for item in found], [wanted[item.label] for item in found], atol=TOLERANCE)


def test_classes_are_the_pipelines(client: Client, folder: Path) -> None:
    pipe = pipeline("image-classification", model=str(folder / "vit"), device="cpu")
    found = client.classify_images(FILES, model="vit", top_k=5, batch_size=4)
    for content, labels in zip(FILES, found, strict=True):
        _assert_equal(labels, pipe(_image(content), top_k=5))
    assert len({labels[0].label for labels in found}) > 1  # the pictures make a difference to this model
    assert client.classify_images(FILES[0], model="vit") == found[0][:1]
    assert [client.classify_images(content, top_k=5) for content in FILES] == found  # to the last bit
    rounded = client.classify_images(FILES, model="vit_int8", top_k=5, batch_size=9)
    assert [client.classify_images(content, model="vit_int8", top_k=5) for content in FILES] == rounded != found


@pytest.mark.parametrize("options", [{}, {"hypothesis_template": "{}, seen from far."}])
def test_labels_are_the_pipelines(client: Client, folder: Path, options: dict[str, str]) -> None:
    pipe = pipeline("zero-shot-image-classification", model=str(folder / "clip"), device="cpu")
    found = client.classify_images_zero_shot(FILES, LABELS, batch_size=5, **options)
    spread = 0.0
    for content, labels in zip(FILES, found, strict=True):
        _assert_equal(labels, pipe(_image(content), candidate_labels=LABELS, **options))
        spread = max(spread, labels[0].score - labels[-1].score)
    assert spread > 0.1
    assert [client.classify_images_zero_shot(content, LABELS, **options) for content in FILES] == found
    assert client.classify_images_zero_shot(FILES[0], ["music"])[0].score == 1.0


def test_embeddings_are_the_models(client: Client, folder: Path) -> None:
    model = AutoModel.from_pretrained(folder / "clip").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "clip")
    with torch.inference_mode():
        pixels = processor([load_image(_image(content)) for content in FILES], return_tensors="pt")
        expected = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output).numpy()
    vectors = client.embed_images(FILES, batch_size=5)
    np.testing.assert_allclose(vectors, expected, atol=TOLERANCE)
    assert (expected @ expected.T).min() < 0.9  # the pictures make a difference
    for content, vector in zip(FILES, vectors, strict=True):
        np.testing.assert_array_equal(client.embed_images(content), vector)  # to the last bit
    assert client.embed_images([]).shape == (0, 0)


@pytest.mark.slow
def test_texts_lie_in_the_space_of_images(client: Client, folder: Path, tmp_path: Path) -> None:
    spec = _spec(folder, "clip-texts")
    install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)
    sentences = [f"This is a photo of {label}." for label in LABELS]
    served = base.Served(spec, tmp_path, encoders.of(spec.task))
    (texts,) = served.answers("fp32", [[(sentence,) for sentence in sentences]], 3)
    with torch.inference_mode():
        scale = AutoModel.from_pretrained(folder / "clip").logit_scale.exp().item()
    scores = torch.from_numpy(client.embed_images(FILES[:4]) @ np.stack(texts).T * scale).softmax(-1)
    for row, labels in zip(scores, client.classify_images_zero_shot(FILES[:4], LABELS), strict=True):
        expected = [row[LABELS.index(label.label)] for label in labels]
        np.testing.assert_allclose([label.score for label in labels], expected, atol=TOLERANCE)


def test_every_door_gives_the_same(server: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(FILES[0])
    found = doors.answers(
        server,
        lambda client: client.classify_images([path, FILES[1]], top_k=2),
        lambda client: client.classify_images_zero_shot(str(path), LABELS),
        lambda client: client.embed_images([path, *FILES[1:]], batch_size=4),
    )
    assert [len(each) for each in found[0]] == [2, 2]
    assert sorted(label.label for label in found[1]) == sorted(LABELS)
    assert np.shape(found[2][1]) == (9, 24)


def test_large_files_go_in_requests_of_their_own(server: LocalServer) -> None:
    """A server's HTTP endpoint takes 4 MiB at once."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    large = pictures.encoded(Image.fromarray(noise))
    assert 2**20 < len(large) < 2**21
    with Client(server.http_url, timeout=60) as client:
        together = client.embed_images([large] * 5, batch_size=8)
    assert (together == together[0]).all()


def test_command_line(server: LocalServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a.jpg", "b.png")]
    for name, content in zip(names, FILES, strict=False):
        Path(name).write_bytes(content)
    at = ["--url", server.grpc_url]
    expected = client.classify_images(FILES[:2], top_k=2)
    assert cli.main(["classify-images", *names, "--top-k", "2", "--json", *at]) == 0
    assert [[each["label"] for each in row] for row in json.loads(capsys.readouterr().out)] == [
        [each.label for each in row] for row in expected
    ]
    assert cli.main(["classify-images", *names, *at]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [names[0], f"{expected[0][0].score:.4f}  {expected[0][0].label}"]
    assert cli.main(["zero-shot-images", names[0], "--label", "music", "--label", "rain", "--jsonl", *at]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["file"], [each["label"] for each in row["labels"]]) == (
        names[0],
        [each.label for each in client.classify_images_zero_shot(FILES[0], ["music", "rain"])],
    )
    assert cli.main(["embed-images", *names, "--json", *at]) == 0
    rows = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose([each["embedding"] for each in rows], client.embed_images(FILES[:2]), atol=1e-6)
    assert cli.main(["embed-images", names[0], "--model", "vit", *at]) == 1
    said = "trident: vit has another task than image-feature-extraction: it gives label, score, and no embedding\n"
    assert capsys.readouterr().err == said
    assert cli.main(["embed-images", names[0], str(tmp_path / "none.png"), *at]) == 2
    assert "none.png: No such file" in capsys.readouterr().err
    Path(names[1]).write_bytes(b"hello")
    assert cli.main(["classify-images", *names, *at]) == 1
    assert "image[1] is no PNG, JPEG or WebP image: it begins with b'hello'" in capsys.readouterr().err


BOMB = pictures.encoded(Image.new("1", (9000, 9000)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.classify_images([FILES[0], b""]), r"image\[1\] is empty: send the bytes of a file"),
        (lambda c: c.embed_images([FILES[0], FILES[1], FILES[2][:90]]), r"image\[2\] "),
        (lambda c: c.embed_images(FILES[0][:400]), "image can't be decoded: Truncated File Read"),
        (lambda c: c.classify_images(BOMB), "image is 9000 x 9000 pixels, the limit is 33554432 pixels"),
        (
            lambda c: c.classify_images(FILES[0], top_k=6),
            r"top_k must be between 1 and 5 \(the model's labels\), found 6",
        ),
        (lambda c: c.classify_images_zero_shot(FILES[0], []), "candidate_labels must hold between 1 and 32, found 0"),
        (lambda c: c.classify_images_zero_shot(FILES[0], ["a", " "]), r"candidate_labels\[1\] is empty: ' '"),
        (
            lambda c: c.classify_images_zero_shot([FILES[0]] * 33, ["a"], batch_size=40),
            "image must hold between 1 and 32",
        ),
        (lambda c: c.classify_images_zero_shot([FILES[0], b"x"], ["a"]), r"image\[1\] is no PNG, JPEG or WebP"),
        (
            lambda c: c.classify_images_zero_shot(FILES[0], ["a"], hypothesis_template="no place"),
            "hypothesis_template must have one {}, where the label goes, found 'no place'",
        ),
        (
            lambda c: c.classify_images_zero_shot(FILES[0], ["a", "long " * 30]),
            r"candidate_labels\[1\] has .* tokens, the model takes 77",
        ),
    ],
)
def test_bad_requests(client: Client, call: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        call(client)


def test_one_image_of_a_batch_does_not_fail_another_request(client: Client) -> None:
    expected = client.classify_images(FILES[0])
    with pytest.raises(InvalidRequestError, match=r"image\[0\]"):
        client.classify_images([b"x", FILES[0]])
    assert client.classify_images(FILES[0]) == expected
    with pytest.raises(NotFoundError, match="serves no model for image-segmentation|unknown model"):
        client.classify_images(FILES[0], model="nobody")


def test_requests_that_are_given_up_do_not_end_the_server(server: LocalServer, client: Client) -> None:
    """Triton 2.51 ends where a request is cancelled while two steps of an ensemble run."""
    expected = client.classify_images_zero_shot(FILES, LABELS, batch_size=9)
    began = time.monotonic()
    client.classify_images_zero_shot(FILES, LABELS, batch_size=9)
    once = time.monotonic() - began
    given_up = 0
    for number in range(150):
        try:
            client.classify_images_zero_shot(FILES, LABELS, batch_size=9, timeout=once * (0.2 + number % 15 / 10))
        except DeadlineExceededError:
            given_up += 1
    assert given_up > 30
    assert client.classify_images_zero_shot(FILES, LABELS, batch_size=9) == expected
    assert "tritonserver was ended" not in server.log.read_text()


@pytest.mark.slow
def test_what_two_towers_cost(folder: Path, server: LocalServer) -> None:
    spec, repository = _spec(folder, "clip"), folder / "repository"
    found = quality.cost(spec, "fp32", repository)
    graphs = [file for part in ("image", "text") for file in (repository / f"clip_model-{part}").rglob("*.onnx*")]
    assert found["size_mib"] == pytest.approx(sum(file.stat().st_size for file in graphs) / 2**20)
    assert found["images_s"] > 0


SLOW = ("deit", "siglip-images", "siglip-texts", "dinov2")


@pytest.mark.parametrize("name", some_slow(("beit", "siglip", *SLOW), SLOW))
def test_a_family_passes_its_gate(folder: Path, tmp_path: Path, name: str) -> None:
    """The gate compares pixels bit by bit, scores or vectors with Hugging Face, and images alone and together."""
    spec = _spec(folder, name, "fp32", *(["int8"] if name == "beit" else []))
    install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)
    every = tasks.evaluate(spec, HuggingFaceFolder(folder / name.partition("-")[0]), tmp_path)
    assert {variant: each["batch_effect"] for variant, each in every.items()} == dict.fromkeys(spec.variants, 0.0)
    measured = every["fp32"]
    assert measured.get("score_error", 0.0) < 1e-5
    assert measured.get("worst_cosine", 1.0) > 0.999999
    if name == "siglip":
        pipe = pipeline("zero-shot-image-classification", model=str(folder / name), device="cpu")
        scores = [each["score"] for each in pipe(_image(FILES[0]), candidate_labels=LABELS)]
        assert sum(scores) != pytest.approx(1)  # each label by itself


@pytest.mark.slow
def test_positions_of_another_size_are_interpolated(tmp_path: Path) -> None:
    """DINOv2's are for 518 by 518 pixels, and its image processor makes 224 by 224."""
    tiny_models.make_vision(tmp_path / "dinov2", "dinov2", image=48)
    install.export([_spec(tmp_path, "dinov2")], tmp_path / "r", tmp_path, tmp_path, lambda message: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": [0.4, 0.5, 0.5]}, "the served pixels of picture 0 differ from transformers' image processor by 0.2"),
        ({"resample": 3}, "the served pixels of picture 0 differ from transformers'"),
        ({"size": [33, 32]}, r"by its size, \(3, 33, 32\) for \(3, 32, 32\)"),
    ],
)
def test_the_gate_refuses_other_pixels(
    folder: Path, server: LocalServer, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "vit_preprocess" / VERSION / "image.json"
    file.parent.mkdir(parents=True)
    before = json.loads((folder / "repository" / "vit_preprocess" / VERSION / "image.json").read_text())
    file.write_text(json.dumps(before | change))
    with pytest.raises(FidelityError, match=said):
        tasks.evaluate(_spec(folder, "vit"), HuggingFaceFolder(folder / "vit"), tmp_path)


def test_a_damaged_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of one matmul three percent too large."""
    original = recipes.apply

    def damaged(recipe: Any, kind: Any, graph: Path, *more: Any) -> None:
        model = onnx.load(str(graph))
        tensor = next(t for t in model.graph.initializer if list(t.dims) == [32, 48])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.03), tensor.name))
        onnx.save(model, str(graph))
        original(recipe, kind, graph, *more)

    monkeypatch.setattr(recipes, "apply", damaged)
    with pytest.raises(FidelityError, match="score_error"):
        install.export([_spec(folder, "vit")], tmp_path, tmp_path, tmp_path, lambda message: None)


def test_tables_are_proposed(folder: Path) -> None:
    found = {
        name: add.propose(folder / name, {"path": str(folder / name)}).table for name in ("vit", "siglip", "dinov2")
    }
    size = {"height": tiny_models.IMAGE, "width": tiny_models.IMAGE}
    assert (found["vit"]["task"], found["vit"]["limits"]) == ("image-classification", {"labels": 5, **size})
    assert found["siglip"]["task"] == "zero-shot-image-classification"
    assert found["siglip"]["limits"] == {"dimensions": 32, "max_tokens": 64, **size}
    assert (found["dinov2"]["task"], found["dinov2"]["limits"]) == (
        "image-feature-extraction",
        {"dimensions": 32, **size},
    )


def test_limits_must_be_the_models(folder: Path) -> None:
    spec = _spec(folder, "vit")
    for change, said in (
        (
            {"height": 16},
            "limits.height and limits.width are 16 and 32, the model's image processor makes images of 32",
        ),
        ({"labels": 4}, "limits.labels is 4, the model has 5"),
    ):
        other = models_file.replace(spec, limits=models_file.replace(spec.limits, **change))
        with pytest.raises(ModelsFileError, match=said):
            tasks.check(other, HuggingFaceFolder(folder / "vit"))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("resnet", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}),
        ("swin", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}),
    ],
)
def test_models_that_can_not(tmp_path: Path, kind: str, sizes: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(kind, image_size=32, num_labels=5, **sizes)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedArchitecture, match="Trident serves vision transformers|the same patches"):
        install.export([_spec(tmp_path, "vit")], tmp_path / "r", tmp_path, tmp_path, lambda message: None)
