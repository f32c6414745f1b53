"""Calls LlamaIndex's NvidiaTriton, and prints what it gives as JSON: python use_llama_index.py URL PROMPT."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.nvidia_triton import NvidiaTriton

url, prompt = sys.argv[1:]
model = NvidiaTriton(server_url=url, model_name="smollm2", tokens=32)
found = {
    "complete": model.complete(prompt).text,
    "deltas": [answer.delta for answer in model.stream_complete(prompt)],
    "chat": model.chat([ChatMessage(role="user", content="Hi")]).message.content,
}
print(json.dumps(found))
