"""What ONNX Runtime makes of decoders on a GPU, beside transformers: python benchmarks/gpu.py [--out gpu.json].

It needs numpy, onnx, torch, transformers and onnxruntime-gpu, and nothing of Triton or of this repository, so that it
runs where nothing else can be installed. Models of well-known shapes with random weights are written as ONNX graphs,
compared with torch on the same device, and measured: prefill, decode steps at several numbers of streams, time to the
first token, share of the memory's bandwidth, with and without CUDA graphs, beside transformers' generate with a static
cache and, where it is installed, DeepSpeed's inference engine. A step of the decoder stays on the device: its token is
chosen there, and only the ids are copied.

Results are written after each part, so that a run that is cut keeps what it has. A part that would begin after
`--seconds` is left out and named. `--device cpu --shapes tiny` runs all of it without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper

BLOCK = 32  # weights that share a scale
CHECKED_TOKENS = 16
STEPS = 24  # of a decode measurement
ROUNDS = 5  # of a prefill measurement
GROWTH = 64  # room for new tokens in the caches
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        norms: whether queries and keys are normalized by heads, as Qwen 3 does.
        theta: base of the rotation.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    norms: bool = False
    tied: bool = True
    theta: float = 1e5

    def config(self, positions: int) -> Any:
        """Its configuration for transformers."""
        kind = transformers.Qwen3Config if self.norms else transformers.LlamaConfig
        return kind(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


SHAPES = {
    "smollm2-135m": Shape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152),
    "qwen3-0.6b": Shape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, norms=True, theta=1e6),
    "llama-3.2-1b": Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, theta=5e5),
    "tiny": Shape("tiny", 2, 64, 128, 4, 2, 16, 512),
    "tiny-norms": Shape("tiny-norms", 2, 64, 128, 4, 2, 32, 512, norms=True),
}


# The graph


class Graph:
    """An ONNX graph under construction, whose weights go to a file beside it.

    Args:
        folder: of the model's files.
        bits: of a weight in the matmuls: 16 as they are, or 8 and 4 in blocks.
    """

    def __init__(self, folder: Path, bits: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.bits = bits
        self.dtype = dtype
        self.onnx_type = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.matmul_bytes = 0
        self._file = (folder / "model.onnx.data").open("wb")
        self._names = 0

    def node(self, kind: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Add a node; gives its first output, the others are called the same with a number."""
        self._names += 1
        first = f"{kind}_{self._names}"
        names = [first, *(f"{first}_{place}" for place in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, names, name=first, domain=domain, **attributes))
        return first

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """Add an initializer, whose numbers are written at once."""
        array = tensor.detach().cpu().contiguous().numpy()
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        offset = -self._file.tell() % 4096
        self._file.write(bytes(offset))
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "model.onnx.data"),
            ("offset", str(self._file.tell())),
            ("length", str(array.nbytes)),
        ):
            proto.external_data.add(key=key, value=value)
        self._file.write(array.tobytes())
        self.initializers.append(proto)
        return name

    def constant(self, name: str, values: Any, dtype: type = np.int64) -> str:
        """Add a small initializer within the graph."""
        self.initializers.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def matmul(self, name: str, source: str, weight: torch.Tensor) -> str:
        """`source @ weight.T`, the weight as torch's Linear has it, [out, in]."""
        if self.bits == 16:
            self.matmul_bytes += weight.numel() * weight.element_size()
            return self.node("MatMul", [source, self.weight(name, weight.T.to(self.dtype))])
        packed, scales = in_blocks(weight, self.bits)
        self.matmul_bytes += packed.numel() + scales.numel() * torch.finfo(self.dtype).bits // 8
        inputs = [source, self.weight(name, packed), self.weight(f"{name}.scales", scales.to(self.dtype))]
        return self.node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=self.bits,
            block_size=BLOCK,
        )

    def norm(self, name: str, source: str, weight: torch.Tensor, epsilon: float) -> str:
        """A root mean square norm over the last axis."""
        inputs = [source, self.weight(name, weight.to(self.dtype))]
        return self.node("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=epsilon, stash_type=1)

    def save(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Path:
        """Write the graph; gives its file."""
        self._file.close()
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        path = self.folder / "model.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        return path


def in_blocks(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] in blocks of `BLOCK` with a scale each, as MatMulNBits reads it.

    Returns:
        Codes [out, blocks, BLOCK * bits / 8] uint8, the first of a byte in its low half; scales [out * blocks] float32.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
    middle = 2 ** (bits - 1)
    scales = blocks.abs().amax(dim=-1).clamp_min(1e-9) / (middle - 1)
    codes = (torch.round(blocks / scales[..., None]) + middle).clamp(0, 2 * middle - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales.reshape(-1)


def build(model: Any, shape: Shape, folder: Path, bits: int, positions: int) -> tuple[Path, int]:
    """Write a model of transformers as a graph.

    Inputs: input_ids [batch, new] int64; lengths [batch] int32, tokens in the cache after the run, minus one; total []
    int32, the largest of them plus one; past.<layer>.key and .value [batch, kv_heads, positions, head_size], which are
    also the outputs present.<layer>.*, in place. Outputs: logits [batch, vocabulary] of the last position, and next
    [batch, 1] int64, their greatest.

    Returns:
        Its file, and the bytes of weights that a step reads.
    """
    decoder = model.model
    graph = Graph(folder, bits, model.dtype)
    epsilon = model.config.rms_norm_eps
    angles = torch.arange(positions)[:, None] / shape.theta ** (torch.arange(0, shape.head_size, 2) / shape.head_size)
    cos, sin = (graph.weight(name, of(angles.double()).to(graph.dtype)) for name, of in _ROTATION.items())
    graph.constant("last", [-1])
    graph.constant("by_heads", [0, 0, -1, shape.head_size])
    graph.constant("flat", [0, 0, -1])
    table = graph.weight("embedding", decoder.embed_tokens.weight.to(graph.dtype))
    stream = graph.node("Gather", [table, "input_ids"])
    caches = []
    for number, layer in enumerate(decoder.layers):
        name = f"layers.{number}"
        hidden = graph.norm(f"{name}.norm", stream, layer.input_layernorm.weight, epsilon)
        parts = {
            part: graph.matmul(f"{name}.{part}", hidden, getattr(layer.self_attn, f"{part}_proj").weight)
            for part in "qkv"
        }
        if shape.norms:
            for part in "qk":
                heads = graph.node("Reshape", [parts[part], "by_heads"])
                weight = getattr(layer.self_attn, f"{part}_norm").weight
                heads = graph.norm(f"{name}.{part}_norm", heads, weight, epsilon)
                parts[part] = graph.node("Reshape", [heads, "flat"])
        past = [f"past.{number}.key", f"past.{number}.value"]
        attended = graph.node(
            "GroupQueryAttention",
            [parts["q"], parts["k"], parts["v"], *past, "lengths", "total", cos, sin],
            outputs=3,
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
        )
        for place, kind in enumerate(("key", "value"), 1):
            graph.nodes[-1].output[place] = f"present.{number}.{kind}"
        caches += past
        attended = graph.matmul(f"{name}.o", attended, layer.self_attn.o_proj.weight)
        stream = graph.node("Add", [stream, attended])
        hidden = graph.norm(f"{name}.norm2", stream, layer.post_attention_layernorm.weight, epsilon)
        gate = graph.matmul(f"{name}.gate", hidden, layer.mlp.gate_proj.weight)
        gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
        gate = graph.node("Mul", [gate, graph.matmul(f"{name}.up", hidden, layer.mlp.up_proj.weight)])
        stream = graph.node("Add", [stream, graph.matmul(f"{name}.down", gate, layer.mlp.down_proj.weight)])
    stream = graph.node("Gather", [stream, "last"], axis=1)  # positions that nobody reads need no norm and no head
    stream = graph.norm("norm", stream, decoder.norm.weight, epsilon)
    logits = graph.matmul("head", stream, model.lm_head.weight)
    graph.constant("middle", [1])
    graph.nodes.append(helper.make_node("Squeeze", [logits, "middle"], ["logits"]))
    graph.nodes.append(helper.make_node("ArgMax", ["logits"], ["next"], axis=1, keepdims=1))
    cache = ["batch", shape.kv_heads, positions, shape.head_size]
    described = [
        ("input_ids", TensorProto.INT64, ["batch", "new"]),
        ("lengths", TensorProto.INT32, ["batch"]),
        ("total", TensorProto.INT32, []),
        *((name, graph.onnx_type, cache) for name in caches),
    ]
    outputs = [("logits", graph.onnx_type, ["batch", shape.vocabulary]), ("next", TensorProto.INT64, ["batch", 1])]
    outputs += [(name.replace("past", "present"), graph.onnx_type, cache) for name in caches]
    path = graph.save(
        [helper.make_tensor_value_info(*one) for one in described],
        [helper.make_tensor_value_info(*one) for one in outputs],
    )
    return path, graph.matmul_bytes


_ROTATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"cos": torch.cos, "sin": torch.sin}


# The decoder


@dataclass(frozen=True)
class Device:
    """Where everything runs.

    Attributes:
        bandwidth: bytes a second that its memory was seen to move.
    """

    kind: str
    dtype: torch.dtype
    name: str
    bandwidth: float

    def wait(self) -> None:
        """Wait until its work is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


class Session:
    """A graph that is loaded.

    Args:
        captured: let steps for one token be replayed from CUDA graphs.
    """

    def __init__(self, path: Path, device: Device, *, captured: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.kind == "cuda":
            settings = {
                "user_compute_stream": str(torch.cuda.current_stream().cuda_stream),
                "enable_cuda_graph": "1" if captured else "0",
            }
            providers = [("CUDAExecutionProvider", settings)]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if device.kind == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeError("ONNX Runtime has no CUDA provider here: its libraries did not load")
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._captures = 0
        self.captured = captured

    def binding(self) -> Any:
        """Tensors of a run, none yet."""
        return self._session.io_binding()

    def next_capture(self) -> int:
        """The number of a CUDA graph that none has yet."""
        self._captures += 1
        return self._captures

    def run(self, binding: Any, capture: int) -> None:
        """Run it; with a number, from the CUDA graph of that number, which its second run captures."""
        if self.captured:
            self._run_options.add_run_config_entry("gpu_graph_id", str(capture))
        self._session.run_with_iobinding(binding, self._run_options)


NO_CAPTURE = -1


class Decoder:
    """Some streams of one length; everything that a step reads and writes lies in tensors of torch."""

    def __init__(self, session: Session, shape: Shape, device: Device, streams: int, positions: int) -> None:
        self._session = session
        size = (streams, shape.kv_heads, positions, shape.head_size)
        self._caches = {
            f"{layer}.{kind}": torch.zeros(size, dtype=device.dtype, device=device.kind)
            for layer in range(shape.layers)
            for kind in ("key", "value")
        }
        self.logits = torch.zeros(streams, shape.vocabulary, dtype=device.dtype, device=device.kind)
        self.next = torch.zeros(streams, 1, dtype=torch.int64, device=device.kind)
        self._ids = torch.zeros(streams, 1, dtype=torch.int64, device=device.kind)
        self._lengths = torch.zeros(streams, dtype=torch.int32, device=device.kind)
        self._tokens = 0  # in the caches, of each stream
        self._total = torch.zeros((), dtype=torch.int32)
        self._step = self._bound(self._ids)
        self._capture = session.next_capture()
        self._positions = positions

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Read prompts of one length [streams, tokens]; gives the next ids [streams, 1], on the device."""
        self._tokens = ids.shape[1]
        self._lengths.fill_(self._tokens - 1)
        self._total.fill_(self._tokens)
        self._session.run(self._bound(ids.contiguous()), NO_CAPTURE)
        return self.next

    def step(self) -> torch.Tensor:
        """Read the ids that were chosen last; gives the next ones [streams, 1], on the device."""
        self._ids.copy_(self.next)
        self._lengths += 1
        self._tokens += 1
        # A CUDA graph is the same for every length: kernels take that of each stream from the device.
        self._total.fill_(self._positions if self._session.captured else self._tokens)
        self._session.run(self._step, self._capture)
        return self.next

    def _bound(self, ids: torch.Tensor) -> Any:
        binding = self._session.binding()
        binding.bind_input("total", "cpu", 0, np.int32, [], self._total.data_ptr())
        for name, tensor in (("input_ids", ids), ("lengths", self._lengths)):
            _bind(binding.bind_input, name, tensor)
        for name, tensor in self._caches.items():
            _bind(binding.bind_input, f"past.{name}", tensor)
            _bind(binding.bind_output, f"present.{name}", tensor)
        _bind(binding.bind_output, "logits", self.logits)
        _bind(binding.bind_output, "next", self.next)
        return binding


def _bind(bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
    kinds = {torch.float16: np.float16, torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32}
    bind(name, tensor.device.type, 0, kinds[tensor.dtype], list(tensor.shape), tensor.data_ptr())


# What is measured


class Run:
    """One run of everything: parts, their results, and the time that is left.

    Args:
        seconds: after which no part begins.
        out: the file of the results.
    """

    def __init__(self, device: Device, seconds: float, out: Path | None) -> None:
        self.device = device
        self.results: dict[str, Any] = {
            "device": device.name,
            "bandwidth_gb_s": round(device.bandwidth / 1e9, 1),
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, onnx)},
            "parts": {},
            "left_out": [],
            "failed": {},
        }
        self._until = time.monotonic() + seconds
        self._out = out

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any] | None]:
        """A part's results, to be filled; None if there is no time for it. An error ends the part alone."""
        if time.monotonic() > self._until:
            self.results["left_out"].append(name)
            yield None
            return
        found: dict[str, Any] = {}
        began = time.monotonic()
        try:
            yield found
        except Exception as error:
            traceback.print_exc()
            found["failed"] = self.results["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
        found["seconds"] = round(time.monotonic() - began, 1)
        self.results["parts"][name] = found
        print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        if self._out is not None:
            self._out.write_text(json.dumps(self.results, indent=1))


def measure(run: Run, shape: Shape, bits: Sequence[int], streams: Sequence[int], prompts: Sequence[int]) -> None:
    """All parts of one shape."""
    device = run.device
    positions = max(prompts) + GROWTH
    torch.manual_seed(0)
    with torch.device(device.kind):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(positions), dtype=device.dtype).eval()
    for width in bits:
        name = f"{shape.name} {width} bits"
        with tempfile.TemporaryDirectory() as folder:
            for captured in (False, True) if device.kind == "cuda" else (False,):
                suffix = ", CUDA graphs" if captured else ""
                with run.part(f"{name}: against torch{suffix}") as found:
                    if found is None:
                        continue
                    if not captured:
                        path, weights = build(model, shape, Path(folder), width, positions)
                    session = Session(path, device, captured=captured)
                    found |= compare(session, shape, device, model, positions)
                if found.get("failed"):
                    continue
                for count in streams:
                    with run.part(f"{name}, {count} streams{suffix}") as found:
                        if found is not None:
                            found |= decode(session, shape, device, count, prompts[0], weights)
                for length in prompts if not captured else ():
                    with run.part(f"{name}, prompt of {length}") as found:
                        if found is not None:
                            found |= prefill(session, shape, device, length, positions)
    for count in (streams[0], streams[-1]):
        with run.part(f"{shape.name}, transformers, {count} streams") as found:
            if found is not None:
                found |= peer(model, shape, device, count, prompts[0], cache_implementation="static")
    if importlib.util.find_spec("deepspeed") is None:
        return
    with run.part(f"{shape.name}, DeepSpeed") as found:  # last: it puts its own parts into the model
        if found is None:
            return
        found["kernels"], model = with_deepspeed(model, device)
    for count in (streams[0], streams[-1]) if not found.get("failed") else ():
        with run.part(f"{shape.name}, DeepSpeed, {count} streams") as found:
            if found is not None:
                found |= peer(model, shape, device, count, prompts[0])


