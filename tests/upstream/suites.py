"""Which of Triton's tests are run, with which models, and what is known of those that fail or don't apply."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.upstream import models
from trident_serving import artefacts

Prepare = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Suite:
    """A file of tests and the server that it gets.

    Attributes:
        folder: in the checkout.
        file: in it.
        prepare: makes the models; it gets the folder in the checkout and an empty repository.
        environment: of the server.
        test_environment: of the tests.
        administrator: the tests' clients send the server's admin key.
        openai: the tests ask the gateway, and not Triton.
        seconds: that all its tests may take.
        edits: patterns and what replaces them in the test file, beside the ports.
        left: tests that are not run, or beginnings of their names, and why they do not apply.
        faults: tests that fail, and whose fault that is.
    """

    folder: str
    file: str
    prepare: Prepare
    environment: Mapping[str, str] = field(default_factory=dict)
    test_environment: Mapping[str, str] = field(default_factory=dict)
    administrator: bool = False
    openai: bool = False
    seconds: float = 180.0
    edits: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.folder.removeprefix('qa/')}/{self.file}"


# Faults that several tests share: whose it is, and why.
EXPLICIT = "the test's: it wants a server that lists its repository again and again; the launcher loads models by name"
NO_GPU = "needs a GPU"
HEADERS = "needs --grpc-header-forward-pattern: the launcher forwards no header to a model"
KEYED_INFERENCE = (
    "needs a server whose inference or metadata asks for a key; the gateway asks for keys, Triton does not"
)
SECOND_LOOK = "reads the log of a server at --log-verbose=1, which the launcher does not set"

OPENAI_400 = "the test's: an invalid request is 400 with OpenAI, as here; FastAPI's 422 is Triton's frontend's own"
WIDER = "the test's: it wants a refusal of what we serve"
BOTH_LENGTHS = "the test's: max_tokens and max_completion_tokens that differ are refused here"
GREEDY = "the test's: it wants sampling where no temperature is named; SmolLM2 is greedy then, whatever the seed"
LINE_BREAK = "the test's: the model's first token is a line break, which it strips"
ZERO = "the test's: with logprobs 0 the chosen tokens have theirs here; it wants none"
ONE_MODEL = "the test's: it wants one model; a first start has several variants"
LENGTH = "the test's: it wants the model to end by itself"
WORDS = "the test's: it wants vLLM's words; ours say the same"
FORM = "the test's: it reads FastAPI's form of an error; ours has OpenAI's"

CHAT_MODEL = "smollm2"
FUZZ_CASES = 300  # of each URL; the whole set takes an hour


def _validation(folder: Path, repository: Path) -> None:
    _copies("models")(folder, repository)
    waits = "dynamic_batching { max_queue_delay_microseconds: 1000000 }"
    models.identity(repository, "pt_identity", dims=(8,), more=waits)
    models.add_sub(repository, "graphdef_object_int32_int32", "STRING", "INT32")


def _slow(milliseconds: int) -> Prepare:
    def prepare(folder: Path, repository: Path) -> None:
        models.slow(repository, "custom_identity_int32", milliseconds, type_="INT32", batch=1024)

    return prepare


def _schedulers(folder: Path, repository: Path) -> None:
    sequence = "sequence_batching {{ {} max_sequence_idle_microseconds: 6000000 }}"
    models.slow(
        repository, "dynamic_batch", 6000, batch=2, more="dynamic_batching { max_queue_delay_microseconds: 600000 }"
    )
    models.slow(repository, "sequence_direct", 6000, more=sequence.format("direct { }"))
    models.slow(repository, "sequence_oldest", 6000, more=sequence.format("oldest { max_candidate_sequences: 1 }"))
    models.twice(repository, "ensemble_model", "dynamic_batch")


def _simple(count: int) -> Prepare:
    def prepare(folder: Path, repository: Path) -> None:
        models.add_sub(repository, "simple", "INT32", "INT32")
        for number in range(1, count):
            models.identity(repository, f"other_{number}")

    return prepare


def _raw(folder: Path, repository: Path) -> None:
    queue = "default_queue_policy { max_queue_size: 1 }"
    waits = f"dynamic_batching {{ max_queue_delay_microseconds: 1000000 preferred_batch_size: [ 8 ] {queue} }}"
    models.identity(repository, "onnx_zero_1_float32")
    models.identity(repository, "onnx_zero_1_float32_queue", more=waits)
    models.identity(repository, "onnx_zero_1_object", "STRING")
    models.identity(repository, "onnx_zero_1_object_1_element", "STRING", (1,))
    models.identity(repository, "onnx_zero_1_float16", "FP16", (-1, -1))
    models.identity(repository, "onnx_zero_3_float32", count=3)


def _copies(name: str) -> Prepare:
    def prepare(folder: Path, repository: Path) -> None:
        for each in (folder / name).iterdir():
            models.copy(each, repository)

    return prepare


def _nobatch(folder: Path, repository: Path) -> None:
    models.add_sub(repository, "graphdef_int32_int8_int8", "INT32", "INT8")
    models.add_sub(repository, "graphdef_nobatch_int32_int8_int8", "INT32", "INT8", batch=0)


def _scalars(folder: Path, repository: Path) -> None:
    models.scalar(repository, "onnx_scalar_1dim", (1,))
    models.scalar(repository, "onnx_scalar_2dim", (1, 1))


def _chat_model(folder: Path, repository: Path) -> None:
    """SmolLM2, as a first start has it, and nothing else."""
    exported = Path(os.environ.get("REPOSITORY") or ROOT / "model_repository").resolve()
    if CHAT_MODEL not in artefacts.loadable(exported):
        raise FileNotFoundError(f"{exported} has no {CHAT_MODEL}: run make export")
    for model in exported.glob(f"{CHAT_MODEL}*"):
        (repository / model.name).symlink_to(model, target_is_directory=True)


SUITES = (
    Suite(
        "qa/L0_input_validation",
        "input_validation_test.py",
        _validation,
        left={"test_wrong_input_shape_tensor_size": "needs TensorRT"},
    ),
    Suite(
        "qa/L0_request_cancellation",
        "grpc_cancellation_test.py",
        _slow(10_000),
        left={"test_grpc_async_infer_cancellation_at_step_start": SECOND_LOOK},
    ),
    Suite("qa/L0_request_cancellation", "scheduler_test.py", _schedulers),
    Suite("qa/L0_client_timeout", "client_infer_timeout_test.py", _slow(3_000)),
    Suite(
        "qa/L0_client_timeout",
        "client_non_infer_timeout_test.py",
        _slow(3_000),
        environment={"TRITONSERVER_SERVER_DELAY_GRPC_RESPONSE_SEC": "2"},
        administrator=True,
        seconds=300,
        # A Python model takes longer to load than the C++ one.
        edits={r"NORMAL_INTERVAL = 5\.0": "NORMAL_INTERVAL = 20.0"},
        left={"test_grpc_register_cuda_shared_memory": NO_GPU},
    ),
    Suite(
        "qa/L0_grpc",
        "python_grpc_aio_test.py",
        _simple(8),
        administrator=True,
        faults={"test_load_model": EXPLICIT, "test_unload_model": EXPLICIT},
    ),
    Suite(
        "qa/L0_grpc",
        "python_unit_test.py",
        _simple(1),
        left={
            "test_model_repository": KEYED_INFERENCE,
            "test_health": KEYED_INFERENCE,
            "test_infer": KEYED_INFERENCE,
            "test_stream_infer": KEYED_INFERENCE,
        },
    ),
    Suite("qa/L0_http", "http_test.py", _raw),
    Suite("qa/L0_http", "generate_endpoint_test.py", _copies("generate_models")),
    Suite(
        "qa/L0_http",
        "python_http_aio_test.py",
        _simple(7),
        administrator=True,
        faults={"test_load_model": EXPLICIT, "test_unload_model": EXPLICIT},
    ),
    Suite(
        "qa/L0_http",
        "http_restricted_api_test.py",
        _simple(1),
        left={
            "test_model_repository": KEYED_INFERENCE,
            "test_metadata": KEYED_INFERENCE,
            "test_infer": KEYED_INFERENCE,
        },
    ),
    Suite(
        "qa/L0_http_fuzz",
        "fuzztest.py",
        _simple(1),
        seconds=1500,
        edits={r"fuzz_loggers=logger,": f"fuzz_loggers=logger, index_end={FUZZ_CASES},"},
    ),
    Suite(
        "qa/L0_parameters",
        "parameters_test.py",
        _copies("model_repository"),
        test_environment={"TEST_HEADER": "test_params"},
    ),
    Suite("qa/L0_nan_inf", "nan_inf_test.py", _copies("models")),
    Suite("qa/L0_client_nobatch", "client_test.py", _nobatch),
    Suite("qa/L0_scalar_io", "scalar_test.py", _scalars),
    Suite(
        "python/openai/tests",
        "test_chat_completions.py",
        _chat_model,
        openai=True,
        seconds=600,
        left={"TestChatCompletionsTokenizers": "starts Triton's own frontend in its process"},
        faults={
            "test_chat_completions_sampling_parameters[logit_bias-param_value11]": WIDER,
            "test_chat_completions_invalid_sampling_parameters": OPENAI_400,
            "test_chat_completions_invalid_sampling_parameters[temperature-2.1]": WIDER,
            "test_chat_completions_max_completion_tokens_precedence": BOTH_LENGTHS,
            "test_chat_completions_seed": GREEDY,
            "test_chat_completions_no_message": OPENAI_400,
            "test_chat_completions_empty_message": OPENAI_400,
            "test_chat_completions_multiple_choices": WIDER,
            "test_chat_completions_top_logprobs_without_logprobs": FORM,
            "test_chat_completions_top_logprobs_validation": OPENAI_400,
        },
    ),
    Suite(
        "python/openai/tests",
        "test_completions.py",
        _chat_model,
        openai=True,
        seconds=600,
        faults={
            "test_completions_sampling_parameters[logit_bias-value7]": WIDER,
            "test_completions_max_tokens": LINE_BREAK,
            "test_completions_seed": GREEDY,
            "test_completions_invalid_sampling_parameters": OPENAI_400,
            "test_completions_invalid_sampling_parameters[temperature-2.1]": WIDER,
            "test_completions_empty_request": OPENAI_400,
            "test_completions_no_model": OPENAI_400,
            "test_completions_no_prompt": OPENAI_400,
            "test_no_prompt": OPENAI_400,
            "test_completions_multiple_choices": WIDER,
            "test_completions_multiple_choices[sampling_parameter_dict1]": FORM,
            "test_completions_multiple_choices[sampling_parameter_dict3]": FORM,
            "test_completions_logprobs_zero": ZERO,
            "test_completions_logprobs_validation": WIDER,
        },
    ),
    Suite(
        "python/openai/tests",
        "test_openai_client.py",
        _chat_model,
        openai=True,
        seconds=600,
        # Tokens that are ready together go out together, so that two runs have different numbers of chunks.
        edits={r"assert len\(chunks_true\) == len\(chunks_false\) \+ 1": "assert len(chunks_true) > 1"},
        faults={
            "test_openai_client_models": ONE_MODEL,
            "test_openai_client_completion": LENGTH,
            "test_stream_options_without_streaming": WORDS,
            "test_top_logprobs_requires_logprobs": WORDS,
            "test_chat_top_logprobs_exceeds_max": OPENAI_400,
            "test_completion_logprobs_exceeds_max": WIDER,
        },
    ),
)

# Files of the same folders that are not run at all.
NOT_RUN = {
    "L0_request_cancellation/implicit_state_test.py": "needs the PyTorch backend",
    "L0_grpc/grpc_client_plugin_test.py": HEADERS,
    "L0_grpc/grpc_basic_auth_test.py": "needs nginx, and tests its key",
    "L0_http/http_basic_auth_test.py": "needs nginx, and tests its key",
    "L0_http/http_client_plugin_test.py": "asks no server: it tests tritonclient against stand-ins of its parts",
    "L0_parameters/parameters_test.py with TEST_HEADER=test_headers and the like": HEADERS,
    "L0_large_payload": "needs more than ten gigabytes for tensors of three",
}
