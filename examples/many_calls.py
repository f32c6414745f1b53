r"""Many calls with asyncio: a few at a time, answers as they come, and one long answer that is cancelled.

printf 'The capital of France is\nWater is\n' | python examples/many_calls.py --at-once 8
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from trident_client import AsyncClient, TridentError


async def tell(client: AsyncClient, model: str | None, started: asyncio.Event) -> None:
    """A story that nobody waits for to end. Cancelling the task cancels the request, and its slot is free."""
    chunks = 0
    try:
        async for _ in client.stream("Once upon a time", model=model, max_tokens=1500, ignore_eos=True):
            chunks += 1
            started.set()
        print("the story came to its end", file=sys.stderr)
    except asyncio.CancelledError:
        print(f"the story was cancelled after {chunks} chunks", file=sys.stderr)
        raise


async def run(url: str, model: str | None, prompts: list[str], at_once: int, max_tokens: int) -> int:
    """Print each prompt with its answer; how many calls failed."""
    room = asyncio.Semaphore(at_once)

    async def ask(client: AsyncClient, prompt: str) -> bool:
        async with room:
            try:
                answer = await client.generate(prompt, model=model, max_tokens=max_tokens, timeout=60)
            except TridentError as error:
                print(f"{prompt}: {error}", file=sys.stderr)
                return False
        print(f"{prompt}\t{' '.join(answer.text.split())}", flush=True)
        return True

    async with AsyncClient(url) as client:
        started = asyncio.Event()
        story = asyncio.create_task(tell(client, model, started))
        await asyncio.wait({story, asyncio.create_task(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
        fine = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
        story.cancel()
        await asyncio.gather(story, return_exceptions=True)
    return fine.count(False)


def main() -> None:
    """Ask what the lines of standard input say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", help="the server's only generator if it is left out")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    failed = asyncio.run(run(options.url, options.model, prompts, options.at_once, options.max_tokens))
    sys.exit(f"{failed} of {len(prompts)} calls failed" if failed else 0)


if __name__ == "__main__":
    main()
