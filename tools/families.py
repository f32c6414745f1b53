"""Which model types are served: python tools/families.py [type ...] [--write docs/reference/families.md]

For every type that transformers can build, a tiny model with random weights is exported as any other and served in
process: several texts in company, in chunks and token by token, over a length beyond any window, chunk or original
context. Its log-probabilities and greedy tokens are compared with Hugging Face's eager attention. A type is served, or
refused with a sentence; each runs in a process of its own, so that one that hangs or crashes is a line of the table.

This builds models and prints; what is supported is decided by the exporter. Without arguments it takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families_encoders
import families_seq2seq
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trident_export.errors import ExportError, UnsupportedArchitecture
from trident_export.graphs import decoder_passes, editing, rotary
from trident_export.graphs.causal import export_causal_graph
from trident_export.graphs.tracing import running
from trident_serving.generation.batch import SlotTokens
from trident_serving.generation.decoder import OnnxDecoder

NotBuilt = families_encoders.NotBuilt
VOCABULARY = 256
CONTEXT = 128
LONGEST = 4 * CONTEXT  # positions of a cache
LENGTHS = (60, 30, 41)
GREEDY = 4
COUNTED = ("served", "refused", "wrong", "failed", "not built")
WINDOW = 8
ORIGINAL = 32
LARGEST_DIFFERENCE = 5e-3  # of a log-probability; random weights make logits up to 20
LIMIT = 240  # seconds for one type

# What every configuration gets that has such a setting.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "attention_chunk_size": WINDOW,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "is_decoder": True,
    "num_nextn_predict_layers": 0,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 48,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "rotary_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "n_shared_experts": 1,
    "max_seq_len": CONTEXT,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 48,
    "num_layers": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "index_topk": 16,
    "index_n_heads": 8,
    "index_head_dim": 16,
}
# What single types need besides.
_FULL = {"rope_type": "default", "rope_theta": 10000.0}
_LONGROPE = {
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": _FULL
    | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
    | {"original_max_position_embeddings": ORIGINAL, "short_mscale": 1.1, "long_mscale": 1.2},
}
MORE: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _FULL, "sliding_attention": _FULL}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "exaone4": {"num_hidden_layers": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "llama4_text": {"num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "phi3": _LONGROPE,
    "phi4_multimodal": _LONGROPE,
    "phimoe": _LONGROPE,
    "smollm3": {"num_hidden_layers": 4},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "mamba_d_state": 16,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
GAIN = {"dory": 2}  # of its weights, whose products it divides by small numbers


@dataclass(frozen=True)
class Result:
    """What became of a type: `kind` is served, refused, wrong, failed or not built."""

    name: str
    kind: str
    said: str


def tiny(name: str) -> Any:
    """A configuration of a type with small sizes."""
    return CONFIG_MAPPING[name](**_sizes(CONFIG_MAPPING[name](), SIZES | MORE.get(name, {})))


def _sizes(default: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    names = set(default.to_dict()) | set(getattr(type(default), "attribute_map", {}))
    found = {key: value for key, value in wanted.items() if key in names or "." in key}
    if "qk_rope_head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]  # by which frequencies are made
        found["num_key_value_heads"] = found["num_attention_heads"]
    for part in getattr(type(default), "sub_configs", {}):
        inner = getattr(default, part, None)
        if hasattr(inner, "to_dict"):
            found[part] = _sizes(inner, wanted | wanted.get(part, {})) | wanted.get(part, {})
            found[part] |= {"model_type": inner.model_type}
    return found


def build(name: str) -> Any:
    """The model with eager attention and weights that make clear decisions."""
    torch.manual_seed(0)
    config = tiny(name)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN.get(name, 6))
            else:  # norms and biases: not the same for every number
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def check_causal(name: str) -> str:
    """Export and serve one type; a sentence where it is not as it should be, else an empty one.

    Raises:
        ExportError: it is refused.
    """
    try:
        model = build(name)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        editing.save(decoder_passes.optimize(export_causal_graph(model, LONGEST)), path)
        decoder = OnnxDecoder(path, slots=5, context=CONTEXT - 16, longest_run=16, threads=1)
        other = OnnxDecoder(path, slots=2, context=3 * CONTEXT, longest_run=LENGTHS[1], threads=1)
        with running(f"the graph of a {type(model).__name__}", "be run over the gate's texts"):  # as an export says it
            return compare(model, decoder, other)


def compare(model: Any, decoder: OnnxDecoder, other: OnnxDecoder) -> str:
    """Texts in company against Hugging Face, and against themselves alone in a cache of another capacity."""
    random = np.random.default_rng(0)
    limit = rotary.longest_context(model) or CONTEXT
    turn = decoder.rotation
    lengths = [min(length, limit - GREEDY) for length in LENGTHS]
    texts = [random.integers(3, VOCABULARY // 2, length).tolist() for length in lengths]
    found: list[list[Any]] = [[] for _ in texts]
    position = [0] * len(texts)
    rows = (4, 0, 1)
    while any(position[i] < len(text) for i, text in enumerate(texts)):
        items = []
        for index, row in enumerate(rows):
            piece = texts[index][position[index] :][: random.choice([1, 1, 2, 5, 16])]
            if piece:
                rotation = turn(len(texts[index]))
                items.append(SlotTokens(row, position[index], piece, len(piece), rotation))
                position[index] += len(piece)
        logits, begin = decoder.run(items), 0
        for item in items:
            found[rows.index(item.slot)].append(logits[begin : begin + item.wanted].copy())
            begin += item.wanted
    served = [torch.from_numpy(np.concatenate(parts)) for parts in found]
    alone = other.run([SlotTokens(1, 0, texts[1], len(texts[1]), turn(len(texts[1])))])
    if not np.array_equal(alone, served[1].numpy()):
        return f"company or capacity change its logits by {np.abs(alone - served[1].numpy()).max():.1e}"
    off = 0.0
    with torch.inference_mode():
        for ids, logits in zip(texts, served, strict=True):
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
            off = max(off, float((logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()))
        if not off < LARGEST_DIFFERENCE and not off < 2 * own_error(model, texts):
            return f"its log-probabilities are {off:.2g} off"
        for index, ids in enumerate(texts[1:], 1):
            tokens, last = list(ids), served[index][-1]
            for _ in range(GREEDY):
                tokens.append(int(last.argmax()))
                right = int(model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0, -1].argmax())
                if right != tokens[-1]:
                    return f"greedy token {len(tokens)} is {tokens[-1]}, Hugging Face's is {right}"
                crossed = turn(len(tokens)) != turn(len(tokens) - 1)  # then all tokens are rotated anew
                start = 0 if crossed else len(tokens) - 1
                (row,) = decoder.run([SlotTokens(rows[index], start, tokens[start:], 1, turn(len(tokens)))])
                last = torch.from_numpy(row.copy())
    return ""


def own_error(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """How far Hugging Face's own log-probabilities are off in float32, the largest over some texts."""
    found = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        found.append([model(input_ids=torch.tensor([ids]), use_cache=False).logits.log_softmax(-1) for ids in texts])
    return max(float((exact - given).abs().max()) for exact, given in zip(*found, strict=True))


