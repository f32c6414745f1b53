"""Calls LiteLLM's Triton provider, and prints what it gives as JSON: python use_litellm.py URL."""

import json
import sys

import litellm

url, prompt, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
generate = {"model": "triton/smollm2", "api_base": f"{url}/v2/models/smollm2/generate"}
generate["messages"] = [{"role": "user", "content": prompt}]
# LiteLLM takes OpenAI's options of Triton only where they are named; other fields it passes on.
sampling = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "top_k": 50}
sampling["allowed_openai_params"] = ["temperature", "seed"]
stream = litellm.completion(**generate, max_tokens=12, stream=True)
embedding = litellm.embedding("triton/minilm_texts", texts, api_base=f"{url}/v2/models/minilm_texts/infer")
try:
    litellm.completion(**generate, max_tokens=-1)
    refusal = ""
except litellm.exceptions.BadRequestError as error:
    refusal = str(error)
found = {
    "completion": litellm.completion(**generate, max_tokens=12).choices[0].message.content,
    "sampled": litellm.completion(**generate, **sampling).choices[0].message.content,
    "chunks": [chunk.choices[0].delta.content or "" for chunk in stream],
    "vectors": [row["embedding"] for row in embedding.data],
    "refusal": refusal,
}
print(json.dumps(found))
