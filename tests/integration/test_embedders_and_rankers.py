"""Embedders and rankers of today through the real server, against sentence-transformers itself.

Folders are written by the installed sentence-transformers, and by hand as versions up to 5.3 wrote them. Tolerance:
float32 noise of two libraries through two layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    PretrainedConfig,
    Qwen3Config,
)

from tests import doors, tiny_models
from tests.conftest import post
from trident_client import Client, InvalidRequestError, cli
from trident_export import add, install, models_file
from trident_export.errors import ModelsFileError, UnsupportedModel
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5
TEXTS = ["cat", "The cat sat on the mat and looked at the RAIN", " two words\n", "a somewhat longer text " * 3]
PROMPTS = {"query": "query: ", "passage": "the passage: "}
# Models whose files have prompts, which their tables say.
PROMPTED = ("last-token", "bidirectional", "older", "splade", "ranker", "answering-ranker")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}<s>{{ m.content }}\n{% elif m.role == 'query' %}"
    "Query: {{ m.content }}\n{% elif m.role == 'document' %}Text: {{ m.content }}\n{% endif %}{% endfor %}Answer:"
)


def _decoder(folder: Path, config: PretrainedConfig, head: Any, *, ends: bool = True) -> Path:
    """A decoder whose tokenizer pads on the left and, as Qwen3-Embedding's does, ends each text."""
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.padding_side = "left"
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {tiny_models.EOS}", pair=f"$A $B {tiny_models.EOS}", special_tokens=[(tiny_models.EOS, 0)]
        )
    else:
        tokenizer.chat_template = TEMPLATE
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    model = head.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sizes(**more: Any) -> dict[str, Any]:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return shared | ids | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128} | more


def _saved(folder: Path, made: Any) -> dict[str, Any]:
    """Write a model of sentence-transformers over the folder that it was made from."""
    aside = folder.with_name(folder.name + "-saved")
    made.save_pretrained(str(aside))
    shutil.rmtree(folder)
    aside.rename(folder)
    return {}


