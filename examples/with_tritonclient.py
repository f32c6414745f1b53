"""Triton's own client, without any package of Trident's: a streamed answer over gRPC, and an embedding.

pip install 'tritonclient[grpc]'
python examples/with_tritonclient.py "1, 2, 3, 4,"

A generator is decoupled: it sends several responses to one request, so it is called on a stream. An empty response with
the parameter `triton_final_response` says that the last one has come.
"""

from __future__ import annotations

import argparse
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def tensor(name: str, kind: str, *values: Any) -> triton.InferInput:
    """An input with a row for each value."""
    types = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}
    made = triton.InferInput(name, [len(values), 1], kind)
    made.set_data_from_numpy(np.array(values, types[kind]).reshape(-1, 1))
    return made


def stream(client: triton.InferenceServerClient, model: str, prompt: str, max_tokens: int) -> str:
    """Print the answer as it comes; all of it is returned.

    Raises:
        InferenceServerException: the server refuses the request; its message is the server's sentence.
    """
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: responses.put((result, error)))
    inputs = [
        tensor("text_input", "BYTES", prompt.encode()),
        tensor("max_tokens", "INT32", max_tokens),
        tensor("stream", "BOOL", True),
    ]
    client.async_stream_infer(model, inputs, enable_empty_final_response=True)
    answer = ""
    while True:
        result, error = responses.get(timeout=60)
        if error is not None:
            raise error
        text = result.as_numpy("text_output")
        if text is not None and text.size:
            answer += text[0].decode()
            print(text[0].decode(), end="", flush=True)
        if result.get_response().parameters["triton_final_response"].bool_param:
            print()
            return answer


def main() -> None:
    """Stream an answer, then embed prompt and answer and print their cosine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    with triton.InferenceServerClient(options.url) as client:
        try:
            answer = stream(client, options.model, options.prompt, options.max_tokens)
            texts = tensor("text_input", "BYTES", options.prompt.encode(), answer.encode())
            vectors = client.infer(options.embedder, [texts]).as_numpy("embedding")
        except triton.InferenceServerException as error:
            sys.exit(error.message())
    print(f"cosine {float(vectors[0] @ vectors[1]):.4f}")


if __name__ == "__main__":
    main()
