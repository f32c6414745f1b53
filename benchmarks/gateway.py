"""What the gateway costs beside direct gRPC, in one run: throughput and time to first token, and many held streams.

python -m benchmarks.gateway [--repository model_repository] [--model smollm2]

Starts a server and a gateway of its own and writes reports/gateway.json and reports/gateway.md. Both ways ask the same
prompts in turn, so that what the machine does otherwise meets both. The answers must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trident_client import AsyncClient
from trident_serving.launcher import local
from trident_serving.launcher.local import free_ports

SENTENCE = "the server answers many questions about models that it holds in memory every day"
WORDS = SENTENCE.split()
OUTPUT_TOKENS = 64
Ask = Callable[[str], Awaitable["Timed"]]


@dataclass(frozen=True)
class Timed:
    """One streamed answer.

    Attributes:
        text: all of it.
        tokens: of it.
        first: seconds until its first text.
    """

    text: str
    tokens: int
    first: float


@dataclass(frozen=True)
class Round:
    """Many streams at once.

    Attributes:
        way: "grpc" or "gateway".
        tokens_per_second: of all streams together.
        first_ms: the median time to first token.
        first_p95_ms: that of the slowest twentieth.
    """

    way: str
    streams: int
    tokens_per_second: float
    first_ms: float
    first_p95_ms: float


def prompt(number: int) -> str:
    """A prompt that no other one begins with."""
    return f"{number}: " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(24))


async def ask_grpc(client: AsyncClient, model: str, text: str) -> Timed:
    """An answer past the gateway."""
    began, first, parts, tokens = time.perf_counter(), 0.0, list[str](), 0
    async for chunk in client.stream(text, model=model, max_tokens=OUTPUT_TOKENS, ignore_eos=True):
        first = first or time.perf_counter() - began
        parts.append(chunk.text)
        tokens = chunk.num_output_tokens
    return Timed("".join(parts), tokens, first)


async def post(port: int, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request over a connection of its own; what comes back is read by the caller."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def ask_gateway(port: int, model: str, text: str, tokens: int = OUTPUT_TOKENS) -> Timed:
    """An answer through the gateway, as server-sent events."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began, first, parts, used = time.perf_counter(), 0.0, list[str](), 0
    reader, writer = await post(port, "/v1/completions", body)
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event["choices"]:
                first = first or time.perf_counter() - began
                parts.append(event["choices"][0]["text"])
            elif event.get("usage"):
                used = event["usage"]["completion_tokens"]
        elif line.startswith(b'{"error"'):
            raise RuntimeError(line.decode())
    writer.close()
    return Timed("".join(parts), used, first)


async def one_round(way: str, ask: Ask, prompts: Sequence[str]) -> tuple[Round, list[str]]:
    """All prompts at once."""
    began = time.perf_counter()
    found = await asyncio.gather(*(ask(text) for text in prompts))
    seconds = time.perf_counter() - began
    firsts = sorted(each.first * 1000 for each in found)
    speed = sum(each.tokens for each in found) / seconds
    slowest = firsts[int(len(firsts) * 0.95)]
    return Round(way, len(prompts), speed, statistics.median(firsts), slowest), [each.text for each in found]


async def compare(grpc: str, port: int, model: str, streams: int, rounds: int) -> list[Round]:
    """Both ways in turn."""
    results = []
    async with AsyncClient(grpc, timeout=300) as client:
        ways: dict[str, Ask] = {
            "grpc": lambda text: ask_grpc(client, model, text),
            "gateway": lambda text: ask_gateway(port, model, text),
        }
        for number in range(-1, rounds):
            texts: dict[str, list[str]] = {}
            for way in sorted(ways, reverse=number % 2 == 0):
                # Prompts of this way only: the cache holds those of the other.
                shift = 1000 * (2 * number + (way == "grpc"))
                result, texts[way] = await one_round(way, ways[way], [prompt(shift + each) for each in range(streams)])
                if number >= 0:  # the first round warms up
                    results.append(result)
                    print(f"gateway: {result}", file=sys.stderr)
        same = prompt(7)
        right, through = await ask_grpc(client, model, same), await ask_gateway(port, model, same)
        if right.text != through.text:
            raise RuntimeError("the answer through the gateway is another one")
    return results


async def hold(port: int, pid: int, model: str, streams: int) -> dict[str, float]:
    """Many streams at once, most of which wait; the gateway's memory meanwhile."""
    before = memory_mib(pid)
    tasks = [asyncio.create_task(ask_gateway(port, model, prompt(10**6 + each), 4)) for each in range(streams)]
    peak = before
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=0.2)
        peak = max(peak, memory_mib(pid))
    answered = sum(1 for task in tasks if task.exception() is None and task.result().tokens == 4)
    return {"streams": streams, "answered": answered, "memory_before_mib": before, "memory_peak_mib": peak}


def memory_mib(pid: int) -> float:
    """The resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return 0.0 if found is None else int(found[1]) / 1024


async def ready(port: int) -> None:
    """Wait for the gateway."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if b" 200 " in answer[:20]:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)


async def measure(server: local.LocalServer, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, against one server."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trident_gateway", "--triton", server.grpc_url, "--port", str(port)]
    command += ["--queue-seconds", "600", "--timeout", "600"]  # the last of many held streams waits long
    with (options.reports / "gateway.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        await asyncio.wait_for(ready(port), 60)
        results = await compare(server.grpc_url, port, options.model, options.streams, options.rounds)
        held = await hold(port, process.pid, options.model, options.held)
    finally:
        process.terminate()
        process.wait(60)

    def median(way: str, name: str) -> float:
        return statistics.median(getattr(each, name) for each in results if each.way == way)

    return {
        "rounds": [asdict(each) for each in results],
        "throughput_ratio": median("gateway", "tokens_per_second") / median("grpc", "tokens_per_second"),
        "first_token_ms_more": median("gateway", "first_ms") - median("grpc", "first_ms"),
        "held": held,
    }


def report(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| way | streams | tokens/s | first token, ms | p95 |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {each['way']} | {each['streams']} | {each['tokens_per_second']:.1f} | {each['first_ms']:.1f} | "
        f"{each['first_p95_ms']:.1f} |"
        for each in found["rounds"]
    ]
    held = found["held"]
    return "\n".join(
        [
            *lines,
            "",
            f"Throughput through the gateway: {found['throughput_ratio']:.3f} of that past it (medians). "
            f"First token: {found['first_token_ms_more']:+.1f} ms.",
            f"{held['streams']} streams at once: {held['answered']} answered; the gateway's memory "
            f"{held['memory_before_mib']:.0f} MiB before, {held['memory_peak_mib']:.0f} MiB at most.",
            "",
        ]
    )


def main() -> int:
    """Measure and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--held", type=int, default=1000)
    options = parser.parse_args()
    options.reports.mkdir(exist_ok=True)
    with local.running(options.repository, options.reports / "gateway-server.log") as server:
        found = asyncio.run(measure(server, options))
    (options.reports / "gateway.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    (options.reports / "gateway.md").write_text(report(found), encoding="utf-8")
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
