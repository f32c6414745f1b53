"""An agent with two tools: the model calls them, reads what they say, and answers in the end.

python examples/agent.py "Is it warmer in Zürich or in Bern?" --model qwen2.5-0.5b-instruct

The model's chat template must know tools. Qwen 2.5's does; SmolLM2's does not, and the server says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from trident_client import Client, InvalidRequestError, Message, ToolCall


def weather(city: str) -> str:
    """A stand-in for a service that is asked."""
    known = {"Zürich": "18 degrees and rain", "Bern": "21 degrees and sun"}
    return known.get(city, f"no station in {city}")


def add(a: float, b: float) -> str:
    """The sum."""
    return f"{a + b:g}"


TOOLS: dict[str, Callable[..., str]] = {"weather": weather, "add": add}


def described(name: str, what: str, **types: str) -> dict[str, Any]:
    """A tool as the model sees it."""
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in types.items()},
        "required": list(types),
    }
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


DESCRIPTIONS = [
    described("weather", "The weather of a city now", city="string"),
    described("add", "The sum of two numbers", a="number", b="number"),
]


def result(call: ToolCall) -> str:
    """What a call gives. A model makes mistakes: it is told about them, and may try again."""
    if call.name not in TOOLS:
        return f"error: there is no tool {call.name}"
    try:
        return TOOLS[call.name](**call.parsed())
    except (TypeError, ValueError) as error:
        return f"error: {error}"


def answered(client: Client, question: str, model: str | None, rounds: int, max_tokens: int) -> str:
    """The final answer; after some rounds of calls the model has to give it.

    Raises:
        InvalidRequestError: the model knows no tools.
    """
    messages: list[Message] = [{"role": "user", "content": question}]
    for number in range(rounds + 1):
        choice = "auto" if number < rounds else "none"
        answer = client.chat(
            messages,
            model=model,
            tools=DESCRIPTIONS,
            tool_choice=choice,
            return_reasoning=True,
            max_tokens=max_tokens,
        )
        if not answer.tool_calls:
            break
        messages.append(answer.message)
        for call in answer.tool_calls:
            said = result(call)
            print(f"{call.name} {call.arguments} -> {said}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return answer.text


def main() -> None:
    """Print the calls and the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", help="the server's only generator if it is left out")
    parser.add_argument("--rounds", type=int, default=4, help="how often it may call tools")
    parser.add_argument("--max-tokens", type=int, default=200, help="of what the model writes at a time")
    options = parser.parse_args()
    with Client(options.url) as client:
        try:
            print(answered(client, options.question, options.model, options.rounds, options.max_tokens))
        except InvalidRequestError as error:
            sys.exit(f"{error}")


if __name__ == "__main__":
    main()
