"""The client against an in-process gRPC server that is built on the real service definition."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

import trident_client
from trident_client import (
    CancelledError,
    Client,
    DeadlineExceededError,
    Generation,
    Health,
    InvalidRequestError,
    ModelStatus,
    NotFoundError,
    ServerError,
    ToolCall,
    UnavailableError,
    _generation,
    _grpc_channel,
    _tasks,
    _wire,
    cli,
)
from trident_client._errors import from_status
from trident_client._files import content_of
from trident_client._grpc import channel_options
from trident_serving.launcher import local

# The public models that the service shows, with their tasks.
TASKS = {
    "smollm2": "text-generation",
    "minilm": "feature-extraction",
    "sst2": "text-classification",
    "ner": "token-classification",
    "answer": "question-answering",
    "reranker": "text-ranking",
    "fill-mask": "fill-mask",
    "de-en": "translation",
    "en-de": "translation",
}


def called() -> Iterator[Any]:
    """Calls of tools in three responses."""
    parts: list[list[dict[str, Any]]] = [
        [{"index": 0, "id": "id0", "type": "function", "function": {"name": "weather", "arguments": ""}}],
        [
            {"index": 0, "function": {"arguments": '{"city": "Zü'}},
            {"index": 1, "id": "id1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
        [{"index": 0, "function": {"arguments": 'rich"}'}}],
    ]
    for index, (reasoning, calls) in enumerate(zip("abc", parts, strict=True)):
        more = {"reasoning": reasoning, "tool_calls": json.dumps(calls, ensure_ascii=False)}
        yield chunk("", "stop" if index == 2 else "", index + 1, **more)


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with the words of the prompt; some prompts make it fail."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        self.left = threading.Event()
        self.whole = threading.Event()
        self.asked = 0

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        # This header ends tritonserver 2.51 with a segmentation fault after some hundreds of errors.
        assert "triton_grpc_error" not in dict(context.invocation_metadata())
        request = next(requests)
        tensors = decode(request)
        self.requests.append(tensors)
        text = tensors.get("text_input", tensors.get("messages")).item().decode()
        if request.model_name == "unknown":
            yield pb.ModelStreamInferResponse(error_message="no such model")
            return
        if text == "refuse":
            yield pb.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: top_p must be above 0")
            return
        if text == "refuse, and end later":  # as a server does: the end is a message of its own
            context.add_callback(self.left.set)
            yield pb.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: top_p must be above 0")
            if not self.left.wait(0.2):
                self.whole.set()
            return
        if text == "refuse, and never end":
            context.add_callback(self.left.set)
            yield pb.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: top_p must be above 0")
            self.left.wait(20)
            return
        if text == "full":
            yield pb.ModelStreamInferResponse(error_message="UNAVAILABLE: the queue holds no more")
            return
        if text == "refused by triton":
            yield pb.ModelStreamInferResponse(error_message="unexpected shape")
            return
        if text == "endless":
            context.add_callback(self.cancelled.set)
            while context.is_active():
                yield chunk("more ", "", 1)
                time.sleep(0.01)
            return
        if "tools" in tensors:
            yield from called()
            return
        words = text.split(" ")
        texts = [f"{word} " for word in words] if tensors["stream"].item() else [" ".join(words)]
        for index, text in enumerate(texts):
            yield chunk(text, "stop" if index == len(texts) - 1 else "", index + 1, [-0.5])

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        tensors = decode(request)
        self.requests.append(tensors)
        texts = [text.decode() for text in tensors["text_input"].reshape(-1)]
        codes = {"slow": None, "full": grpc.StatusCode.UNAVAILABLE, "broken": grpc.StatusCode.INTERNAL}
        if texts[0] == "slow":
            time.sleep(1)
        elif texts[0] in codes:
            context.abort(codes[texts[0]], texts[0])
        vectors = np.array([[len(text), 1.0] for text in texts], np.float32)
        return response({"embedding": vectors})

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.name == "unknown":
            context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'unknown' is not found")
        return pb.ModelMetadataResponse(name=request.name)

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        index = pb.RepositoryIndexResponse()
        index.models.add(name="b", version="1", state="READY")
        index.models.add(name="a", version="1", state="UNAVAILABLE", reason="broken")
        index.models.add(name=".trident")
        return index

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        answer = pb.ModelConfigResponse()
        answer.config.name = request.name
        if request.name == "forced":
            answer.config.parameters["unverified"].string_value = "kl is 1"
        answer.config.parameters["task"].string_value = TASKS.get(request.name, "")
        return answer

    def ModelStatistics(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.asked += 1
        names = [*TASKS, "smollm2_fp32", "minilm_model", "other-people-s"]
        return pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(name=name) for name in names])

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=False)


def decode(request: Any) -> dict[str, Any]:
    outputs = [
        pb.ModelInferResponse.InferOutputTensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in request.inputs
    ]
    return _wire.parse_response(pb.ModelInferResponse(outputs=outputs, raw_output_contents=request.raw_input_contents))


def response(tensors: dict[str, Any]) -> Any:
    request = _wire.build_request("m", tensors)
    answer = pb.ModelInferResponse(model_name="m", raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return answer


def chunk(text: str, reason: str, count: int, log_probs: list[float] | None = None, **texts: str) -> Any:
    tensors = {
        "text_output": _wire.texts([text])[None],
        "finish_reason": _wire.texts([reason])[None],
        "num_input_tokens": np.array([[7]], np.int32),
        "num_output_tokens": np.array([[count]], np.int32),
        "output_log_probs": np.array([log_probs or []], np.float32),
        **{name: _wire.texts([value])[None] for name, value in texts.items()},
    }
    return pb.ModelStreamInferResponse(infer_response=response(tensors))


@pytest.fixture
def served() -> Iterator[tuple[str, Service]]:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", service
    server.stop(0).wait()


@pytest.fixture
def connected(served: tuple[str, Service]) -> Iterator[Client]:
    with Client(served[0]) as client:
        yield client


def test_exported_names() -> None:
    assert trident_client.__all__ == sorted(trident_client.__all__)
    assert set(trident_client.__all__) == {
        "TLS",
        "Answer",
        "AsyncClient",
        "Attribution",
        "CancelledError",
        "Client",
        "DeadlineExceededError",
        "Entity",
        "Explanation",
        "ExplanationOptions",
        "Filling",
        "Finding",
        "ForbiddenError",
        "Generation",
        "GenerationChunk",
        "GenerationOptions",
        "Health",
        "ImagePart",
        "InvalidRequestError",
        "Label",
        "Message",
        "ModelStatus",
        "NotFoundError",
        "OverloadedError",
        "Ranked",
        "Segment",
        "SparseVector",
        "ServerError",
        "TextPart",
        "ToolCall",
        "Transcription",
        "TranscriptionChunk",
        "TranscriptionOptions",
        "Translation",
        "TranslationOptions",
        "TridentError",
        "UnavailableError",
    }


def test_calls_of_tools_are_typed(connected: Client, served: tuple[str, Service]) -> None:
    """What a stream brings in parts is one call; the answer goes back as a message."""
    tool = {"type": "function", "function": {"name": "weather"}}
    answer = connected.chat("call", tools=[tool], tool_choice="auto", chat_template_kwargs={"enable_thinking": False})
    chunks = list(connected.stream([{"role": "user", "content": "call"}], tools=[tool], return_reasoning=True))
    sent = served[1].requests[-2]
    assert json.loads(sent["tools"].item()) == [tool]
    assert sent["tool_choice"].item() == b"auto"
    assert json.loads(sent["chat_template_kwargs"].item()) == {"enable_thinking": False}
    assert [chunk.tool_calls for chunk in chunks] == [
        (ToolCall(0, "id0", "weather", ""),),
        (ToolCall(0, "", "", '{"city": "Zü'), ToolCall(1, "id1", "now", "{}")),
        (ToolCall(0, "", "", 'rich"}'),),
    ]
    assert answer.tool_calls == (ToolCall(0, "id0", "weather", '{"city": "Zürich"}'), ToolCall(1, "id1", "now", "{}"))
    assert answer.tool_calls[0].parsed() == {"city": "Zürich"}
    assert answer.reasoning == "abc"
    assert answer.message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "abc",
        "tool_calls": [
            {"id": "id0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
            {"id": "id1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }
    assert Generation("hi", "stop", 1, 1).message == {"role": "assistant", "content": "hi"}
    with pytest.raises(ValueError, match="tools has no form in JSON"):
        connected.chat("call", tools=[{"name": {1, 2}}])


def test_generate(connected: Client, served: tuple[str, Service]) -> None:
    answer = connected.generate("one two", max_tokens=5, temperature=0.5, random_seed=2**63, stop_words=["x", "é"])
    assert answer == Generation("one two", "stop", 7, 1, (-0.5,))
    sent = served[1].requests[-1]
    assert sent["max_tokens"].dtype == np.int32
    assert sent["random_seed"].item() == 2**63
    assert sent["temperature"].shape == (1, 1)
    assert sent["stop_words"].tolist() == [[b"x", "é".encode()]]
    assert not sent["stream"].item()
    assert "top_p" not in sent


def test_unknown_options_are_not_dropped(connected: Client) -> None:
    with pytest.raises(TypeError, match="unknown option 'max_token'; known are max_tokens, min_tokens"):
        connected.generate("x", max_token=5)
    with pytest.raises(TypeError, match="unknown option"):
        connected.stream("x", beams=5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _tasks.embed("a", None, None, None, cast("bool", "yes"), 1),
        lambda: _tasks.classify_zero_shot("a", ["b"], None, cast("bool", "yes"), None, None, 1),
        lambda: _tasks.answer("a", "b", 1, None, None, cast("bool", "yes")),
    ],
)
def test_a_yes_or_no_is_one(call: Any) -> None:
    with pytest.raises(ValueError, match="must be true or false, found 'yes'"):
        call()


def test_numbers_that_do_not_fit_are_not_wrapped_around(connected: Client) -> None:
    with pytest.raises(ValueError, match=r"max_tokens must be between -2147483648 and 2147483647, found 4294967301"):
        connected.generate("x", max_tokens=2**32 + 5)
    with pytest.raises(ValueError, match=r"random_seed must be between 0 and 18446744073709551615, found -1"):
        connected.generate("x", random_seed=-1)
    with pytest.raises(ValueError, match=r"dimensions must be between .* and 9223372036854775807, found 1844"):
        connected.embed(["a"], model="minilm", dimensions=2**64 + 8)
    with pytest.raises(ValueError, match="temperature is a number too large"):
        connected.generate("x", temperature=10**400)


def test_tokens_may_be_numpy_s() -> None:
    for given in (np.array([3, 5]), [np.int64(3), 5], (3, 5)):
        inputs = _generation.prompt(given, None, {}).inputs  # type: ignore[arg-type]
        assert inputs["input_ids"].tolist() == [[3, 5]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dimensions": 8.9}, r"dimensions must be a whole number, found 8\.9"),
        ({"dimensions": "16"}, "dimensions must be a whole number, found '16'"),
        ({"prompt_name": 5}, "a text must be str, found 5"),
        ({"prompt_name": "a\ud800"}, r"a text must be UTF-8, found '\\ud800' at character 1"),
    ],
)
def test_values_of_another_kind_are_not_turned_into_one(connected: Client, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connected.embed(["a"], model="minilm", **given)


def test_stream(connected: Client) -> None:
    chunks = list(connected.stream("one two three"))
    assert [chunk.text for chunk in chunks] == ["one ", "two ", "three "]
    assert [chunk.finish_reason for chunk in chunks] == ["", "", "stop"]


def test_chat(connected: Client, served: tuple[str, Service]) -> None:
    connected.chat("hi é")
    assert json.loads(served[1].requests[-1]["messages"].item()) == [{"role": "user", "content": "hi é"}]
    messages: list[trident_client.Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    connected.chat(messages)
    assert json.loads(served[1].requests[-1]["messages"].item()) == messages
    list(connected.stream(messages))
    assert json.loads(served[1].requests[-1]["messages"].item()) == messages


def test_closing_a_stream_cancels_it(connected: Client, served: tuple[str, Service]) -> None:
    stream = connected.stream("endless")
    assert next(stream).text == "more "
    stream.close()  # type: ignore[attr-defined]
    assert served[1].cancelled.wait(5)


def test_a_stream_is_read_to_its_end_behind_an_error(
    connected: Client, served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is cancelled between an error and its end may stay in tritonserver for ever, with its model."""
    with pytest.raises(InvalidRequestError, match="top_p must be above 0"):
        connected.generate("refuse, and end later")
    assert served[1].whole.wait(5)
    served[1].left.clear()
    monkeypatch.setattr(_grpc_channel, "END_SECONDS", 0.1)
    with pytest.raises(InvalidRequestError, match="top_p must be above 0"):
        connected.generate("refuse, and never end")
    assert served[1].left.wait(5)


