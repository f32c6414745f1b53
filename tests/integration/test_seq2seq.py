"""Encoder-decoder models of every family against transformers' `generate`, in process and through the real server.

Random weights, the family's own tokenizer class. Many texts decode together, greedy and by beams; every token must be
that of transformers with the same arguments, one text at a time, and each log-probability within 1e-4.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from tests import doors, tiny_models
from tests.conftest import post, runs_slow_tests, some_slow, triton_request
from trident_client import Client, DeadlineExceededError, InvalidRequestError, UnavailableError, cli
from trident_export import corpora, install, models_file
from trident_export.errors import FidelityError
from trident_export.graphs import editing
from trident_export.graphs.seq2seq import export_decoder, export_encoder
from trident_serving import artefacts
from trident_serving.artefacts import VERSION
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer
from trident_serving.seq2seq.decoder import Row, Seq2SeqDecoder
from trident_serving.seq2seq.engine import Engine, Job
from trident_serving.seq2seq.rules import Rules
from trident_serving.seq2seq.search import Found, SearchParams

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = tiny_models.SEQ2SEQ
SLOW = {"mt5", "mbart"}  # T5 and MBart-50 compute the same
MAX_TOKENS = 24
LIMITS = {"max_source_tokens": 96, "max_target_tokens": 40, "slots": 24, "threads": 1, "max_waiting": 64}
# Settings of the families' generation configs in addition to the required ones.
GENERATION: dict[str, dict[str, Any]] = {
    "bart": {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 6, "length_penalty": 2.0, "early_stopping": True},
    "pegasus": {"num_beams": 3, "length_penalty": 0.6, "max_length": 23},
    "t5": {"repetition_penalty": 1.3},
    "mbart": {"num_beams": 2, "early_stopping": "never"},
}


def _table(folder: Path, family: str) -> dict[str, Any]:
    kind = "summarization" if family in ("bart", "pegasus") else "translation"
    return {"task": kind, "source": {"path": str(folder / family)}, "variants": ["fp32"], "limits": LIMITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("seq2seq")
    specs = []
    for seed, family in enumerate(FAMILIES):
        if family in SLOW and not runs_slow_tests(request.config):
            continue
        tiny_models.make_seq2seq(path / family, family, seed, **GENERATION.get(family, {}))
        specs.append(models_file.parse(family, _table(path, family)))
    install.export(specs, path / "repository", path, path / "cache", lambda message: None)
    return path


@pytest.fixture(scope="module")
def seq2seq_server(folder: Path) -> Iterator[LocalServer]:
    with local.running(folder / "repository", folder / "log") as running:
        yield running


@pytest.fixture
def connected(seq2seq_server: LocalServer) -> Iterator[Client]:
    with Client(seq2seq_server.grpc_url, timeout=60) as client:
        yield client


LENGTHS: dict[str, set[int]] = {}
TEXTS = [text.encode()[: 12 + 7 * row % 60].decode(errors="ignore") for row, text in enumerate(corpora.held_out())][:16]


class Waiter:
    """A consumer that a test can wait for."""

    def __init__(self) -> None:
        self.cancelled = False
        self.done = threading.Event()
        self.result: Found | None = None
        self.error: Exception | None = None

    def finish(self, found: Found | None) -> None:
        self.result = found
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def wait(self) -> Found:
        assert self.done.wait(60)
        assert self.error is None, self.error
        assert self.result is not None
        return self.result


def run_together(folder: Path, family: str, jobs: list[tuple[list[int], SearchParams, tuple[int, ...]]]) -> list[Found]:
    """All at once, in the graphs of the served model."""
    decoder = Seq2SeqDecoder(folder / "repository" / family / VERSION, slots=24, capacity=40, threads=1)
    engine = Engine(decoder, 64)
    waiters = [Waiter() for _ in jobs]
    try:
        engine.submit([Job(ids, prompt, params, w) for (ids, params, prompt), w in zip(jobs, waiters, strict=True)])
        return [waiter.wait() for waiter in waiters]
    finally:
        engine.stop()


def rules_of(model: Any, max_tokens: int, **more: Any) -> Rules:
    """The rules of a Hugging Face generation config."""
    config = model.generation_config
    return Rules(
        max_length=1 + max_tokens,
        min_length=more.pop("min_length", config.min_length or 0),
        eos_token_ids=(config.eos_token_id,),
        bad_words=tuple(map(tuple, config.bad_words_ids or ())),
        forced_bos_token_id=config.forced_bos_token_id,
        forced_eos_token_ids=() if config.forced_eos_token_id is None else (config.forced_eos_token_id,),
        repetition_penalty=more.pop("repetition_penalty", config.repetition_penalty or 1.0),
        no_repeat_ngram_size=more.pop("no_repeat_ngram_size", config.no_repeat_ngram_size or 0),
        **more,
    )


SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 1, "no_repeat_ngram_size": 2, "repetition_penalty": 1.7},
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3, "min_length": 8},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 0.3, "early_stopping": "never", "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("family", some_slow(FAMILIES, SLOW))
def test_every_token_is_that_of_generate(folder: Path, family: str) -> None:
    """Greedy and by beams, all texts and all searches in one batch."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / family).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    prompt = (model.generation_config.decoder_start_token_id,)
    jobs, expected = [], []
    for row, text in enumerate(TEXTS):
        for search in (SEARCHES[row % 2], SEARCHES[2 + row % 4]):
            ids = tokenizer(text).input_ids
            general = dict(search)
            rest = {
                name: general.pop(name) for name in ("num_beams", "length_penalty", "early_stopping") if name in general
            }
            jobs.append((ids, SearchParams(rules_of(model, MAX_TOKENS, **general), **rest), prompt))
            chosen = {"length_penalty": 1.0, "early_stopping": False, **search}
            with torch.inference_mode():
                expected.append(
                    model.generate(
                        torch.tensor([ids]),
                        max_new_tokens=MAX_TOKENS,
                        do_sample=False,
                        return_dict_in_generate=True,
                        output_scores=True,
                        output_logits=True,
                        **chosen,
                    )
                )
    found = run_together(folder, family, jobs)
    lengths = set()
    for (_, params, _), wanted, given_ in zip(jobs, expected, found, strict=True):
        tokens = wanted.sequences[0, 1:].tolist()
        assert list(given_.tokens) == tokens
        lengths.add(len(tokens))
        if params.num_beams > 1:
            assert given_.score == pytest.approx(wanted.sequences_scores.item(), rel=1e-5, abs=1e-4)
            steps = model.compute_transition_scores(wanted.sequences, wanted.scores, wanted.beam_indices)[0]
            np.testing.assert_allclose(given_.log_probs, steps[: len(tokens)], atol=1e-4)
        else:
            logits = torch.stack(wanted.logits, 1)[0].log_softmax(-1)
            chosen_log_probs = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            np.testing.assert_allclose(given_.log_probs, chosen_log_probs, atol=1e-4)
    LENGTHS[family] = lengths