def outcome(name: str, check: Callable[[str], str], verbose: bool = False) -> Result:
    """The result of one type in this process."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        said = check(name)
    except ExportError as error:
        if verbose:
            traceback.print_exc()
        return Result(name, "refused", str(error))
    except NotBuilt as error:
        return Result(name, "not built", f"not of tiny sizes ({error})")
    except Exception as error:  # anything that a model's code raises outside the exporter
        if verbose:
            traceback.print_exc()
        return Result(name, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return Result(name, "wrong" if said else "served", said)


def isolated(name: str, check: Callable[[str], str]) -> Result:
    """The result of one type in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        theirs.send(outcome(name, check))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT):
            return ours.recv()  # type: ignore[no-any-return]
        return Result(name, "failed", f"nothing after {LIMIT} seconds")
    except EOFError:
        process.join()
        return Result(name, "failed", f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def check_seq2seq(name: str) -> str:
    """As `check_causal`, for an encoder-decoder.

    Raises:
        ExportError: it is refused.
    """
    said = families_seq2seq.check(name)
    if said.startswith("no tiny model can be built"):
        raise NotBuilt(said.partition(": ")[2])
    if said and not said.startswith("another answer"):
        raise UnsupportedArchitecture(said)
    return said


def check_encoder(name: str) -> str:
    """As `check_causal`, for the heads of an encoder.

    Raises:
        ExportError: it is refused.
    """
    try:
        families_encoders.tiny(name)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    return families_encoders.check_encoder(name)


KINDS: dict[str, tuple[Sequence[str], Callable[[str], str]]] = {
    "Causal language models": (tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), check_causal),
    "Encoders": (families_encoders.TYPES, check_encoder),
    "Encoder-decoders": (tuple(families_seq2seq.types()), check_seq2seq),
}


