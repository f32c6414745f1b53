"""Ranks by Cohere's client: python gateway_cohere.py URL QUERY TEXT..."""

import json
import sys

import cohere

url, query, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
client = cohere.ClientV2(api_key="any", base_url=url)
answer = client.rerank(model="rank", query=query, documents=texts, top_n=2)
older = cohere.Client(api_key="any", base_url=url).rerank(model="rank", query=query, documents=texts)
try:
    client.rerank(model="nothing", query=query, documents=texts)
    refusal = ""
except cohere.errors.NotFoundError as error:
    refusal = str(error.body)
found = {
    "v2": [[each.index, each.relevance_score] for each in answer.results],
    "v1": [[each.index, each.relevance_score] for each in older.results],
    "refusal": refusal,
}
print(json.dumps(found))