def _older(folder: Path, pooling: dict[str, Any], *more: str, **files: Any) -> None:
    """The files that sentence-transformers up to 5.3 wrote."""
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *((f"{row}_{kind}", kind) for row, kind in enumerate(more, 2)),
    ]
    modules = [
        {"idx": row, "name": str(row), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for row, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def _make(folder: Path) -> dict[str, dict[str, Any]]:
    """The models, and their tables of models.toml."""
    tables: dict[str, dict[str, Any]] = {}

    def table(name: str, task: str, **limits: Any) -> Path:
        shared = {"max_tokens": 96, "buckets": [32], "threads": 1}
        source = {"path": str(folder / name)}
        tables[name] = {"task": task, "source": source, "variants": ["fp32"], "limits": shared | limits}
        if name in PROMPTED:
            tables[name]["prompts"] = True
        return folder / name

    def reader(path: Path, family: str, head: Any, **config: Any) -> Path:
        return tiny_models.make_reader(path, family, head, **config)

    path = _decoder(table("last-token", "feature-extraction", dimensions=32), Qwen3Config(**_sizes()), AutoModel)
    parts = [Transformer(str(path)), Pooling(32, "lasttoken"), Normalize()]
    _saved(path, SentenceTransformer(modules=parts, prompts={"query": "Instruct: x\nQuery:"}, device="cpu"))

    path = table("bidirectional", "feature-extraction", dimensions=24, matryoshka=[8, 16])
    kinds = ["sliding_attention", "full_attention"]
    gemma = Gemma3TextConfig(
        **_sizes(use_bidirectional_attention=True, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=16)
    )
    torch.manual_seed(1)
    _decoder(path, gemma, AutoModel)
    dense = Dense(32, 48, bias=False, activation_function=torch.nn.Identity()), Dense(48, 24, bias=False)
    parts = [Transformer(str(path)), Pooling(32, "mean"), *dense, Normalize()]
    _saved(path, SentenceTransformer(modules=parts, prompts=PROMPTS, default_prompt_name="query", device="cpu"))

    path = reader(table("layers", "feature-extraction", dimensions=20), "bert", AutoModel)
    modes = ("cls", "mean_sqrt_len_tokens", "weightedmean", "max", "mean")
    norm = LayerNorm(32 * len(modes))
    with torch.no_grad():
        norm.norm.weight.mul_(1.5)
        norm.norm.bias.add_(0.1)
    last = Dense(32 * len(modes), 20, activation_function=torch.nn.GELU(), use_residual=True)
    _saved(path, SentenceTransformer(modules=[Transformer(str(path)), Pooling(32, modes), norm, last], device="cpu"))

    path = reader(table("older", "feature-extraction", dimensions=64), "roberta", AutoModel)
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "include_prompt": False}
    config = {"prompts": PROMPTS, "default_prompt_name": "passage"}
    lower = {"max_seq_length": 96, "do_lower_case": True}
    _older(path, both, "Normalize", config_sentence_transformers=config, sentence_bert_config=lower)
    (path / "2_Normalize").mkdir()

    path = reader(table("truncated", "feature-extraction", dimensions=16), "bert", AutoModel)
    parts = [Transformer(str(path)), Pooling(32, "max"), Normalize()]
    _saved(path, SentenceTransformer(modules=parts, truncate_dim=16, device="cpu"))

    path = reader(table("splade", "sparse-embedding", dimensions=512), "bert", AutoModelForMaskedLM)
    parts = [Transformer(str(path), transformer_task="fill-mask"), SpladePooling("max")]
    _saved(path, SparseEncoder(modules=parts, prompts={"query": "query: "}, device="cpu"))

    path = reader(table("splade-sum", "sparse-embedding", dimensions=512), "distilbert", AutoModelForMaskedLM)
    parts = [Transformer(str(path), transformer_task="fill-mask"), SpladePooling("sum", "log1p_relu")]
    _saved(path, SparseEncoder(modules=parts, device="cpu"))

    path = reader(table("hybrid", "hybrid-embedding", dimensions=32), "xlm-roberta", AutoModel)
    _older(path, {"pooling_mode_cls_token": True}, "Normalize")
    torch.manual_seed(5)
    linear = torch.nn.Linear(32, 1)
    with torch.no_grad():
        linear.bias.add_(0.5)
    torch.save(linear.state_dict(), path / "sparse_linear.pt")

    head = AutoModelForSequenceClassification
    path = reader(table("ranker", "text-ranking", labels=1), "bert", head, num_labels=1)
    ranker = CrossEncoder(str(path), activation_fn=torch.nn.Identity(), prompts=PROMPTS, device="cpu")
    _saved(path, ranker)
    path = table("decoding-ranker", "text-ranking", labels=1)
    _decoder(path, Qwen3Config(**_sizes(num_labels=1)), head)
    path = table("answering-ranker", "text-ranking", labels=1)
    _decoder(path, Qwen3Config(**_sizes()), AutoModelForCausalLM, ends=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.convert_tokens_to_ids(["yes", "no"])
    parts = [Transformer(str(path), transformer_task="text-generation"), LogitScore(*ids)]
    prompts = {"web": "Find what answers.", "code": "Find code."}
    _saved(path, CrossEncoder(modules=parts, prompts=prompts, default_prompt_name="web", device="cpu"))
    return tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedders")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    specs = [models_file.parse(name, table) for name, table in _make(folder).items()]
    install.export(specs, folder / "repository", folder, folder / "cache", lambda message: None)
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("last-token", None),
        ("last-token", "query"),
        ("bidirectional", None),
        ("bidirectional", "passage"),
        ("layers", None),
        ("older", None),
        ("older", "query"),
        ("truncated", None),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(
    client: Client, folder: Path, name: str, prompt: str | None
) -> None:
    model = SentenceTransformer(str(folder / name), device="cpu")
    expected = np.stack([model.encode(text, prompt_name=prompt) for text in TEXTS])
    np.testing.assert_allclose(client.embed(TEXTS, model=name, prompt_name=prompt), expected, atol=TOLERANCE)
    alone = np.stack([client.embed(text, model=name, prompt_name=prompt) for text in TEXTS])
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE)


def test_shorter_embeddings_are_beginnings_of_length_one(client: Client, folder: Path) -> None:
    model = SentenceTransformer(str(folder / "bidirectional"), device="cpu")
    for size in (8, 16, 24):
        expected = model.encode(TEXTS, truncate_dim=size, normalize_embeddings=True)
        found = client.embed(TEXTS, model="bidirectional", dimensions=size)
        assert found.shape == (len(TEXTS), size)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.raises(InvalidRequestError, match="dimensions must be one of 8, 16, 24 .* found 12"):
        client.embed(TEXTS, model="bidirectional", dimensions=12)


def test_options_that_a_model_does_not_have_are_no_tensors_of_it(client: Client) -> None:
    for options in ({"dimensions": 10}, {"prompt_name": "query"}):
        (name,) = options
        with pytest.raises(InvalidRequestError, match=f"unexpected inference input '{name}'"):
            client.embed(TEXTS, model="layers", **options)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidRequestError, match="prompt_name 'other' is not known to this model; known: document, query"
    ):
        client.embed(TEXTS, model="last-token", prompt_name="other")


