"""Asks by langchain-openai: python gateway_langchain.py URL TEXT..."""

import json
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

url, texts = sys.argv[1], sys.argv[2:]
shared = {"base_url": f"{url}/v1", "api_key": "any", "max_retries": 0}


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=130)


@tool
def weather(city: str) -> str:
    """It."""
    return f"18 in {city}"


chain = ChatOpenAI(model="chain", max_tokens=24, **shared).bind_tools([weather])
talk = ChatOpenAI(model="talk", max_tokens=8, temperature=0, **shared)
structured = ChatOpenAI(model="talk", max_tokens=100, temperature=0, **shared).with_structured_output(
    Person, method="json_schema"
)
embeddings = OpenAIEmbeddings(model="embed", check_embedding_ctx_length=False, **shared)
person = structured.invoke("Who?")
called = chain.invoke("hi")
responses = ChatOpenAI(model="talk", max_tokens=8, temperature=0, use_responses_api=True, **shared).invoke(
    "What is rain?"
)
found = {
    "chat": talk.invoke("What is rain?").content,
    "chunks": [chunk.content for chunk in talk.stream("What is rain?")],
    "calls": [{"name": call["name"], "args": call["args"]} for call in called.tool_calls],
    "tool": weather.invoke(called.tool_calls[0]["args"]),
    "person": [len(person.name) <= 6, 0 <= person.age <= 130],
    "completion": OpenAI(model="talk", max_tokens=8, temperature=0, **shared).invoke("the cat"),
    "responses": responses.text,
    "vectors": embeddings.embed_documents(texts),
}
print(json.dumps(found))
