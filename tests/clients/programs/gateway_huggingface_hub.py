"""Asks TEI's endpoints and OpenAI's by huggingface_hub: python gateway_huggingface_hub.py URL TEXT..."""

import json
import sys

from huggingface_hub import InferenceClient

url, texts = sys.argv[1], sys.argv[2:]
chat = InferenceClient(base_url=url, api_key="any")
messages = [{"role": "user", "content": "What is rain?"}]
stream = chat.chat_completion(messages, model="talk", max_tokens=8, stream=True)
found = {
    "vectors": InferenceClient(model=f"{url}/embed").feature_extraction(texts).tolist(),
    "chat": chat.chat_completion(messages, model="talk", max_tokens=8).choices[0].message.content,
    "chunks": [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices],
}
print(json.dumps(found))