def table(results: dict[str, list[Result]]) -> str:
    """The page."""
    lines = ["# Model families", ""]
    lines += [
        "Written by `make families`. A tiny model of each type, with random weights, is exported and served in",
        "process. Its log-probabilities and greedy tokens are compared with Hugging Face's eager attention: in",
        "company, in chunks and token by token, beyond any window, chunk or original context. Dynamic scaling, whose",
        "frequencies change with every token beyond its original context, is served within it. A type that is refused",
        "ends an export with the sentence that stands here.",
        "",
        "Models that read images beside text are not in these tables: `idefics3`, `smolvlm`, `qwen2_vl` and",
        "`qwen2_5_vl` are served with their image tower ([Chat about images](../how-to/chat-about-images.md)), others",
        "by their text part.",
        "",
        f"transformers {transformers.__version__}.",
        "",
    ]
    for kind, found in results.items():
        served = [result for result in found if result.kind == "served"]
        built = [result for result in found if result.kind != "not built"]
        counts = f"{len(served)} of the {len(built)} types that could be built here are served"
        counts += f"; {len(found) - len(built)} could not." if len(found) > len(built) else "."
        lines += [f"## {kind}", "", counts, "", "| type | |", "|---|---|"]
        lines += [f"| `{result.name}` | {_cell(result)} |" for result in sorted(found, key=lambda result: result.name)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(result: Result) -> str:
    said = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "the model", " ".join(result.said.split()))
    said = said.replace("|", "\\|").replace("<", "&lt;")
    return "served" if result.kind == "served" else f"{result.kind}: {said}"


def main() -> None:
    """Run the types that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="in this process, with tracebacks")
    arguments = parser.parse_args()
    results: dict[str, list[Result]] = {}
    for kind, (names, check) in KINDS.items():
        chosen = [name for name in names if not arguments.types or name in arguments.types]

        def one(name: str, check: Callable[[str], str] = check) -> Result:
            start = time.monotonic()
            result = outcome(name, check, verbose=True) if arguments.here else isolated(name, check)
            print(f"{result.kind:8s} {time.monotonic() - start:5.1f} s  {name}  {result.said}", flush=True)
            return result

        with ThreadPoolExecutor(1 if arguments.here else arguments.workers) as pool:
            results[kind] = list(pool.map(one, chosen))
    with contextlib.suppress(BrokenPipeError):
        for kind, found in results.items():
            counts = {name: sum(result.kind == name for result in found) for name in COUNTED}
            print(kind, counts)
    if arguments.write:
        arguments.write.write_text(table(results), encoding="utf-8")
    sys.exit(any(result.kind in ("wrong", "failed") for found in results.values() for result in found))


if __name__ == "__main__":
    main()
