"""A chat in the terminal: the answers are streamed, and the model sees the whole conversation.

python examples/chat.py                       # type a line, read the answer; Ctrl-D ends
echo "What is 2 plus 2?" | python examples/chat.py
"""

from __future__ import annotations

import argparse
import sys

from trident_client import Client, Message


def main() -> None:
    """Answer each line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="the server's gRPC address, or http://... of its HTTP")
    parser.add_argument("--model", help="the server's only generator if it is left out")
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()
    messages: list[Message] = []
    with Client(options.url) as client:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = ""
            for chunk in client.stream(messages, model=options.model, max_tokens=options.max_tokens):
                answer += chunk.text
                print(chunk.text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