def test_embed(connected: Client, served: tuple[str, Service]) -> None:
    np.testing.assert_array_equal(connected.embed(["a", "bb", "ccc"], batch_size=2), [[1, 1], [2, 1], [3, 1]])
    assert sorted(len(request["text_input"]) for request in served[1].requests) == [1, 2]
    np.testing.assert_array_equal(connected.embed("four", truncate=True), [4, 1])
    assert served[1].requests[-1]["truncate"].tolist() == [[True]]
    assert connected.embed([]).shape == (0, 0)


def test_models_and_health(connected: Client) -> None:
    assert connected.models() == [
        ModelStatus("a", "1", "UNAVAILABLE", "broken"),
        ModelStatus("b", "1", "READY", ""),
    ]
    assert connected.health() == Health(live=True, ready=False)
    assert [connected.unverified(name) for name in ("b", "forced")] == ["", "kl is 1"]


def test_errors_by_status_code(connected: Client) -> None:
    with pytest.raises(InvalidRequestError, match="top_p must be above 0"):
        connected.generate("refuse")
    with pytest.raises(InvalidRequestError, match="unexpected shape"):
        connected.generate("refused by triton")
    with pytest.raises(NotFoundError, match="unknown model"):
        connected.generate("x", model="unknown")
    with pytest.raises(UnavailableError, match="^the queue holds no more$"):
        connected.generate("full")
    with pytest.raises(UnavailableError, match="full"):
        connected.embed("full")
    with pytest.raises(ServerError, match="broken"):
        connected.embed("broken")
    with pytest.raises(InvalidRequestError, match="^the model generates text or transcribes speech, and "):
        raise from_status(400, "HTTP end point doesn't support models with decoupled transaction policy")
    for said, name in (
        ("unexpected inference input 'images' for model 'gen'", "the model 'gen'"),
        ("parameter 'images' has invalid type. It should be either 'int', 'bool', or 'string'.", "this model"),
    ):
        with pytest.raises(InvalidRequestError, match=f"^{name} reads no images: leave them out, or ask a vision-lang"):
            raise from_status(400, said)
    for seconds in ("300", "1e-05", "0.043492"):  # a recording's, a translation's, and a template task's
        assert (
            type(from_status(503, f"the timeout of {seconds} s was over after 0 of 9 seconds")) is DeadlineExceededError
        )
    assert type(from_status(503, "the timeout was over before all was answered")) is DeadlineExceededError
    with pytest.raises(DeadlineExceededError):
        connected.embed("slow", timeout=0.1)
    with pytest.raises(DeadlineExceededError):
        list(connected.stream("endless", timeout=0.1))
    stream = connected.stream("endless")
    next(stream)
    connected.close()
    with pytest.raises(CancelledError):
        list(stream)


