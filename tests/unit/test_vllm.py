"""Models that vLLM computes: tables, what vLLM is asked, and the worker's protocol, over a stand-in for vLLM itself."""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models, vllm_environments
from trident_client import _wire
from trident_export import configs, models_file
from trident_export.errors import ModelsFileError
from trident_serving.artefacts import VllmBuild
from trident_serving.errors import DeadlineExceeded, InvalidRequest, LoadError, Overloaded, ReadingError
from trident_serving.generation.answer import FinishReason
from trident_serving.generation.request import GenerationRequest
from trident_serving.generation.stream import Chunk
from trident_serving.guard.rules import Guard
from trident_serving.runtime.log_probabilities import TokenLogProbs
from trident_serving.runtime.metrics import Recorder
from trident_serving.runtime.sampling.defaults import GenerationDefaults
from trident_serving.runtime.sampling.grammars import Grammar, GrammarKind
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.watermark import Watermark
from trident_serving.schema.limits import VllmLimits
from trident_serving.schema.vllm import VllmSettings
from trident_serving.triton.guarding import guarded
from trident_serving.vllm import interpreter, translation
from trident_serving.vllm.engine import VllmAnswer, VllmEngine, WorkerError
from trident_serving.vllm.process import WorkerProcess
from trident_serving.vllm.service import VllmService, read_settings

TABLE: dict[str, Any] = {
    "task": "text-generation",
    "source": {"path": "x"},
    "engine": "vllm",
    "variants": ["bf16", "fp32"],
    "limits": {"context": 64, "slots": 4},
    "vllm": {"python": "/opt/vllm/bin/python", "tensor_parallel_size": 2, "hf_overrides": {"a": 1}},
}
OURS: dict[str, Any] = {
    "task": "text-generation",
    "source": {"path": "x"},
    "variants": ["fp32"],
    "limits": {},
}
PROMPT = (7, 8, 9)
FAILS, ENDS = 500, 501


def request(max_tokens: int = 4, prompt: tuple[int, ...] = PROMPT, **more: Any) -> GenerationRequest:
    """A request of tokens; fields of the sampling parameters go there."""
    names = SamplingParams.__dataclass_fields__
    sampling = {name: more.pop(name) for name in list(more) if name in names and name != "bad_words"}
    return GenerationRequest("", prompt, SamplingParams(max_tokens=max_tokens, **sampling), **more)


def asked(given: GenerationRequest, index: int = 0, eos: frozenset[int] = frozenset()) -> dict[str, Any]:
    return translation.message(given, index, translation.ends(given, eos))


def test_a_greedy_request() -> None:
    assert asked(request(min_tokens=2, top_p=0.5, seed=3, stop_token_ids=frozenset({5})), eos=frozenset({0})) == {
        "prompt": [7, 8, 9],
        "sampling": {
            "max_tokens": 4,
            "min_tokens": 2,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": [0, 5],
        },
    }


def test_a_sampled_request() -> None:
    given = request(
        temperature=0.75,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        seed=2**64 - 1,
        logit_bias=((3, -1.5), (4, 100.0)),
        bad_words=("cat",),
        return_log_probs=True,
        top_log_probs=2,
        prompt_log_probs=0,
        ignore_eos=True,
        answers=2,
    )
    first, second = (asked(given, index, frozenset({0}))["sampling"] for index in range(2))
    assert first == {
        "max_tokens": 4,
        "min_tokens": 0,
        "temperature": 0.75,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "seed": 2**64 - 1,
        "logit_bias": [[3, -1.5], [4, 100.0]],
        "bad_words": ["cat"],
        "logprobs": 2,
        "prompt_logprobs": 0,
        "stop_token_ids": [],
    }
    assert second["seed"] == 0  # as of our own engine
    assert "prompt_logprobs" not in second


