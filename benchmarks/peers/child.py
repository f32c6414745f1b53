"""The process of a peer: `python -m benchmarks.peers.child PEER SOURCE WORK`, started by `benchmarks.peers.process`.

It reads requests as lines of JSON and answers with a line each. What a library prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Peers by name: a module of programs/, its class, and what that is built with beside source and work.
PEERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "transformers-fp32": ("hugging_face", "Generate", {}),
    "transformers-batching": ("hugging_face", "ContinuousBatching", {}),
    "onnxruntime-genai-int4": ("genai", "Genai", {}),
    "openvino-genai-int8": ("openvino", "OpenVino", {"weights": "int8"}),
    "openvino-genai-int4": ("openvino", "OpenVino", {"weights": "int4"}),
    "vllm-cpu-bf16": ("vllm_cpu", "Vllm", {}),
    "llama.cpp-Q4_1": ("llama", "LlamaCpp", {}),
    "ctranslate2-int8": ("ctranslate", "CTranslate2", {}),
    "sentence-transformers-torch": ("embedders", "SentenceTransformers", {"backend": "torch"}),
    "sentence-transformers-onnx": ("embedders", "SentenceTransformers", {"backend": "onnx"}),
    "sentence-transformers-openvino": ("embedders", "SentenceTransformers", {"backend": "openvino"}),
    "infinity-torch": ("embedders", "Infinity", {}),
    "fastembed": ("embedders", "Fastembed", {}),
}


def main() -> None:
    """Answer until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**answer: Any) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    name, source, work = sys.argv[1:]
    module, kind, settings = PEERS[name]
    try:
        program = importlib.import_module(f"benchmarks.peers.programs.{module}")
        peer = getattr(program, kind)(Path(source), Path(work), **settings)
    except Exception as error:
        reply(error=_sentence(error))
        raise
    reply(name=peer.name, weights=str(peer.weights))
    for line in sys.stdin:
        request = json.loads(line)
        call, file = request.pop("call"), request.pop("file", "")
        try:
            answer = getattr(peer, call)(**request)
            if file:
                np.save(file, answer)
                reply()
            else:
                reply(times=answer)
        except Exception as error:
            reply(error=_sentence(error))


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


if __name__ == "__main__":
    main()