@torch.inference_mode()
def compare(session: Session, shape: Shape, device: Device, model: Any, positions: int) -> dict[str, Any]:
    """A prompt's logits and a few greedy steps beside torch's, which reads what the graph has chosen."""
    ids = torch.randint(0, shape.vocabulary, (2, 48), device=device.kind)
    decoder = Decoder(session, shape, device, 2, positions)
    worst, divergence, same = 0.0, 0.0, 0
    for place in range(CHECKED_TOKENS):
        token = decoder.prefill(ids) if not place else decoder.step()
        device.wait()
        expected = model(ids).logits[:, -1].float()
        got = decoder.logits.float()
        worst = max(worst, float((got - expected).abs().max()))
        reference = expected.log_softmax(-1)
        divergence += float((reference.exp() * (reference - got.log_softmax(-1))).sum(-1).mean())
        same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        if not bool((got.argmax(-1) == token[:, 0]).all()):
            raise RuntimeError("the token that was chosen on the device is not that of its logits")
        ids = torch.cat([ids, token], 1)
    return {
        "largest_difference": worst,
        "spread": float(expected.std()),
        "kl": divergence / CHECKED_TOKENS,
        "top1": same / (2 * CHECKED_TOKENS),
    }


@torch.inference_mode()
def decode(session: Session, shape: Shape, device: Device, streams: int, prompt: int, weights: int) -> dict[str, Any]:
    """Steps of so many streams, whose ids go to the host one by one."""
    decoder = Decoder(session, shape, device, streams, prompt + GROWTH)
    ids = torch.randint(0, shape.vocabulary, (streams, prompt), device=device.kind)
    decoder.prefill(ids)
    for _ in range(4):  # the first ones choose kernels, and capture
        decoder.step().cpu()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        decoder.step().cpu()
        times.append(time.perf_counter() - began)
    step = statistics.median(times)
    element = torch.finfo(device.dtype).bits // 8
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * element * prompt * streams
    return {
        "step_ms": 1e3 * step,
        "tokens_s": streams / step,
        "bandwidth_share": (weights + cache) / step / device.bandwidth,
    }


