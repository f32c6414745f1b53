"""Whether two checkouts serve the same answers, to the last bit, and write the same configs.

python tools/compare_trees.py OLD NEW

Each checkout holds its environment in .venv and its exported repository in model_repository. Their servers run one
after the other and get the same requests: generations with every option, templates, embeddings. Differences are
printed; the exit status is 1 if an answer differs. Differences of configs do not count, since they may be meant.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from trident_client import _protocol as pb
from trident_client import _wire
from trident_client._options import GENERATION
from trident_serving.launcher import http
from trident_serving.launcher.local import free_ports

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4,",
    "Ein Satz auf Deutsch, danach",
    "emoji 😀 and 中文",
    "A B C D A B C D A B C",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"min_tokens": 12},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 0.8, "random_seed": 7},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "random_seed": 8},
    {"temperature": 0.7, "repetition_penalty": 1.1, "min_tokens": 6, "random_seed": 9},
    {"stop_words": ["the", "\n"]},
    {"prompt_lookup": False},
)
COMMON = {"max_tokens": 16, "return_log_probs": True, "top_logprobs": 3}


def requests() -> Iterator[tuple[str, str, Any]]:
    """A name, a model and a request, each."""
    for number, text in enumerate(TEXTS):
        for case, options in enumerate(OPTIONS):
            for model in ("smollm2", "smollm2_fp32") if case < 5 else ("smollm2",):
                tensors = {"text_input": _wire.texts([text])[None], **_wire.options(COMMON | options, GENERATION)}
                yield f"{model} {number}.{case}", model, _wire.build_request(model, tensors)
        for model in ("translate", "summarize"):
            tensors = {"text_input": _wire.texts([text])[None], "max_tokens": np.array([[12]], np.int32)}
            yield f"{model} {number}", model, _wire.build_request(model, tensors)
        question = {"question": _wire.texts(["What?", "Where?"]), "context": _wire.texts([text])}
        yield f"answer {number}", "answer", _wire.build_request("answer", question)
        for model in ("minilm", "minilm_int8", "minilm_int8_static"):
            tensors = {"text_input": _wire.texts(list(TEXTS[: number + 1]))[:, None]}
            yield f"{model} {number}", model, _wire.build_request(model, tensors)


def answers(tree: Path) -> dict[str, Any]:
    """What a checkout's server answers to each request: its tensors' bytes, or the error."""
    ports = free_ports(3)
    command = [str(tree / ".venv/bin/python"), "-m", "trident_serving", "--repository", str(tree / "model_repository")]
    for flag, port in zip(("--http-port", "--grpc-port", "--metrics-port"), ports, strict=True):
        command += [flag, str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tree, env=environment, start_new_session=True)
        try:
            _wait(server, ports[0])
            with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
                stream = channel.unary_stream(
                    f"/{pb.SERVICE}/ModelStreamInfer",
                    request_serializer=pb.ModelInferRequest.SerializeToString,
                    response_deserializer=pb.ModelStreamInferResponse.FromString,
                )
                return {name: _answer(stream, request) for name, _, request in requests()}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(90)


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    while server.poll() is None:
        try:
            with http.open(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"the server ended with status {server.returncode}")


def _answer(stream: Any, request: Any) -> Any:
    found = []
    for response in stream(request, timeout=120):
        if response.error_message:
            return response.error_message
        one = response.infer_response
        raw = [content.hex() for content in one.raw_output_contents]
        found.append(
            [(o.name, o.datatype, list(o.shape), content) for o, content in zip(one.outputs, raw, strict=True)]
        )
    return json.loads(json.dumps(found))


def configs(tree: Path) -> dict[str, str]:
    """The texts of a checkout's configs, by model."""
    found = (tree / "model_repository").glob("*/config.pbtxt")
    return {path.parent.name: path.read_text(encoding="utf-8") for path in found}


def main(arguments: list[str]) -> int:
    """Compare two checkouts; returns the exit status."""
    old, new = (Path(argument).resolve() for argument in arguments)
    texts = configs(old), configs(new)
    for name in sorted(set(texts[0]) & set(texts[1])):
        lines = difflib.unified_diff(*(text[name].splitlines() for text in texts), name, name, lineterm="", n=0)
        print("\n".join(lines), end="")
    print(f"\n{len(set(texts[0]) & set(texts[1]))} configs compared")
    before, after = answers(old), answers(new)
    different = [name for name in before if before[name] != after[name]]
    for name in different:
        print(f"{name}: {str(before[name])[:300]}\n  became {str(after[name])[:300]}")
    refused = sum(isinstance(answer, str) for answer in before.values())
    print(f"{len(before)} requests, {refused} refused by both alike where not shown, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