def test_what_vllm_says_otherwise() -> None:
    assert asked(request(temperature=1.0, top_p=0.0, top_k=40))["sampling"]["top_k"] == 1
    assert asked(request(temperature=1.0, top_p=0.0))["sampling"]["top_p"] == 1.0
    assert asked(request(max_tokens=0, prompt_log_probs=1))["sampling"]["max_tokens"] == 1
    shortest = [
        asked(request(defaults=GenerationDefaults(min_length=length)))["sampling"]["min_tokens"]
        for length in (2, 5, 99)
    ]
    assert shortest == [0, 2, 4]


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar(GrammarKind.REGEX, "a+"), {"regex": "a+"}),
        (Grammar(GrammarKind.CHOICE, '["a", "b"]'), {"choice": ["a", "b"]}),
        (Grammar(GrammarKind.LARK, 'start: "a"'), {"grammar": 'start: "a"'}),
        (Grammar(GrammarKind.GBNF, 'root ::= "a"'), {"grammar": 'root ::= "a"'}),
    ],
)
def test_grammars(grammar: Grammar, expected: dict[str, Any]) -> None:
    given = request(grammar=grammar, ignore_eos=True)
    assert asked(given, eos=frozenset({0}))["grammar"] == expected
    assert asked(given, eos=frozenset({0}))["sampling"]["stop_token_ids"] == [0]  # where the grammar may end


def test_json_is_written_as_our_own_engine_writes_it() -> None:
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.loads(translation.grammar(Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}'))["json"])
    assert schema == {"type": "integer", "x-guidance": spaces}
    assert json.loads(translation.grammar(Grammar(GrammarKind.JSON))["json"]) == {
        "type": ["object", "array"],
        "x-guidance": spaces,
    }


def test_what_vllm_would_ignore_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"typical_p must be 1 for this model, found 0\.5: vLLM computes it"):
        translation.check(request(temperature=1.0, typical_p=0.5))
    with pytest.raises(InvalidRequest, match=r"temperature must be 0 or at least 0\.01 .* found 0\.005"):
        translation.check(request(temperature=0.005))
    with pytest.raises(InvalidRequest, match="watermarking_config is not for this model"):
        translation.check(request(watermark=Watermark.from_config({"bias": 2.0}, 512)))
    translation.check(request(typical_p=0.5))  # the likeliest token is what it is
    with pytest.raises(LoadError, match=r"generation_config\.json sets no_repeat_ngram_size, suppress_tokens, for"):
        translation.check_defaults(GenerationDefaults(no_repeat_ngram_size=2, suppress_tokens=(1,), top_k=3))
    translation.check_defaults(GenerationDefaults(temperature=0.6, top_p=0.9, repetition_penalty=1.1, min_length=3))


def test_a_table() -> None:
    spec = models_file.parse("m", TABLE)
    assert spec.limits == VllmLimits(context=64, slots=4)
    assert (spec.generation, spec.vllm_limits, spec.causal) == (None, spec.limits, spec.limits)
    assert [spec.public_name(variant) for variant in spec.variants] == ["m", "m_fp32"]
    assert [recipe.precision for recipe in spec.recipes.values()] == ["vllm_bf16", "vllm_fp32"]
    assert spec.as_dict()["engine"] == "vllm"
    plain = models_file.parse("m", OURS)
    assert not {"engine", "vllm"} & plain.as_dict().keys()  # so that what was exported before is still current


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tgi"}, "engine must be onnxruntime or vllm, found 'tgi'"),
        ({"variants": ["int8"]}, "variants must be different ones of fp32, bf16, fp16"),
        ({"limits": {"prefill_chunk": 8}}, "limits: unknown key prefill_chunk; known are context, slots"),
        ({"vllm": {"tensor_parallel": 2}}, "vllm: unknown key tensor_parallel; known are python, tensor_parallel_size"),
        ({"vllm": {"tensor_parallel_size": "2"}}, "vllm.tensor_parallel_size must be a positive integer, found '2'"),
        ({"vllm": {"gpu_memory_utilization": 1}}, "vllm.gpu_memory_utilization must be float, found 1"),
        ({"draft": "fp32"}, "draft is not for engine 'vllm', which has no graphs"),
        ({"adapters": {"a": "b"}, "processor": "amx"}, "adapters, processor is not for engine 'vllm'"),
        ({"task": "translation"}, "engine 'vllm' is for text-generation, the task is translation"),
        ({"engine": "onnxruntime", "variants": ["fp32"]}, 'vllm needs engine = "vllm"'),
    ],
)
def test_a_wrong_table(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelsFileError) as error:
        models_file.parse("m", TABLE | change)
    assert message in str(error.value)


def test_a_template_in_front_of_it(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        '[m]\ntask = "text-generation"\nengine = "vllm"\nsource = { path = "x" }\nvariants = ["fp32"]\nlimits = {}\n'
        '[s]\ntask = "summarization"\ngenerator = "m"\ntemplate = "{{ text_input }}"\n'
    )
    assert [spec.name for spec in models_file.load(tmp_path / "models.toml")] == ["m", "s"]