@pytest.mark.parametrize("family", ["bart", "t5", "marian"])
def test_texts_are_encoded_together_and_their_numbers_are_those_of_texts_alone(folder: Path, family: str) -> None:
    """What answers read of a text, to the last bit; runs of the encoder are counted."""
    decoder = Seq2SeqDecoder(folder / "repository" / family / VERSION, slots=8, capacity=40, threads=1)
    random = np.random.default_rng(4)
    texts = {
        number: random.integers(5, 200, length).tolist() for number, length in enumerate((1, 3, 90, 17, 64, 65, 2))
    }
    encoder, runs = decoder._encoder, []

    class Counted:
        def run(self, names: Any, feeds: Any) -> Any:
            runs.append(feeds["attention_mask"].sum(axis=1).tolist())
            return encoder.run(names, feeds)

    decoder._encoder = Counted()
    assert decoder.encode_all(texts) == {}
    assert runs == [[1], [2, 3, 17, 64, 65, 90]]  # a row alone is summed otherwise
    rows = [Row(number, 7, 0) for number in texts]
    together = decoder.run(rows).copy()
    for number in texts:
        decoder.remove(number)
    for number, ids in texts.items():
        decoder.encode(number, ids)
        np.testing.assert_array_equal(decoder.run([Row(number, 7, 0)] * 2)[0], together[number])
        decoder.remove(number)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_both_graphs_share_the_table_of_embeddings(tmp_path: Path, family: str) -> None:
    """Large enough to be shared; the decoder's own file has the rest, and its numbers are the same."""
    heads = {"d_kv": 16, "num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    config = AutoConfig.for_model(family, vocab_size=9000, d_model=32, **layers, **heads)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    export_encoder(model, tmp_path / "encoder.onnx")
    export_decoder(model, tmp_path / "decoder.onnx", 8)
    before = (tmp_path / "decoder.onnx.data").stat().st_size
    decoder = Seq2SeqDecoder(tmp_path, slots=2, capacity=8, threads=1)
    decoder.encode(0, [5, 6, 7])
    expected = decoder.run([Row(0, 7, 0)]).copy()
    assert editing.share_weights(tmp_path / "encoder.onnx", tmp_path / "decoder.onnx") == 9000 * 32 * 4
    assert before - (tmp_path / "decoder.onnx.data").stat().st_size == pytest.approx(9000 * 32 * 4, abs=2**16)
    assert editing.share_weights(tmp_path / "encoder.onnx", tmp_path / "decoder.onnx") > 0  # it can be done again
    decoder = Seq2SeqDecoder(tmp_path, slots=2, capacity=8, threads=1)
    decoder.encode(0, [5, 6, 7])
    np.testing.assert_array_equal(decoder.run([Row(0, 7, 0)]), expected)


def test_answers_ended_at_different_times() -> None:
    """Some of the answers above ended before the others, and released their slots."""
    assert sum(len(lengths) > 2 for lengths in LENGTHS.values()) >= len(FAMILIES) // 2


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_answers_do_not_depend_on_the_batch(folder: Path, data: st.DataObject) -> None:
    """To the last bit: log-probabilities one by one and in random batches are the same numbers."""
    family = data.draw(st.sampled_from(["bart", "t5", "marian"]))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / family)
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    prompt = (model.generation_config.decoder_start_token_id,)
    jobs = []
    for _ in range(data.draw(st.integers(2, 10))):
        ids = tokenizer(data.draw(st.sampled_from(corpora.held_out())), truncation=True, max_length=90).input_ids
        ids = ids[: data.draw(st.integers(1, len(ids)))]
        params = SearchParams(rules_of(model, data.draw(st.integers(1, 30))), num_beams=data.draw(st.integers(1, 5)))
        jobs.append((ids, params, prompt))
    together = run_together(folder, family, jobs)
    for job, found in zip(jobs, together, strict=True):
        assert run_together(folder, family, [job]) == [found]


