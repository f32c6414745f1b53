"""`int8_static`: calibrated from text, reproducible, served; bad calibration leaves what is installed alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from transformers import AutoModelForSequenceClassification

from tests import tiny_models
from tests.conftest import run_export
from trident_client import Client
from trident_export import corpora
from trident_export.tasks import text_generation
from trident_serving import artefacts
from trident_serving.launcher import local
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits

GRAPH = "mood_model_int8_static/1/model.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.make_reader(tmp_path / "mood", "bert", AutoModelForSequenceClassification, num_labels=3)
    write(tmp_path)
    return tmp_path


def write(folder: Path, calibration: str = "", variants: str = '"fp32", "int8_static"') -> None:
    line = f'calibration = "{calibration}"\n' if calibration else ""
    (folder / "models.toml").write_text(
        f'[mood]\ntask = "text-classification"\nsource = {{ path = "mood" }}\nvariants = [{variants}]\n{line}'
        "limits = { labels = 3, max_tokens = 96, threads = 1 }\n"
    )


def export(folder: Path, repository: str = "repository") -> tuple[int, str]:
    done = run_export("export", "--models-file", str(folder / "models.toml"), "--repository", str(folder / repository))
    return done.returncode, done.stderr


def test_it_is_calibrated_and_served(folder: Path) -> None:
    status, log = export(folder)
    assert status == 0, log
    assert "int8_static: passed" in log
    nodes = onnx.load(str(folder / "repository" / GRAPH), load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("QuantizeLinear") > 5
    assert "DynamicQuantizeLinear" not in kinds
    texts = ["the quick brown fox", "a lazy dog", "pack my box with five dozen jugs"]
    with local.running(folder / "repository", folder / "log") as server, Client(server.grpc_url) as client:
        exact = client.classify(texts, model="mood", top_k=3)
        found = client.classify(texts, model="mood_int8_static", top_k=3)
        alone = [client.classify(text, model="mood_int8_static", top_k=3) for text in texts]
    for expected, actual, single in zip(exact, found, alone, strict=True):
        scores = [{label.label: label.score for label in labels} for labels in (expected, actual, single)]
        assert scores[1] == scores[2]  # who shares the batch changes nothing
        assert max(abs(scores[0][label] - scores[1][label]) for label in scores[0]) < 0.1
        assert scores[0] != scores[1]


def test_the_same_text_gives_the_same_graph_and_another_another(folder: Path) -> None:
    (folder / "own.txt").write_text("\n\n".join(f"The {n}th text of my own." for n in range(30)))
    graphs = []
    for repository, calibration in (("one", "own.txt"), ("two", "own.txt"), ("three", "")):
        write(folder, calibration)
        status, log = export(folder, repository)
        assert status == 0, log
        graphs.append(onnx.load(str(folder / repository / GRAPH)))
    assert graphs[0] == graphs[1]
    assert graphs[0] != graphs[2]
    # Other text in the same file is another model.
    write(folder, "own.txt")
    before = (folder / "one" / GRAPH).read_bytes()
    (folder / "own.txt").write_text("SHORT!")
    status, log = export(folder, "one")
    assert status == 0, log
    assert (folder / "one" / GRAPH).read_bytes() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "own.txt has no text: it needs paragraphs, parted by blank lines"),
        (
            "學而時習之不亦說乎\n\nвоины и короли",
            "own.txt does not fit the tokenizer, which does not know what 2 of 2 texts",
        ),
        (None, "own.txt"),
    ],
)
def test_bad_calibration_leaves_what_is_installed(folder: Path, text: str | None, message: str) -> None:
    write(folder, variants='"fp32"')
    assert export(folder)[0] == 0
    before = {path: path.read_bytes() for path in (folder / "repository").rglob("*") if path.is_file()}
    write(folder, "own.txt")
    if text is not None:
        (folder / "own.txt").write_text(text)
    status, log = export(folder)
    assert status == 1
    import re

    assert re.search(message, log), log
    assert "Traceback" not in log
    assert "mood" in artefacts.read_failures(folder / "repository")
    (folder / "repository" / artefacts.FAILURES).unlink()
    after = {path: path.read_bytes() for path in (folder / "repository").rglob("*") if path.is_file()}
    assert after == before
    assert artefacts.loadable(folder / "repository") == sorted(
        ["mood", "mood_model", "mood_postprocess", "mood_tokenizer"]
    )


def test_a_recipe_that_fits_nothing_is_refused(folder: Path) -> None:
    recipe = '[{ pass = "per_token", nodes = "conv" }]'
    (folder / "recipes.toml").write_text(f'[odd]\nprecision = "int8"\nencoder = {recipe}\n')
    write(folder, variants='"fp32", "odd"')
    status, log = export(folder)
    assert status == 1
    assert "the recipe fits no matmul of this architecture; its matmuls are" in log
    assert np.all([name not in log for name in ("Traceback", "KeyError")])


def test_generators_with_a_chat_template_are_calibrated_with_chats_too(default_repository: Path) -> None:
    """A third of the texts come once more as a user's message, between tokens that are in no text."""
    job = SimpleNamespace(
        assets=default_repository / "smollm2/1",
        graphs=default_repository / "smollm2_fp32/1",
        spec=SimpleNamespace(calibration="", generation=GenerationLimits(), adapters={}),
    )
    feeds = list(text_generation.calibration_runs(job)(6, 0))  # type: ignore[arg-type]
    tokenizer = TextTokenizer.load(job.assets)
    texts = "".join(tokenizer.decode(feed["input_ids"][0].tolist()) for feed in feeds)
    drawn = corpora.calibration("", 6, 0)
    for index, text in enumerate(drawn):
        assert texts.count(text[:30]) == (2 if index % 3 == 0 else 1)
    (begin,) = tokenizer.encode("<|im_start|>")
    ids = [token for feed in feeds for token in feed["input_ids"][0].tolist()]
    assert ids.count(begin) == 3 * 2  # the system's message, the user's, and where the answer begins


def test_calibration_stays_within_a_context_that_is_shorter_than_its_texts(tmp_path: Path) -> None:
    source = tiny_models.make_causal(tmp_path / "llama", "llama", context=32)
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    entry = tiny_models.causal_entry(source, context=32, prefill_chunk=8)
    entry = entry.replace('variants = ["fp32"]', 'variants = ["fp32", "int8"]\ngates = { int8 = { top1 = 0.5 } }')
    (tmp_path / "models.toml").write_text(tiny_models.models_toml({"llama": entry}))
    status, log = export(tmp_path)
    assert status == 0, log
    assert "int8: passed" in log