def test_a_table_says_whether_a_model_has_prompts(server: LocalServer, folder: Path, tmp_path: Path) -> None:
    table = {"task": "feature-extraction", "variants": ["fp32"], "limits": {"dimensions": 32, "max_tokens": 96}}

    def refused(name: str, **more: Any) -> str:
        spec = models_file.parse("x", table | {"source": {"path": str(folder / name)}} | more)
        with pytest.raises(ModelsFileError) as error:
            install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)
        return str(error.value)

    said = "[x] the model has prompts (query): set prompts = true, so that a request can name one, or prompts = {} to"
    assert refused("last-token").startswith(said)
    assert "prompts is true, and the model's files have none" in refused("hybrid", prompts=True)
    proposed = {name: add.propose(folder / name, {"path": str(folder / name)}) for name in ("last-token", "layers")}
    assert proposed["last-token"].table["prompts"] is True
    assert "prompts" not in proposed["layers"].table
    assert any(reason.startswith("prompts document, query: ") for reason in proposed["last-token"].reasons)


def test_a_list_of_texts_by_the_names_of_other_clients(server: LocalServer, client: Client) -> None:
    """As LiteLLM sends them."""
    for name in ("bidirectional", "layers"):
        given = {"name": "input_text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS}
        status, text = post(f"{server.http_url}/v2/models/{name}_texts/infer", {"inputs": [given]})
        (output,) = json.loads(text)["outputs"]
        assert (status, output["name"]) == (200, "embedding")
        expected = client.embed(TEXTS, model=name)
        np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), expected)


@pytest.mark.parametrize(
    ("size", "code", "said"),
    [
        (8, 200, '"shape":[1,8]'),
        (2**32 + 8, 400, "dimensions must be one of 8, 16, 24 for all texts of a request, found 4294967304"),
        (2**64 + 8, 500, "Unable to parse 'data'"),  # tritonserver's own answer, before any model is asked
        (float("nan"), 500, "Unable to parse 'data'"),
        (8.5, 500, "Unable to parse 'data'"),
    ],
)
def test_a_size_in_json_is_not_wrapped_around(server: LocalServer, size: float, code: int, said: str) -> None:
    text = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a cat"]}
    asked = {"name": "dimensions", "shape": [1, 1], "datatype": "INT64", "data": [size]}
    status, answer = post(f"{server.http_url}/v2/models/bidirectional/infer", {"inputs": [text, asked]})
    assert (status, said in answer) == (code, True), answer