@pytest.mark.parametrize("family", some_slow(FAMILIES, SLOW))
def test_served_texts_are_those_of_the_pipeline(connected: Client, folder: Path, family: str) -> None:
    """With the model's own generation config, sent at once by many callers."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / family).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    limit = (model.generation_config.max_length - 1) if family == "pegasus" else 40
    expected = []
    for text in TEXTS:
        with torch.inference_mode():
            ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=limit)[0]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    options = {} if family == "pegasus" else {"max_tokens": 40}
    found = connected.translate(TEXTS, model=family, **options)
    assert [item.text for item in found] == expected
    assert all(item.finish_reason in ("stop", "length") for item in found)
    assert all(item.num_output_tokens == len(item.log_probs) > 0 for item in found)


def test_a_summary_is_what_generate_gives(connected: Client, folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "bart")
    with torch.inference_mode():
        ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), max_new_tokens=30)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert connected.summarize(TEXTS[0], model="bart", max_tokens=30).text == expected


def test_languages(connected: Client, folder: Path) -> None:
    """Source and target by request, as transformers' tokenizers and `forced_bos_token_id` do it."""
    for family, source, target in (
        ("nllb", "deu_Latn", "fra_Latn"),
        ("m2m100", "de", "fr"),
        ("mbart50", "de_DE", "fr_XX"),
    ):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / family).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / family)
        tokenizer.src_lang = source
        token = tokenizer.get_lang_id(target) if family == "m2m100" else tokenizer.convert_tokens_to_ids(target)
        batch = tokenizer(TEXTS[1], return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**batch, forced_bos_token_id=token, max_new_tokens=20)[0]
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = connected.translate(TEXTS[1], model=family, source_lang=source, target_lang=target, max_tokens=20)
        assert found.text == expected
        assert found.text != connected.translate(TEXTS[1], model=family, max_tokens=20).text
    # Marian: in the text, or as a field.
    tokenizer = AutoTokenizer.from_pretrained(folder / "marian")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "marian").eval()
    with torch.inference_mode():
        ids = model.generate(**tokenizer(">>fra<< " + TEXTS[1], return_tensors="pt"), max_new_tokens=20)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for text, options in ((">>fra<< " + TEXTS[1], {}), (TEXTS[1], {"target_lang": "fra"})):
        assert connected.translate(text, model="marian", max_tokens=20, **options).text == expected