OTHER = {"logits": np.zeros((1, 1), np.float32), "score": np.zeros((1, 1), np.float32)}


@pytest.mark.parametrize(
    ("batch", "missing"),
    [
        (_tasks.embed("a", None, None, None, None, 1), "feature-extraction: it gives logits, score, and no embedding"),
        (_tasks.tokenize(["a"], None, "m", None, 1), "and no input_ids"),
        (_tasks.embed_sparse("a", None, None, None, 1), "sparse-embedding: it gives logits, score, and no indices"),
        (_tasks.classify("a", None, None, 1, None, 1), "text-classification: it gives logits, score, and no label"),
        (_tasks.classify_zero_shot("a", ["b"], None, None, None, None, 1), "and no label"),
        (_tasks.entities("a", None, None, None, 1), "token-classification: it gives logits, score, and no entity"),
        (_tasks.answer("a", "b", 1, None, None, None), "and no no_answer_score"),
        (_tasks.fill_mask("a", None, None), "fill-mask: it gives logits, score, and no token_str"),
        (_tasks.text_to_text("translation", "a", None, {}), "translation: it gives logits, score, and no text_output"),
        (_tasks.embed_images(b"a", None, 1), "image-feature-extraction: it gives logits, score, and no embedding"),
        (_tasks.classify_images([b"a"], None, 1, 1), "image-classification: it gives logits, score, and no label"),
        (_tasks.classify_images_zero_shot(b"a", ["b"], None, None, 1), "and no label"),
    ],
)
def test_a_model_of_another_task_that_takes_the_same_tensors(batch: Any, missing: str) -> None:
    with pytest.raises(InvalidRequestError, match=missing):
        batch.joined("m", [OTHER])


