"""Asks by LlamaIndex: python gateway_llama_index.py URL TEXT..."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

url, texts = sys.argv[1], sys.argv[2:]
shared = {"api_base": f"{url}/v1", "api_key": "any", "max_retries": 0}
talk = OpenAILike(model="talk", is_chat_model=True, max_tokens=8, temperature=0, context_window=2048, **shared)
plain = OpenAILike(model="talk", is_chat_model=False, max_tokens=8, temperature=0, context_window=2048, **shared)
messages = [ChatMessage(role="user", content="What is rain?")]
found = {
    "chat": talk.chat(messages).message.content,
    "chunks": [chunk.delta for chunk in talk.stream_chat(messages)],
    "completion": plain.complete("the cat").text,
    "vectors": OpenAILikeEmbedding(model_name="embed", **shared).get_text_embedding_batch(texts),
}
print(json.dumps(found))
