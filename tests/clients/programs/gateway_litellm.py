"""Asks by LiteLLM's OpenAI, Jina and Hugging Face providers: python gateway_litellm.py URL TOOL QUERY TEXT..."""

import json
import sys

import litellm

url, tool, query, texts = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:]
shared = {"api_base": f"{url}/v1", "api_key": "any", "num_retries": 0}
messages = [{"role": "user", "content": "What is rain?"}]
stream = litellm.completion("openai/talk", messages=messages, max_tokens=8, temperature=0, stream=True, **shared)
called = litellm.completion(
    "openai/chain", messages=[{"role": "user", "content": "hi"}], tools=[tool], max_tokens=24, **shared
)
ranked = litellm.rerank(
    "jina_ai/rank", query=query, documents=texts, top_n=2, api_base=f"{url}/v1/rerank", api_key="any"
)
try:
    litellm.completion("openai/talk", messages=messages, max_tokens=5000, **shared)
    refusal = ""
except litellm.exceptions.ContextWindowExceededError as error:
    refusal = str(error)
found = {
    "chat": litellm.completion("openai/talk", messages=messages, max_tokens=8, temperature=0, **shared)
    .choices[0]
    .message.content,
    "chunks": [chunk.choices[0].delta.content or "" for chunk in stream],
    "reasoning": called.choices[0].message.reasoning_content,
    "calls": [[call.function.name, call.function.arguments] for call in called.choices[0].message.tool_calls],
    "completion": litellm.text_completion(
        model="text-completion-openai/talk", prompt="the cat", max_tokens=8, temperature=0, **shared
    )
    .choices[0]
    .text,
    "vectors": [row["embedding"] for row in litellm.embedding("openai/embed", texts, **shared).data],
    "ranked": [[each["index"], each["relevance_score"]] for each in ranked.results],
    "refusal": refusal,
}
print(json.dumps(found))
