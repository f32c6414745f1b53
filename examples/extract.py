"""Reads facts out of texts into objects of pydantic, through the gateway with OpenAI's library.

python examples/extract.py "Anna from Bern would like a table for four on Friday."

The server follows the schema token for token. What remains is the length: every field is bounded, and `max_tokens` has
room for the longest object, so the answer is never cut and always parses. Whether it is true is up to the model.
"""

from __future__ import annotations

import argparse
from typing import Literal

import openai
from pydantic import BaseModel, Field


class Booking(BaseModel):
    """What a request for a table says."""

    name: str = Field(max_length=30)
    city: str = Field(max_length=30)
    day: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    people: int = Field(ge=1, le=20)


# A character takes 12 tokens at most: two escapes, and a token for each of their letters.
ROOM = 12 * (30 + 30) + 100


def main() -> None:
    """Print an object for each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="the gateway")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    with openai.OpenAI(base_url=options.url, api_key="none") as client:
        for text in options.texts:
            answer = client.chat.completions.parse(
                model=options.model,
                messages=[
                    {"role": "system", "content": "Give name, city, day and number of people of the booking as JSON."},
                    {"role": "user", "content": text},
                ],
                response_format=Booking,
                max_tokens=ROOM,
            )
            booking = answer.choices[0].message.parsed
            assert booking is not None  # None is a refusal, which these models do not have
            print(booking.model_dump_json())


if __name__ == "__main__":
    main()
