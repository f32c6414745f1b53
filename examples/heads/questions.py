"""Questions with answers in short notes, made from templates: something to try `trident-export train-head` with.

    python examples/heads/questions.py 2000 > questions.jsonl

A head that learns from these answers questions about notes of this kind. To read other texts it needs thousands of
questions about such texts.
"""

from __future__ import annotations

import json
import random
import sys

NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Farid", "Grace", "Irene", "Jonas", "Keiko", "Luis", "Nadia"]
SURNAMES = ["Adler", "Brandt", "Costa", "Dahl", "Evans", "Garcia", "Hansen", "Ito", "Jensen", "Lopez", "Novak"]
CITIES = ["Lisbon", "Oslo", "Hamburg", "Kyoto", "Boston", "Lima", "Cairo", "Turin", "Dublin", "Leeds", "Quito"]
JOBS = ["nurse", "baker", "pilot", "teacher", "chemist", "librarian", "plumber", "gardener", "tailor"]
THINGS = ["violin", "bicycle", "telescope", "camera", "canoe", "kettle", "tent", "piano", "lamp", "clock"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]


def note(chance: random.Random) -> tuple[str, dict[str, str]]:
    """A note of a few sentences, and its questions with their answers."""
    name, other = chance.sample(NAMES, 2)
    full = f"{name} {chance.choice(SURNAMES)}"
    home, away = chance.sample(CITIES, 2)
    job, thing, month = chance.choice(JOBS), chance.choice(THINGS), chance.choice(MONTHS)
    year, price, day = str(chance.randint(1950, 2020)), str(chance.randint(20, 900)), str(chance.randint(1, 28))
    sentences = {
        f"{full} was born in {home} in {year}.": {
            f"Where was {name} born?": home,
            f"When was {name} born?": year,
            f"Who was born in {home}?": full,
        },
        f"{name} works as a {job} in {away}.": {
            f"What is {name}'s job?": job,
            f"Where does {name} work?": away,
        },
        f"On {day} {month} {other} sold a {thing} for {price} euros.": {
            f"What did {other} sell?": f"a {thing}",
            f"How much did the {thing} cost?": f"{price} euros",
            f"When was the {thing} sold?": f"{day} {month}",
            f"Who sold the {thing}?": other,
        },
    }
    chosen = chance.sample(list(sentences), len(sentences))
    asked = {question: answer for sentence in chosen for question, answer in sentences[sentence].items()}
    return " ".join(chosen), asked


def main(count: int) -> None:
    """Print so many examples."""
    chance = random.Random(0)
    for _ in range(count):
        context, asked = note(chance)
        question, answer = chance.choice(list(asked.items()))
        start = context.find(answer)
        print(json.dumps({"question": question, "context": context, "answer": answer, "start": start}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