def test_another_model_hears_nothing() -> None:
    with pytest.raises(InvalidRequestError, match="automatic-speech-recognition: it gives logits, score, and no "):
        _tasks.transcribe(b"a", None, {}).chunks("m", OTHER)


def test_a_server_that_is_not_there() -> None:
    with Client(f"127.0.0.1:{local.free_ports(1)[0]}") as client:
        with pytest.raises(UnavailableError):
            client.generate("x")
        assert client.health() == Health(live=False, ready=False)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:1", "LOCALHOST:1", "localhost.:1", "localhost", "127.0.0.1:1", "127.3.2.1:1", "[::1]:1"),
        *("dns:localhost:1", "dns:///localhost:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"),
    ],
)
def test_no_proxy_for_loopback(host: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options(host)


@pytest.mark.parametrize(
    "host", ["example.org:1", "localhost.example.org:1", "10.0.0.1:1", "[fe80::1]:1", "dns:///example.org:1", "dns:1"]
)
def test_the_users_proxy_for_other_hosts(host: str) -> None:
    assert "grpc.enable_http_proxy" not in dict(channel_options(host))


def test_a_dead_proxy(served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real channel, in both spellings of this machine, and one that takes the proxy: it must fail."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{local.free_ports(1)[0]}")
    port = served[0].partition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        with Client(f"{host}:{port}", timeout=20) as client:
            assert client.health().live
    with grpc.insecure_channel(served[0]) as channel, pytest.raises(grpc.RpcError):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)