def test_the_config_carries_the_table() -> None:
    config = configs.build(models_file.parse("m", TABLE))["m"]
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert config.backend == "trident_vllm"
    settings = read_settings(parameters)
    assert settings.python == "/opt/vllm/bin/python"
    assert settings.arguments() == {"tensor_parallel_size": 2, "hf_overrides": {"a": 1}}
    with pytest.raises(ReadingError, match="parameter 'vllm': unknown key x"):
        read_settings({"vllm": '{"x": 1}'})
    ours = configs.build(models_file.parse("m", OURS))["m"]
    assert (ours.input, ours.output) == (config.input, config.output)  # the same public tensors


def test_what_the_engine_is_built_with() -> None:
    limits = VllmLimits(context=64, slots=4, kv_cache_mib=2, prefix_reuse=False)
    settings = VllmSettings(python="p", pipeline_parallel_size=2, enforce_eager=False)
    assert translation.engine_arguments(Path("/r/m/1"), limits, settings, VllmBuild("0", "bfloat16")) == {
        "model": "/r/m/1/huggingface",
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "max_logprobs": 20,
        "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm",
        "kv_cache_memory_bytes": 2 * 2**20,
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
    }


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_environments.stand_in(tmp_path_factory.mktemp("vllm"))


def test_which_interpreter(python: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], interpreter.ENVIRONMENT: str(python)}
    assert interpreter.find("/not/there", environment) == python
    assert interpreter.find(str(python), {"PATH": ""}) == python
    assert interpreter.version(python) == "0.0"
    with pytest.raises(
        LoadError, match="no Python '/not/there', which python of models.toml names for vLLM: install it"
    ):
        interpreter.find("/not/there", {"PATH": ""})
    with pytest.raises(LoadError, match="'/nor/this', which TRIDENT_VLLM_PYTHON names"):
        interpreter.find(str(python), environment | {interpreter.ENVIRONMENT: "/nor/this"})
    empty = tmp_path / "true"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(LoadError, match=f"{empty} has no vLLM: install it into an environment of its own"):
        interpreter.version(empty)
    with pytest.raises(LoadError, match=f"{tmp_path} can't be run"):
        interpreter.version(tmp_path)
    assert "PYTHONPATH" not in interpreter.clean({"PYTHONPATH": "x", "HOME": "y"})


class Heard:
    """A consumer that keeps what it is told."""

    def __init__(self, enough: int = 1000) -> None:
        self.cancelled = False
        self.tokens: list[int] = []
        self.log_probs: list[TokenLogProbs | None] = []
        self.prompt: list[TokenLogProbs] = []
        self.ended: queue.Queue[FinishReason | Exception] = queue.Queue()
        self._enough = enough

    def accept(self, token: int, log_probs: TokenLogProbs | None) -> bool:
        self.tokens.append(token)
        self.log_probs.append(log_probs)
        return len(self.tokens) >= self._enough

    def accept_prompt(self, log_probs: list[TokenLogProbs]) -> None:
        self.prompt += log_probs

    def finish(self, reason: FinishReason) -> None:
        self.ended.put(reason)

    def fail(self, error: Exception) -> None:
        self.ended.put(error)

    def end(self) -> FinishReason | Exception:
        return self.ended.get(timeout=20)


class Engine:
    """An engine over the stand-in, with the file that says what that was asked."""

    def __init__(self, python: Path, folder: Path, model: str = "m") -> None:
        self.log = folder / "asked"
        self.refuses = folder / "refuses"
        environment = dict(os.environ) | {
            "VLLM_STAND_IN_LOG": str(self.log),
            "VLLM_STAND_IN_REFUSES": str(self.refuses),
        }
        self.recorder = Recorder()
        self.engine = VllmEngine(
            partial(WorkerProcess, python, {"model": model}, 1, environment),
            slots=2,
            max_waiting=1,
            recorder=self.recorder,
        )

    def ask(self, given: GenerationRequest, consumer: Heard | None = None, ends: tuple[int, ...] = ()) -> Heard:
        heard = consumer or Heard()
        self.engine.submit(VllmAnswer(given, 0, heard, frozenset(ends)))
        return heard

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def engine(python: Path, tmp_path: Path) -> Iterator[Engine]:
    made = Engine(python, tmp_path)
    yield made
    made.engine.stop()


