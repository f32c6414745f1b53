"""What adapters cost: python -m benchmarks.lora [--adapters 1,4,16] [--rank 16] [--targets q_proj,v_proj].

SmolLM2 is exported with that many random adapters beside it, once (`--work` keeps the exports), and each passes its
gate against peft. Then the graphs run in this process in turns, so that nothing but the engine is measured: 16 streams
that share the adapters, 16 streams of the base, one stream with an adapter, and a prompt of 512 tokens with one. The
figures are tokens a second while all streams run, medians over rounds, and in brackets the share of the graph without
adapters, the median of the rounds' shares.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation import PREFILL_TOKENS, TOKENS, summarize
from benchmarks.peers.interface import Prompts
from benchmarks.peers.trident import TridentEngine
from trident_export import corpora, install, models_file
from trident_export.huggingface import sources
from trident_serving.runtime.tokenizer import TextTokenizer

STREAMS = 16
# As int8 but for how weights are rounded, which takes minutes of each export and changes no speed.
RECIPE = """[int8_nearest]
precision = "int8"
decoder = [{ pass = "rotate" }, { pass = "groups", bits = 8, group = 64 }, { pass = "embedding" }]
"""
MODEL = "smollm2"
ROOT = Path(__file__).parents[1]


def make_adapter(base: Path, folder: Path, rank: int, targets: Sequence[str], seed: int) -> None:
    """Write a LoRA of random numbers that change what SmolLM2 says and leave it a language model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(str(folder))


def export(work: Path, count: int, rank: int, targets: Sequence[str], variant: str) -> Path:
    """The version folder of SmolLM2 with so many adapters; it is exported where it is not there."""
    spec = models_file.select(models_file.load(ROOT / "models.toml"), MODEL)[0]
    base = sources.fetch(spec, ROOT, ROOT / ".cache", _say).path
    folders = {f"a{index}": work / f"{'-'.join(targets)}-{rank}" / f"a{index}" for index in range(count)}
    for index, folder in enumerate(folders.values()):
        if not (folder / "adapter_config.json").exists():
            make_adapter(base, folder, rank, targets, index)
    name = f"{MODEL}-{count}-{rank}-{len(targets)}"
    table = [
        f"[{name}]",
        'task = "text-generation"',
        f'source = {{ path = "{base}" }}',
        f'variants = ["{variant}"]',
        "limits = { context = 2048 }",
        "adapters = { " + ", ".join(f'{key} = "{folder}"' for key, folder in folders.items()) + " }",
    ]
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipes.toml").write_text(RECIPE, encoding="utf-8")
    (work / f"{name}.toml").write_text("\n".join(table) + "\n", encoding="utf-8")
    install.export(models_file.load(work / f"{name}.toml"), work / "repository", ROOT, ROOT / ".cache", _say)
    return work / "repository" / name / "1"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def runs(engine: TridentEngine, prompts: Prompts, long: Sequence[int]) -> dict[str, float]:
    """Tokens a second of each kind of streams."""
    count = len(engine.decoder.adapters)
    mixed = [1 + index % count for index in range(STREAMS)] if count else []
    return {
        f"{STREAMS} streams": summarize(engine.generate(prompts, TOKENS, mixed)).decode,
        f"{STREAMS} of the base": summarize(engine.generate(prompts, TOKENS)).decode,
        "1 stream": summarize(engine.generate(prompts[:1], TOKENS, mixed[:1])).decode,
        "prefill": len(long) / engine.generate([long], 2, mixed[:1])[0][0],
    }


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmark-lora", help="where exports are kept")
    parser.add_argument("--adapters", default="1,4,16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--variant", default="int8_nearest")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.INFO)  # the libraries that peers of other benchmarks need switch it on
    targets = options.targets.split(",")
    folders = {
        count: export(options.work, count, options.rank, targets, options.variant)
        for count in (0, *map(int, options.adapters.split(",")))
    }
    tokenizer = TextTokenizer.load(folders[0])
    texts = [text[:240] for text in corpora.held_out() if len(text) > 200]
    prompts = (list(map(tokenizer.encode, texts)) * STREAMS)[:STREAMS]
    long = (tokenizer.encode("\n".join(texts)) * 2)[:PREFILL_TOKENS]
    found: dict[int, dict[str, list[float]]] = {count: {} for count in folders}
    engines = {count: TridentEngine(folder, f"with {count} adapters") for count, folder in folders.items()}
    for number in range(options.rounds + 1):  # the first one warms up
        print(f"lora: round {number} of {options.rounds}", file=sys.stderr, flush=True)
        for count, engine in engines.items():
            for name, rate in runs(engine, prompts, long).items():
                if number:
                    found[count].setdefault(name, []).append(rate)
    print(
        f"{options.variant}, rank {options.rank}, {', '.join(targets)}; tokens/s, medians of {options.rounds} rounds\n"
    )
    print("| adapters | MiB | " + " | ".join(found[0]) + " |\n|---:|---:|" + "---:|" * len(found[0]))
    for count, rates in found.items():
        size = sum(file.stat().st_size for file in folders[count].glob("model.onnx*")) / 2**20
        print(f"| {count} | {size:.0f} | " + " | ".join(_cell(found[0][name], rates[name]) for name in rates) + " |")
    return 0


def _cell(base: Sequence[float], rates: Sequence[float]) -> str:
    """A rate, and what it is of the base's in the same rounds."""
    share = statistics.median(rate / other for rate, other in zip(rates, base, strict=True))
    return f"{statistics.median(rates):.0f}" + (f" ({share:.2f})" if rates is not base else "")


if __name__ == "__main__":
    raise SystemExit(main())