LONG = "\n".join(corpora.held_out()[:4])


def test_long_texts_by_policy(connected: Client, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r'the model reads 96: shorten it, or set long_input to "truncate"'):
        connected.translate(LONG, model="bart")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bart")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart").eval()
    with torch.inference_mode():
        batch = tokenizer(LONG, truncation=True, max_length=96, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=12)[0]
    cut = connected.translate(LONG, model="bart", long_input="truncate", max_tokens=12)
    assert cut.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert cut.num_input_tokens == 96
    parts = connected.translate(LONG, model="bart", long_input="window", max_tokens=12)
    assert len(parts.scores) > 4
    whole = len(tokenizer(LONG, add_special_tokens=False).input_ids)
    assert parts.num_input_tokens >= whole + 2 * len(parts.scores)
    short = "One sentence here. And a second one."
    assert connected.translate(short, model="bart", long_input="window") == connected.translate(short, model="bart")


def test_sampling_is_reproducible(connected: Client) -> None:
    def sample(seed: int) -> str:
        return connected.translate(TEXTS[2], model="marian", temperature=1.5, random_seed=seed, max_tokens=30).text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(sample, [1, 2, 3, 4] * 4))
    assert answers == answers[:4] * 4
    assert len(set(answers)) > 1
    greedy = connected.translate(TEXTS[2], model="marian", max_tokens=30, num_beams=1)
    assert connected.translate(TEXTS[2], model="marian", max_tokens=30, temperature=1.5, top_k=1).text == greedy.text