def eventually(what: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def test_answers_come_token_by_token(engine: Engine) -> None:
    first = engine.ask(request(5, return_log_probs=True, top_log_probs=2, prompt_log_probs=1))
    second = engine.ask(request(1000, (20, 21, 5, 22)), ends=(5,))
    third = engine.ask(request(1000), Heard(enough=4))
    assert (first.end(), first.tokens) == ("length", [7, 8, 9, 7, 8])
    assert first.log_probs[0] == TokenLogProbs(-0.5, ((7, -0.5), (0, -1.5)))
    assert first.prompt == [TokenLogProbs(-0.5, ((8, -0.5),)), TokenLogProbs(-0.5, ((9, -0.5),))]
    assert (second.end(), second.tokens) == ("stop", [20, 21, 5])
    assert (third.end(), third.tokens) == ("stop", [7, 8, 9, 7])  # its consumer had enough, so vLLM is told to stop
    eventually(lambda: [line for line in engine.lines() if "aborted" in line] == [{"aborted": "3"}])
    eventually(lambda: not engine.engine.busy)
    eventually(lambda: engine.engine.steps > 0)
    recorded = engine.recorder.drain()
    assert (recorded.counters["generated_tokens"], recorded.counters["prompt_tokens"]) == (12, 10)
    assert recorded.counters["prefix_hit_tokens"] == 6
    assert recorded.histograms["queue_time"] == [0.25] * 3
    assert len(recorded.histograms["request_duration"]) == 3
    gauges = {name: recorded.gauges[name] for name in ("slots", "kv_cache_tokens_limit", "requests_running")}
    assert gauges == {"slots": 2, "kv_cache_tokens_limit": 1024, "requests_running": 0}


def test_what_vllm_is_asked(engine: Engine) -> None:
    grammar = Grammar(GrammarKind.REGEX, "a+")
    engine.ask(request(2, temperature=1.0, seed=5, logit_bias=((3, -1.5),), bad_words=("cat",), grammar=grammar)).end()
    arguments, found = engine.lines()[:2]
    assert arguments == {"arguments": {"model": "m"}}
    assert found["grammar"] == {"json": None, "regex": "a+", "choice": None, "grammar": None}
    expected = {
        "seed": 5,
        "logit_bias": {"3": -1.5},
        "bad_words": ["cat"],
        "stop_token_ids": [0],  # the tokenizer's end, at which a grammar ends
        "ignore_eos": True,
    }
    assert {name: found["asked"][name] for name in expected} == expected


def test_one_request_fails_alone(engine: Engine) -> None:
    patient = engine.ask(request(20))
    refused = engine.ask(request(2, temperature=3.0))
    broken = engine.ask(request(2, (FAILS, 1)))
    assert str(refused.end()) == "vLLM: temperature must be in [0, 2], got 3.0."
    error = broken.end()
    assert isinstance(error, WorkerError)
    assert str(error) == "RuntimeError: a kernel failed"
    assert patient.end() == "length"


def test_cancelled_overdue_and_too_many(engine: Engine) -> None:
    gone, late = engine.ask(request(1000)), engine.ask(request(1000, timeout_seconds=0.3))
    third = engine.ask(request(1000))
    with pytest.raises(Overloaded, match="3 answers are generated or wait: try again later"):
        engine.ask(request())
    eventually(lambda: gone.tokens)
    gone.cancelled = True
    assert gone.end() == "cancelled"
    error = late.end()
    assert isinstance(error, DeadlineExceeded)
    assert str(error).startswith("the timeout of 0.3 s was over after ")
    third.cancelled = True
    assert third.end() == "cancelled"
    eventually(lambda: sum("aborted" in line for line in engine.lines()) == 3)
    assert engine.recorder.drain().counters["requests_cancelled"] == 2


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_worker_that_dies_comes_back(engine: Engine, ends_itself: bool) -> None:
    running = engine.ask(request(1000))
    eventually(lambda: running.tokens)
    before = engine.engine.worker_pid
    assert before is not None
    engine.refuses.touch()
    if ends_itself:
        engine.ask(request(2, (ENDS, 1)))
    else:
        os.kill(before, signal.SIGKILL)
    error = running.end()
    assert isinstance(error, Overloaded)
    assert str(error) == "vLLM's process was ended by SIGKILL before the answer was complete"
    with pytest.raises(Overloaded, match="vLLM has died and is being started again: try again later"):
        engine.ask(request())
    time.sleep(1.5)  # a start that fails is tried again
    engine.refuses.unlink()
    eventually(lambda: engine.engine.worker_pid not in (None, before))
    again = engine.ask(request(2))
    assert (again.end(), again.tokens) == ("length", [7, 8])
    assert engine.recorder.drain().counters["loop_restarts"] == 1


def test_the_end_of_an_engine(python: Path, tmp_path: Path) -> None:
    made = Engine(python, tmp_path)
    running = made.ask(request(1000))
    pid = made.engine.worker_pid
    assert pid is not None
    made.engine.stop()
    assert str(running.end()) == "the model was unloaded before the answer was complete"
    with pytest.raises(Overloaded, match="the model is being unloaded"):
        made.ask(request())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_model_that_vllm_refuses(python: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match="^vLLM can't serve this model: ValueError: there is no model missing; its log says more$"
    ):
        Engine(python, tmp_path, model="missing")
    ends_at_once = tmp_path / "python"
    ends_at_once.write_text("#!/bin/sh\nexit 3\n")
    ends_at_once.chmod(0o755)
    with pytest.raises(LoadError, match="its process ended with status 3; its log says more"):
        Engine(ends_at_once, tmp_path)


class Channel:
    """A client."""

    def __init__(self) -> None:
        self.chunks: queue.Queue[Chunk | Exception] = queue.Queue()

    def send(self, chunk: Chunk) -> None:
        self.chunks.put(chunk)

    def fail(self, error: Exception) -> None:
        self.chunks.put(error)

    def is_cancelled(self) -> bool:
        return False


@pytest.fixture(scope="module")
def service(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmService]:
    folder = tmp_path_factory.mktemp("service")
    tiny_models.byte_level_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    VllmBuild("0.0", "float32").write(folder)
    made = VllmService(folder, VllmLimits(context=64, slots=2, threads=1), VllmSettings(python=str(python)))
    yield made
    made.stop()


def test_a_guard_stands_before_it_too(service: VllmService) -> None:
    """By the adapters' own step, from the parameter of a config as it is written."""
    rules = [
        {"name": "animal", "action": "redact", "stages": ["output"], "pattern": "cat"},
        {"name": "dog", "action": "block", "stages": ["input"], "pattern": "dog"},
    ]
    config = {"parameters": {"guard": {"string_value": Guard.from_table("g", {"rules": rules}).as_json()}}}
    guarded_one = guarded(service, config, VllmLimits(context=64, slots=2), "")

    def answer(text: str) -> Chunk:
        channel = Channel()
        inputs: dict[str, Any] = {"text_input": _wire.texts([text])[None], "max_tokens": np.array([[12]])}
        guarded_one.submit(guarded_one.parse(inputs), channel)
        found = channel.chunks.get(timeout=20)
        assert isinstance(found, Chunk)
        return found

    assert "cat" not in answer("the cat").text
    assert answer("the cat").text.startswith("the [animal]the")
    assert answer("a dog").finish_reason == "content_filter"
    assert guarded(service, {}, VllmLimits(context=64), "") is service


def test_the_text_side_is_our_own(service: VllmService) -> None:
    def answer(**fields: Any) -> Chunk | Exception:
        tensors: dict[str, Any] = {
            name: _wire.texts([value] if isinstance(value, str) else value)[None]
            if isinstance(value, str | list)
            else np.array([[value]])
            for name, value in fields.items()
        }
        channel = Channel()
        service.submit(service.parse(tensors), channel)
        return channel.chunks.get(timeout=20)

    assert service.memory == "vLLM 0.0, float32, KV cache of 1024 tokens"
    found = answer(text_input="the cat", max_tokens=12)
    assert isinstance(found, Chunk)
    assert found.finish_reason == "length"
    assert found.text.startswith("the catthe cat")
    stopped = answer(text_input="the cat", max_tokens=40, stop_words=["cat"])
    assert isinstance(stopped, Chunk)
    assert (stopped.text, stopped.finish_reason) == ("the ", "stop")
    both = answer(text_input="the cat", max_tokens=2, n=2)
    assert isinstance(both, Chunk)
    assert [both.text, *(other.text for other in both.others)] == [found.text[: len(both.text)]] * 2
    with pytest.raises(InvalidRequest, match="typical_p must be 1"):
        answer(text_input="the cat", temperature=1.0, typical_p=0.5)
    refused = answer(text_input="the cat", max_tokens=2, guided_regex="(")
    assert isinstance(refused, InvalidRequest)
    assert str(refused).startswith("guided_regex is refused")  # before vLLM hears of it