def run(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str, str]:
    status = cli.main([arguments[0], "--url", url, *arguments[1:]])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_line(
    served: tuple[str, Service], capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, service = served
    assert run(capsys, url, "generate", "one", "two") == (0, "one two \n", "")
    assert run(capsys, url, "generate", "--stop", "x", "--max-tokens", "3", "a")[0] == 0
    assert service.requests[-1]["stop_words"].tolist() == [[b"x"]]
    (tmp_path / "text").write_text("from a file")
    assert run(capsys, url, "generate", "--file", str(tmp_path / "text"))[1] == "from a file \n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("stdin é".encode())))
    assert run(capsys, url, "generate")[1] == "stdin é \n"
    status, out, _ = run(capsys, url, "generate", "--json", "one two")
    assert (status, json.loads(out)) == (
        0,
        {"text": "one two ", "finish_reason": "stop", "num_input_tokens": 7, "num_output_tokens": 2},
    )
    assert "content" in run(capsys, url, "chat", "--system", "be kind", "hello")[1]
    assert json.loads(run(capsys, url, "embed", "--json", "a", "bb")[1]) == [
        {"text": "a", "embedding": [1.0, 1.0]},
        {"text": "bb", "embedding": [2.0, 1.0]},
    ]
    assert run(capsys, url, "models")[1].splitlines()[1].split() == ["b", "1", "READY"]
    assert run(capsys, url, "health") == (1, "live, not ready\n", "")


def test_command_line_errors(served: tuple[str, Service], capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    url, _ = served
    assert run(capsys, url, "generate", "refuse") == (1, "", "trident: top_p must be above 0\n")
    assert run(capsys, url, "generate", "--file", str(tmp_path / "none"))[0] == 2
    assert run(capsys, url, "generate", "--file", str(tmp_path / "none"), "text")[0] == 2
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert run(capsys, url, "generate", "--file", str(tmp_path / "latin"))[0] == 2
    with pytest.raises(SystemExit):
        cli.main(["generate", "--temprature", "1", "x"])


def test_a_call_without_a_model_takes_the_only_one_of_its_task(connected: Client, served: tuple[str, Service]) -> None:
    assert connected.generate("one two").text == "one two"
    assert connected.embed("abc").tolist() == [3.0, 1.0]
    assert connected.embed("abcd").tolist() == [4.0, 1.0]
    assert served[1].asked == 2  # once for each task
    with pytest.raises(NotFoundError, match="serves de-en and en-de for translation: name one with model="):
        connected.translate("x")
    with pytest.raises(
        NotFoundError, match=r"no model for summarization.*it serves answer \(question-answering\), de-en"
    ):
        connected.summarize("x")


def test_the_search_for_a_model_has_the_call_s_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes connections and never answers
        with Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            for call in (client.embed, client.generate, client.translate):
                started = time.monotonic()
                with pytest.raises((DeadlineExceededError, UnavailableError)):
                    call("x", timeout=0.3)
                assert time.monotonic() - started < 5


def test_files_are_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"abc")
    for file in (b"abc", bytearray(b"abc"), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert content_of(cast(Any, file)) == b"abc"
    for address in ("https://example.com/a.png", "data:image/png;base64,YWJj"):
        with pytest.raises(
            InvalidRequestError, match=f"{address}' is an address, and none is fetched: give the file's"
        ):
            content_of(address)
    with pytest.raises(TypeError, match="by its bytes or its path, found ndarray"):
        content_of(cast(Any, np.zeros(3)))