@pytest.mark.parametrize(("name", "prompt"), [("splade", None), ("splade", "query"), ("splade-sum", None)])
def test_sparse_embeddings_are_those_of_sentence_transformers(
    client: Client, folder: Path, name: str, prompt: str | None
) -> None:
    model = SparseEncoder(str(folder / name), device="cpu")
    expected = model.encode(TEXTS, prompt_name=prompt, convert_to_sparse_tensor=False).numpy()
    found = client.embed_sparse(TEXTS, model=name, prompt_name=prompt)
    for row, vector in zip(expected, found, strict=True):
        assert list(vector.indices) == np.flatnonzero(row).tolist()
        np.testing.assert_allclose(vector.weights, row[list(vector.indices)], atol=1e-4)
    alone = client.embed_sparse(TEXTS[0], model=name, prompt_name=prompt)
    assert alone.indices == found[0].indices


def test_a_vector_and_weights_of_tokens_come_from_one_model(client: Client, folder: Path) -> None:
    """Weights as FlagEmbedding's `_process_token_weights` computes them of the linear layer."""
    path = folder / "hybrid"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    linear = torch.nn.Linear(32, 1)
    linear.load_state_dict(torch.load(path / "sparse_linear.pt"))
    dense, sparse = client.embed(TEXTS, model="hybrid"), client.embed_sparse(TEXTS, model="hybrid")
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for text, vector, weights in zip(TEXTS, dense, sparse, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0]
            values = linear(hidden).relu()[:, 0].tolist()
        np.testing.assert_allclose(vector, (hidden[0] / hidden[0].norm()).numpy(), atol=TOLERANCE)
        expected: dict[int, float] = {}
        for token, value in zip(batch["input_ids"][0].tolist(), values, strict=True):
            if value > 0 and token not in unused:
                expected[token] = max(value, expected.get(token, 0.0))
        assert expected
        assert list(weights.indices) == sorted(expected)
        np.testing.assert_allclose(weights.weights, [expected[token] for token in weights.indices], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("ranker", None),
        ("ranker", "query"),
        ("decoding-ranker", None),
        ("answering-ranker", None),
        ("answering-ranker", "code"),
    ],
)
def test_ranks_are_those_of_sentence_transformers(client: Client, folder: Path, name: str, prompt: str | None) -> None:
    model = CrossEncoder(str(folder / name), device="cpu")
    expected = [float(model.predict([("what sat?", text)], prompt_name=prompt)[0]) for text in TEXTS]
    ranked = client.rank("what sat?", TEXTS, model=name, prompt_name=prompt)
    assert len({round(score, 4) for score in expected}) > 1
    found = {row.index: row.score for row in ranked}
    np.testing.assert_allclose([found[row] for row in range(len(TEXTS))], expected, atol=TOLERANCE)
    for row, text in enumerate(TEXTS):
        (alone,) = client.rank("what sat?", [text], model=name, prompt_name=prompt)
        assert alone.score == pytest.approx(expected[row], abs=TOLERANCE)


def test_a_template_stays_whole_where_a_passage_is_cut(client: Client, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "answering-ranker")
    model = AutoModelForCausalLM.from_pretrained(folder / "answering-ranker").eval()
    passage = "the cat sat on the mat and looked at the rain " * 9
    with pytest.raises(InvalidRequestError, match="query with text_input has .* tokens, the model takes 96"):
        client.rank("what?", [passage], model="answering-ranker")
    (found,) = client.rank("what?", [passage], model="answering-ranker", truncate=True)
    before, after = "<s>Find what answers.\nQuery: what?\nText: ", "\nAnswer:"
    room = [
        tokenizer(before + passage[:end] + after, add_special_tokens=False).input_ids for end in range(len(passage))
    ]
    fits = max(row for row, ids in enumerate(room) if len(ids) <= 96)
    ids = tokenizer.convert_tokens_to_ids(["yes", "no"])
    near = []
    for end in range(fits - 8, fits + 1):  # where a token ends
        with torch.no_grad():
            logits = model(torch.tensor([room[end]])).logits[0, -1]
        near.append(torch.sigmoid(logits[ids[0]] - logits[ids[1]]).item())
    assert min(abs(found.score - score) for score in near) < TOLERANCE
    with pytest.raises(InvalidRequestError, match="text_input is empty"):
        client.rank("what?", [" "], model="answering-ranker")