@torch.inference_mode()
def prefill(session: Session, shape: Shape, device: Device, length: int, positions: int) -> dict[str, Any]:
    """A lone prompt, until its first token is on the host."""
    decoder = Decoder(session, shape, device, 1, positions)
    times = []
    for _ in range(ROUNDS + 1):
        ids = torch.randint(0, shape.vocabulary, (1, length), device=device.kind)
        device.wait()
        began = time.perf_counter()
        decoder.prefill(ids).cpu()
        times.append(time.perf_counter() - began)
    first = statistics.median(times[1:])
    return {"first_token_ms": 1e3 * first, "tokens_s": length / first}


def with_deepspeed(model: Any, device: Device) -> tuple[bool, Any]:
    """The model in DeepSpeed's inference engine, and whether it computes with DeepSpeed's own kernels.

    It has none for a CPU, and not for every model; then its engine runs the model's own layers.
    """
    import deepspeed

    if device.kind == "cuda":
        try:
            engine = deepspeed.init_inference(copy.deepcopy(model), dtype=device.dtype, replace_with_kernel_inject=True)
            engine.module.generate(torch.zeros((1, 2), dtype=torch.int64, device=device.kind), max_new_tokens=2)
        except Exception:  # of a part that knows another transformers
            traceback.print_exc()
        else:
            return True, engine.module
    return False, deepspeed.init_inference(model, dtype=device.dtype).module


