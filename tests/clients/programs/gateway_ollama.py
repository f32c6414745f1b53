"""Asks by Ollama's client: python gateway_ollama.py URL TOOL TEXT..."""

import json
import sys

import ollama

url, tool, texts = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
client = ollama.Client(host=url)
messages = [{"role": "user", "content": "hi"}]
options = {"num_predict": 10, "temperature": 1.0, "seed": 4}
whole = client.chat("chain", messages=messages, tools=[tool])
parts = list(client.chat("chain", messages=messages, tools=[tool], stream=True))
again = client.chat(
    "chain", messages=[*messages, whole.message, {"role": "tool", "tool_name": "weather", "content": "18"}]
)
try:
    client.chat("nothing", messages=messages)
    refusal = ""
except ollama.ResponseError as error:
    refusal = f"{error.status_code} {error.error}"
found = {
    "content": whole.message.content,
    "thinking": whole.message.thinking,
    "calls": [call.function.model_dump() for call in whole.message.tool_calls or []],
    "streamed": "".join(part.message.content or "" for part in parts),
    "streamed_calls": [call.function.model_dump() for part in parts for call in part.message.tool_calls or []],
    "again": again.done_reason,
    "generated": client.generate("talk", "What is rain?", options=options).response,
    "chunks": [part.response for part in client.generate("talk", "What is rain?", options=options, stream=True)],
    "vectors": client.embed("embed", texts).embeddings,
    "models": [model.model for model in client.list().models],
    "refusal": refusal,
}
print(json.dumps(found))