def test_qwen3_rerankers_read_what_their_card_says(tmp_path: Path) -> None:
    """A folder without a chat template for pairs: the text of Qwen3-Reranker's model card, of other types none."""
    config = Qwen3Config(**_sizes(max_position_embeddings=512))
    path = _decoder(tmp_path / "qwen3", config, AutoModelForCausalLM)
    table = {"source": {"path": str(path)}, "task": "text-ranking", "variants": ["fp32"]}
    limits = {"labels": 1, "max_tokens": 512}
    spec = models_file.parse("card", table | {"limits": limits, "prompts": {"code": "Find code."}})
    install.export([spec], tmp_path / "repository", tmp_path, tmp_path / "cache", lambda message: None)
    before, between, after = json.loads((tmp_path / "repository/card_tokenizer/1/templates.json").read_text())["parts"][
        "Find code."
    ]
    card = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that"
    prefix = f'<|im_start|>system\n{card} the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert before == prefix + "<Instruct>: Find code.\n<Query>: "
    assert (between, after) == ("\n<Document>: ", suffix)
    other = json.loads((path / "config.json").read_text()) | {"model_type": "qwen2"}
    (path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UnsupportedModel, match="whose chat template has no place for the roles query and document"):
        install.export([spec], tmp_path / "repository", tmp_path, tmp_path / "cache", lambda message: None)


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("answering-ranker", {"labels": 2}, "limits.labels is 2, and a model that answers yes or no gives 1"),
        ("answering-ranker", {"labels": 1, "max_tokens": 40}, "limits.max_tokens is 40, and the template alone takes"),
        ("splade", {"dimensions": 30}, "limits.dimensions is 30, the model has 512 tokens"),
        ("bidirectional", {"dimensions": 32}, "limits.dimensions is 32, the model's is 24"),
    ],
)
def test_limits_that_are_not_the_models(
    server: LocalServer, folder: Path, tmp_path: Path, name: str, limits: dict[str, int], message: str
) -> None:
    task = {"answering-ranker": "text-ranking", "splade": "sparse-embedding"}.get(name, "feature-extraction")
    table = {"source": {"path": str(folder / name)}, "task": task, "variants": ["fp32"], "limits": limits}
    with pytest.raises(ModelsFileError, match=message):
        install.export([models_file.parse(name, table)], tmp_path, tmp_path, tmp_path, lambda message: None)


def test_command_line(server: LocalServer, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: str, *arguments: str) -> Any:
        assert cli.main([command, "--url", server.grpc_url, "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    (found,) = run("embed", "--model", "bidirectional", "--dimensions", "8", "--prompt-name", "passage", "a cat")
    expected = client.embed("a cat", model="bidirectional", dimensions=8, prompt_name="passage")
    np.testing.assert_allclose(found["embedding"], expected, atol=1e-6)
    (found,) = run("embed-sparse", "--model", "splade", "a cat")
    expected = client.embed_sparse("a cat", model="splade")
    assert tuple(found["indices"]) == expected.indices
    (found,) = run("rank", "--model", "ranker", "--query", "what?", "--prompt-name", "query", "a cat")
    (right,) = client.rank("what?", ["a cat"], model="ranker", prompt_name="query")
    assert found[0]["score"] == pytest.approx(right.score)


def test_both_clients_over_grpc_and_http(server: LocalServer) -> None:
    sparse, dense, ranked = doors.answers(
        server,
        lambda client: client.embed_sparse(TEXTS, model="splade", batch_size=2),
        lambda client: client.embed(TEXTS, model="bidirectional", dimensions=8, prompt_name="passage"),
        lambda client: client.rank("a cat", TEXTS, model="answering-ranker", prompt_name="code"),
    )
    assert all(len(vector.indices) == len(vector.weights) > 0 for vector in sparse)
    assert [len(row) for row in dense[1]] == [8] * len(TEXTS)
    assert sorted(each.index for each in ranked) == list(range(len(TEXTS)))