@pytest.mark.parametrize(
    ("model", "text", "options", "message"),
    [
        ("bart", "hi", {"num_beams": 0}, "num_beams must be between 1 and 8, found 0"),
        ("bart", "hi", {"num_beams": 1000}, "num_beams must be between 1 and 8, found 1000"),
        ("bart", "", {}, "text_input is empty"),
        ("marian", "\N{SNOWMAN} \N{SNOWMAN}", {}, "holds no token that the model's vocabulary knows"),
        ("t5", "\N{SNOWMAN}", {}, "holds no token that the model's vocabulary knows"),
        ("bart", "hi", {"max_tokens": 41}, "max_tokens must be between 1 and 40, found 41"),
        ("bart", "hi", {"max_tokens": 5, "min_tokens": 6}, "min_tokens must be between 0 and 5"),
        ("bart", "hi", {"temperature": -1.0}, "temperature must be between 0 and 100"),
        ("bart", "hi", {"temperature": 1.0}, "temperature 1 needs num_beams 1, found 4"),
        ("bart", "hi", {"length_penalty": 1e9}, "length_penalty must be between -10 and 10"),
        ("bart", "hi", {"length_penalty": float("nan")}, "length_penalty must be between"),
        ("bart", "hi", {"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and at most 100, found 0"),
        ("bart", "hi", {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be between 0"),
        ("bart", "hi", {"long_input": "cut"}, "long_input must be one of error, truncate, window, found 'cut'"),
        ("bart", "hi", {"target_lang": "de"}, "target_lang 'de' is not known to this model; known: it has no choice"),
        ("nllb", "hi", {"target_lang": "xx"}, r"target_lang 'xx' is not known to this model; known: .* and \d+ more"),
        ("nllb", "hi", {"source_lang": "xx"}, "source_lang 'xx' is not known"),
        ("marian", ">>xxx<< hi", {}, "target_lang 'xxx' is not known to this model; known: deu, fra"),
        (
            "marian",
            "hi",
            {"source_lang": "deu"},
            "source_lang 'deu' is not known to this model; known: it has no choice",
        ),
    ],
)
def test_bad_requests(connected: Client, model: str, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        connected.translate(text, model=model, **options)
    assert connected.translate("still there", model=model, max_tokens=4).num_output_tokens > 0


def test_http(seq2seq_server: LocalServer, connected: Client) -> None:
    """Both of Triton's HTTP endpoints."""
    expected = connected.translate(TEXTS[0], model="marian", num_beams=3, max_tokens=10).text
    body: dict[str, Any] = {"text_input": TEXTS[0], "num_beams": 3, "max_tokens": 10}
    status, answer = post(f"{seq2seq_server.http_url}/v2/models/marian/generate", body)
    assert status == 200
    assert expected in answer or expected.encode("ascii", "backslashreplace").decode() in answer
    status, answer = post(f"{seq2seq_server.http_url}/v2/models/marian/generate", body | {"num_beams": 99})
    assert status == 400
    assert "num_beams must be between 1 and 8, found 99" in answer


def test_command_line(seq2seq_server: LocalServer, connected: Client, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--url", seq2seq_server.grpc_url, "--max-tokens", "12"]
    expected = connected.translate(TEXTS[1], model="nllb", target_lang="fra_Latn", max_tokens=12, num_beams=2)
    arguments = ["--model", "nllb", "--target-lang", "fra_Latn", "--num-beams", "2", "--json", TEXTS[1]]
    assert cli.main(["translate", *common, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected.text
    assert cli.main(["summarize", *common, "--model", "bart", TEXTS[1]]) == 0
    assert capsys.readouterr().out == connected.summarize(TEXTS[1], model="bart", max_tokens=12).text + "\n"


def test_cancellation_reaches_the_decoder(seq2seq_server: LocalServer, connected: Client) -> None:
    """A cancelled call frees its slots: many calls that would fill the queue for long are gone at once."""
    import grpc

    from trident_client import _wire

    channel = grpc.insecure_channel(seq2seq_server.grpc_url)
    from tritonclient.grpc import service_pb2_grpc

    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    inputs = {
        "text_input": _wire.texts([TEXTS[3]])[None],
        "max_tokens": np.array([[40]], np.int32),
        "min_tokens": np.array([[40]], np.int32),
        "num_beams": np.array([[8]], np.int32),
    }
    request = triton_request("t5", inputs)
    alone = time.monotonic()
    stub.ModelInfer(request)
    alone = time.monotonic() - alone
    calls = [stub.ModelInfer.future(request) for _ in range(60)]
    time.sleep(2 * alone)
    for call in calls:
        call.cancel()
    started = time.monotonic()
    connected.translate(TEXTS[3], model="t5", max_tokens=2, num_beams=8)
    waited = time.monotonic() - started
    # Sixty answers of three at a time would take twenty times as long as one.
    assert waited < 6 * alone + 0.5
    channel.close()


def test_deadline_and_full_queue(connected: Client) -> None:
    slow = {"model": "mbart50", "max_tokens": 40, "min_tokens": 40, "num_beams": 8}
    with pytest.raises(DeadlineExceededError):
        connected.translate(TEXTS[4], timeout=0.003, **slow)

    def ask(_: int) -> str:
        try:
            return connected.translate(TEXTS[4], **slow).finish_reason
        except UnavailableError as error:
            return str(error)

    with ThreadPoolExecutor(120) as pool:
        answers = list(pool.map(ask, range(120)))
    refused = [answer for answer in answers if answer not in ("stop", "length")]
    assert all("the queue is full: 64 of 64 texts wait already" in answer for answer in refused)
    assert len(refused) < 120
    assert connected.translate(TEXTS[4], model="mbart50", max_tokens=2).num_output_tokens <= 2


def test_damaged_graphs_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions off by one, and texts that see each other's padding."""
    spec = models_file.parse("bart", _table(folder, "bart"))
    with monkeypatch.context() as patch:
        from trident_export.graphs import seq2seq as seq2seq_graph

        table = seq2seq_graph._position_table
        patch.setattr(seq2seq_graph, "_position_table", lambda model, capacity: table(model, capacity).roll(1, 0))
        with pytest.raises(FidelityError, match="kl is|Hugging Face's generate with the folder's settings gives"):
            install.export([spec], tmp_path / "one", tmp_path, tmp_path, lambda message: None)
    with monkeypatch.context() as patch:
        from trident_serving.seq2seq import decoder

        patch.setattr(decoder, "_MASKED", np.float32(0.0))
        with pytest.raises(
            FidelityError, match="kl is|batch_effect is|Hugging Face's generate with the folder's settings gives"
        ):
            install.export([spec], tmp_path / "two", tmp_path, tmp_path, lambda message: None)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_variants_do_not_depend_on_the_batch(folder: Path, tmp_path: Path, variant: str) -> None:
    """Random weights are no measure of what rounding costs; that no bit depends on the batch holds for them too."""
    gates = {variant: {"kl": 20.0, "top1": 0.0}}
    spec = models_file.parse("bart", _table(folder, "bart") | {"variants": [variant], "gates": gates})
    install.export([spec], tmp_path / "repository", tmp_path, tmp_path, lambda message: None)
    manifest = artefacts.read_manifest(tmp_path / "repository", "bart")
    assert manifest is not None
    assert manifest.fidelity[variant]["batch_effect"] == 0.0
    assert manifest.fidelity[variant]["kl"] > 1e-6


def test_limits_that_are_not_the_models(folder: Path, tmp_path: Path) -> None:
    table = _table(folder, "bart")
    spec = models_file.parse("bart", table | {"limits": LIMITS | {"max_source_tokens": 129}})
    with pytest.raises(ValueError, match="limits.max_source_tokens is 129, the model was built for 128 positions"):
        install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)
    spec = models_file.parse("nllb", _table(folder, "nllb") | {"target_lang": "xx"})
    with pytest.raises(ValueError, match="target_lang is 'xx', the model knows"):
        install.export([spec], tmp_path, tmp_path, tmp_path, lambda message: None)


def test_both_clients_over_grpc_and_http(seq2seq_server: LocalServer) -> None:
    found = doors.answers(
        seq2seq_server,
        lambda client: client.translate(TEXTS, model="t5", max_tokens=12),
        lambda client: client.translate(TEXTS[0], model="t5", temperature=1.5, random_seed=2**50, max_tokens=12),
        lambda client: client.summarize(TEXTS[:3], model="bart", num_beams=3, long_input="window"),
    )
    assert len({answer.text for answer in found[0]}) > 4
    assert found[1].num_output_tokens > 0
    assert all(len(answer.scores) == 1 for answer in found[2])