def peer(model: Any, shape: Shape, device: Device, streams: int, prompt: int, **options: Any) -> dict[str, Any]:
    """The same steps by transformers' generate, which compiles a model with a static cache on a GPU."""
    ids = torch.randint(0, shape.vocabulary, (streams, prompt), device=device.kind)
    mask = torch.ones_like(ids)

    def generate(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            **options,
        )
        device.wait()
        return time.perf_counter() - began

    generate(STEPS)  # compiles
    whole, one = (statistics.median(generate(tokens) for _ in range(3)) for tokens in (STEPS, 1))
    step = (whole - one) / (STEPS - 1)
    return {"step_ms": 1e3 * step, "tokens_s": streams / step, "first_token_ms": 1e3 * one}


def describe(kind: str) -> Device:
    """The device, with the bandwidth of a copy within its memory."""
    dtype = torch.float16 if kind == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    source = torch.zeros(2**28 if kind == "cuda" else 2**24, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    device = Device(kind, dtype, name, math.nan)
    times = []
    for _ in range(6):
        device.wait()
        began = time.perf_counter()
        target.copy_(source)
        device.wait()
        times.append(time.perf_counter() - began)
    return Device(kind, dtype, name, 2 * source.numel() / min(times))


def main(arguments: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Measure; gives and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b"]
    )
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048], help="tokens; decoding begins after one")
    parser.add_argument("--seconds", type=float, default=420.0, help="no part begins later (default %(default)g)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    import onnxruntime

    if options.device == "cuda":
        onnxruntime.preload_dlls()  # those that torch brings
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one can't be captured
    run = Run(describe(options.device), options.seconds, options.out)
    run.results["versions"]["onnxruntime"] = onnxruntime.__version__
    for name in options.shapes:
        measure(run, SHAPES[name], options.bits, options.streams, options.prompts)
    print(json.dumps(run.results, indent=1))
    return run.results


if __name__ == "__main__":
    main()
