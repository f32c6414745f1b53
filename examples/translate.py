"""Translates the lines of a file, or of standard input, many at a time, and keeps their order.

python examples/translate.py letters.txt --target-lang German > german.txt
"""

from __future__ import annotations

import argparse
import sys

from trident_client import Client


def main() -> None:
    """Print a translation for each line; an empty line stays one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=argparse.FileType("r", encoding="utf-8"), nargs="?", default=sys.stdin)
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", help="the server's only translator if it is left out")
    parser.add_argument("--source-lang", help="as the model names it")
    parser.add_argument("--target-lang", help="as the model names it")
    parser.add_argument("--max-tokens", type=int, help="of one translation; the model's limit if it is left out")
    options = parser.parse_args()
    lines = options.file.read().splitlines()
    texts = [line for line in lines if line.strip()]
    with Client(options.url, timeout=600) as client:
        # One call: the client sends 16 texts at a time, and again what finds the server's queue full.
        answers = iter(
            client.translate(
                texts,
                model=options.model,
                source_lang=options.source_lang,
                target_lang=options.target_lang,
                max_tokens=options.max_tokens,
            )
        )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            print()
            continue
        answer = next(answers)
        print(" ".join(answer.text.split()))
        if answer.finish_reason == "length":
            print(f"line {number}: the translation is cut after {answer.num_output_tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
