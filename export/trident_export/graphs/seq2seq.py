"""Export of transformers' encoder-decoder models to two ONNX graphs: encode once, decode many beams together.

The encoder gives the keys and values of every decoder layer's cross-attention, computed once for a text:

    input_ids            int64   [texts, sequence]
    attention_mask       int64   [texts, sequence]     1 for a text's tokens, 0 behind them
                         of speech: input_features float32 [texts, mels, frames], as many frames as the model reads
    -> cross.<layer>.key     float32 [texts, H, D, sequence]   transposed, as the matmul with the queries reads it
    -> cross.<layer>.value   float32 [texts, H, sequence, D]

It computes a text's tokens only (`unpadding`), and texts are padded to a multiple of `LENGTH_STEP` positions, so that
the numbers of a text are the same to the last bit whatever is encoded with it. A first run of texts alone and together
shows whether that holds. Where it does not, the graph has no mask and takes texts one at a time.

The decoder appends one token to each row. A row is a beam; its self-attention is ONNX Runtime's `GroupQueryAttention`
with a cache that is bound in place, so every beam has its own length. The beams of one text share the text's keys and
values: around the cross-attention the rows are spread over (text, position).

    input_ids              int64   [rows, 1]
    positions              int64   [rows]            of the token in its row, from 0
    seqlens_k              int32   [rows]            the same, as the operator reads it
    total_sequence_length  int32   []                the capacity
    cross_rows             int64   [texts, places]   which row is at each position of a text
    cross_places           int64   [rows]            where each row is: text x places + position
    cross_mask             float32 [texts, 1, 1, L]  0 for the text's tokens, a large negative number behind them
    cross.<layer>.key      float32 [texts, H, D, L]
    cross.<layer>.value    float32 [texts, H, L, D]
    past.<layer>.{key,value}      float32 [rows, H, capacity, D]
    -> logits              float32 [rows, vocabulary]
    -> present.<layer>.{key,value}

While the decoder is traced its attention modules are replaced by functions of their projections, which three shapes of
modules share: BART's (Marian, mBART, Pegasus, M2M100, LED), T5's (UMT5, Switch), whose relative positions become the
operator's `attention_bias`, and T5Gemma's, whose rotation, window and soft cap are the operator's own and whose queries
share heads of keys. Operator reference: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from trident_export.errors import ExportError, UnsupportedArchitecture
from trident_export.graphs import editing
from trident_export.graphs.decoder_passes import attention_nodes, drop_idle_casts, fuse_norms
from trident_export.graphs.experts import every_expert
from trident_export.graphs.led import windows_of_any_length
from trident_export.graphs.rotary import MULTIPLE
from trident_export.graphs.shape_folding import fold_shapes
from trident_export.graphs.tracing import trace
from trident_export.graphs.unpadding import unpad
from trident_serving.seq2seq.decoder import LENGTH_STEP, LONGEST_PADDED, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions of optional inputs of the attention operator: the rotation's cosines (then sines), and `attention_bias`.
_ROTATION, _BIAS = 7, 10
_CROSS = ("encoder_attn", "cross_attn", "cross_attention")  # what a layer calls its cross-attention
_LANGUAGE = "takes the language of an answer as an argument of its own (tgt_lang), which Trident does not have"
# Types whose graphs are not all that they would need, and what that is.
_LACKING = {
    "fsmt": "has a tokenizer without a fast form (tokenizer.json), which the runtime reads",
    "prophetnet": "predicts several tokens at once by attention of its own, which Trident does not have",
    "seamless_m4t": _LANGUAGE,
    "seamless_m4t_v2": _LANGUAGE,
}
# What a layer gets from its attention besides the hidden states, and hands on or drops.
_ALSO: dict[str, int] = {"T5Attention": 2, "MT5Attention": 2, "LongT5Attention": 2, "SwitchTransformersAttention": 2}
_ALSO |= {"LEDDecoderAttention": 2}


@dataclass
class _Encoded(BaseModelOutput):
    """What a decoder is told of its text, from which it reads nothing: keys and values come from the cache."""

    router_logits: Any = None


@dataclass(frozen=True)
class Attention:
    """One attention module of a decoder layer, whatever its architecture calls its projections.

    Attributes:
        groups: heads of queries that share one of keys and values.
        window: positions that a query sees at most; -1: all.
        softcap: 0: none.
        rotates: whether queries and keys are rotated.
    """

    module: torch.nn.Module
    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    output: torch.nn.Linear
    heads: int
    head_dim: int
    scale: float
    groups: int = 1
    window: int = -1
    softcap: float = 0.0
    rotates: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads // self.groups

    @classmethod
    def of(cls, module: Any) -> Attention:
        """Read a module of BART's, T5's or T5Gemma's shape.

        Raises:
            UnsupportedArchitecture: it has another.
        """
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "head_dim")):
            scale = float(module.scaling)
            parts = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
            return cls(module, *parts, module.num_heads, module.head_dim, scale)
        if all(hasattr(module, name) for name in ("q", "k", "v", "o", "n_heads", "key_value_proj_dim")):
            return cls(module, module.q, module.k, module.v, module.o, module.n_heads, module.key_value_proj_dim, 1.0)
        if type(module).__name__ in ("T5GemmaSelfAttention", "T5GemmaCrossAttention"):
            return cls(
                module,
                *(module.q_proj, module.k_proj, module.v_proj, module.o_proj),
                heads=module.q_proj.out_features // module.head_dim,
                head_dim=module.head_dim,
                scale=float(module.scaling),
                groups=module.num_key_value_groups,
                window=getattr(module, "sliding_window", None) or -1,
                softcap=float(module.attn_logit_softcapping or 0.0),
                rotates=hasattr(module, "layer_type"),
            )
        raise UnsupportedArchitecture(
            f"{type(module).__name__} is no attention of BART's, T5's or T5Gemma's kind, which Trident exports: choose "
            "another model"
        )


def decoder_attentions(model: PreTrainedModel) -> list[tuple[Attention, Attention]]:
    """Self- and cross-attention of each decoder layer.

    Raises:
        UnsupportedArchitecture: the layers have another shape.
    """
    if getattr(model.config, "attention_type", "") == "block_sparse":
        raise UnsupportedArchitecture(
            f"{type(model).__name__} attends to blocks of long texts, which a graph does not: set attention_type to "
            "original_full in its config.json, or choose another model"
        )
    if (lacking := _LACKING.get(str(model.config.model_type))) is not None:
        raise UnsupportedArchitecture(f"{type(model).__name__} {lacking}: choose another model")
    decoder = model.get_decoder()
    if hasattr(decoder, "block"):
        return [
            (Attention.of(b.layer[0].SelfAttention), Attention.of(b.layer[1].EncDecAttention)) for b in decoder.block
        ]
    found = []
    for layer in getattr(decoder, "layers", None) or ():
        cross = [getattr(layer, name) for name in _CROSS if hasattr(layer, name)]
        if not cross or not hasattr(layer, "self_attn"):
            break
        found.append((Attention.of(layer.self_attn), Attention.of(cross[0])))
    else:
        if found:
            return found
    raise UnsupportedArchitecture(
        f"the decoder of a {type(model).__name__} has no layers of a self-attention and a cross-attention, which "
        "Trident exports: choose another model"
    )


class _Encoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.encoder = model.get_encoder()
        self.attentions = [cross for _, cross in decoder_attentions(model)]
        self.projections = torch.nn.ModuleList([part for a in self.attentions for part in (a.key, a.value)])

    def forward(self, source: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        hidden = self.encoder(source, **mask).last_hidden_state
        flat = []
        for attention in self.attentions:
            key, value = (
                part(hidden).view(*hidden.shape[:2], attention.kv_heads, attention.head_dim)
                for part in (attention.key, attention.value)
            )
            flat += [key.permute(0, 2, 3, 1), value.transpose(1, 2)]
        return tuple(flat)


class _SelfAttention(torch.autograd.Function):
    """Traced for its shapes, written to the graph as one operator; `place_inputs` moves its inputs."""

    @staticmethod
    def forward(ctx, own, packed, past_key, past_value, seqlens_k, total, *others):  # type: ignore[no-untyped-def]
        return packed[..., : own.heads * own.head_dim].clone(), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(g, own, packed, past_key, past_value, seqlens_k, total, *others):  # type: ignore[no-untyped-def]
        # Only what is not the operator's default: graphs of other models stay as they are.
        more = {"local_window_size_i": own.window} if own.window > 0 else {}
        more |= {"softcap_f": own.softcap} if own.softcap else {}
        more |= {"do_rotary_i": 1} if own.rotates else {}
        attention, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            packed,
            past_key,
            past_value,
            seqlens_k,
            total,
            *others,
            num_heads_i=own.heads,
            kv_num_heads_i=own.kv_heads,
            scale_f=own.scale,
            **more,
            outputs=3,
        )
        attention.setType(packed.type().with_sizes([None, 1, own.heads * own.head_dim]))
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attention, present_key, present_value


class _Decoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        self.model = model
        self.attentions = decoder_attentions(model)
        for layer, (own, _) in enumerate(self.attentions):
            parts = (own.query, own.key, own.value)
            self.register_buffer(f"weight_{layer}", torch.cat([part.weight for part in parts]))
            # Whisper's keys have none, its queries and values have.
            biases: list[torch.Tensor] = [
                torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts
            ]
            biased = any(part.bias is not None for part in parts)
            self.register_buffer(f"bias_{layer}", torch.cat(biases) if biased else None)
        table = _position_table(model, capacity)
        self.register_buffer("position_table", table)
        cos, sin = _rotation(model, capacity) if any(own.rotates for own, _ in self.attentions) else (None, None)
        self.register_buffer("cos_cache", cos)
        self.register_buffer("sin_cache", sin)
        # T5's first layer has the bias of all layers, each of UMT5's its own.
        tables = [_relative_bias(own.module, capacity) for own, _ in self.attentions]
        for layer, relative in enumerate(tables):
            self.register_buffer(f"relative_{layer}", relative)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        seqlens_k, total, rows, places, mask, *flat = others
        count = 2 * len(self.attentions)
        cross, past = flat[:count], flat[count:]
        biases = self._biases(positions)
        present: list[torch.Tensor] = []

        def attend(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            own = self.attentions[layer][0]
            packed = functional.linear(hidden, getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}"))
            others = (self.cos_cache, self.sin_cache) if own.rotates else biases[layer]
            output, key, value = _SelfAttention.apply(  # type: ignore[no-untyped-call]
                own, packed, past[2 * layer], past[2 * layer + 1], seqlens_k, total, *others
            )
            present.extend((key, value))
            projected: torch.Tensor = own.output(output)
            return projected

        def read(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            own = self.attentions[layer][1]
            width = own.heads * own.head_dim
            query = (own.query(hidden) * own.scale).view(-1, width)
            spread = query.index_select(0, rows.reshape(-1)).view(*rows.shape, own.heads, own.head_dim).transpose(1, 2)
            if own.groups > 1:  # those of one head of keys stand one behind the other
                spread = spread.reshape(rows.shape[0], own.kv_heads, -1, own.head_dim)
            scores = torch.matmul(spread, cross[2 * layer])
            if own.softcap:
                scores = torch.tanh(scores / own.softcap) * own.softcap
            found = torch.matmul(torch.softmax(scores + mask, dim=-1), cross[2 * layer + 1])
            if own.groups > 1:
                found = found.reshape(rows.shape[0], own.heads, -1, own.head_dim)
            found = found.transpose(1, 2).reshape(-1, width)
            projected: torch.Tensor = own.output(found.index_select(0, places).unsqueeze(1))
            return projected

        table: torch.Tensor | None = self.position_table  # type: ignore[assignment]
        width = self.attentions[0][1].key.in_features
        with _replaced(self.model, self.attentions, attend, read, table, positions):
            logits = self.model(
                decoder_input_ids=input_ids,
                encoder_outputs=_Encoded(torch.zeros(1, 1, width).expand(input_ids.shape[0], 1, -1)),
                use_cache=False,
            ).logits
        return (logits[:, -1], *present)

    def _biases(self, positions: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Each layer's relative bias of the rows' tokens, [rows, heads, 1, capacity]; what is ahead is masked."""
        found: list[tuple[torch.Tensor, ...]] = []
        for layer in range(len(self.attentions)):
            table: torch.Tensor | None = getattr(self, f"relative_{layer}")
            if table is None:
                found.append(found[0] if found else ())
                continue
            distance = (positions[:, None] - torch.arange(table.shape[0])[None]).clamp(min=0)
            found.append((table[distance].permute(0, 2, 1).unsqueeze(2),))
        return found


@contextmanager
def _replaced(
    model: PreTrainedModel,
    attentions: list[tuple[Attention, Attention]],
    attend: Any,
    read: Any,
    table: torch.Tensor | None,
    positions: torch.Tensor,
) -> Iterator[None]:
    """The decoder's attention modules and its positions, for one forward pass."""

    def forward(function: Any, layer: int) -> Any:
        unused = (torch.zeros(1), None)[-_ALSO.get(type(attentions[0][0].module).__name__, 1) :]
        return lambda self, hidden_states, *args, **kwargs: (function(layer, hidden_states), *unused)

    modules = [own.module for pair in attentions for own in pair]
    for layer, (own, cross) in enumerate(attentions):
        own.module.forward = types.MethodType(forward(attend, layer), own.module)
        cross.module.forward = types.MethodType(forward(read, layer), cross.module)
    if table is not None:
        embed = model.get_decoder().embed_positions
        modules.append(embed)
        embed.forward = types.MethodType(lambda self, *args, **kwargs: table[positions].unsqueeze(1), embed)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _position_table(model: PreTrainedModel, capacity: int) -> torch.Tensor | None:
    """The decoder's embedding of each position, [capacity, width]; None where it has none."""
    embed: Any = getattr(model.get_decoder(), "embed_positions", None)
    if embed is None:
        return None
    offset = getattr(embed, "offset", 0)
    if hasattr(embed, "get_embedding"):  # M2M100 computes them, from behind the padding token on
        first = embed.padding_idx + 1
        weights: torch.Tensor = embed.get_embedding(first + capacity, embed.embedding_dim, embed.padding_idx)
        return weights[first : first + capacity].float()
    if getattr(embed, "weight", None) is None:
        raise UnsupportedArchitecture(
            f"{type(embed).__name__} computes positions in a way that Trident does not have: choose another model"
        )
    weights = embed.weight.detach()
    if weights.shape[0] < capacity + offset:
        raise UnsupportedArchitecture(
            f"the decoder has {weights.shape[0] - offset} positions, {capacity} are asked for"
        )
    return weights[offset : offset + capacity]


def _rotation(model: PreTrainedModel, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the decoder's positions, [capacity, half of a head's numbers].

    Raises:
        UnsupportedArchitecture: heads have a size that the operator can't rotate.
    """
    decoder: Any = model.get_decoder()
    cos, sin = decoder.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])
    if cos.shape[-1] % MULTIPLE:
        raise UnsupportedArchitecture(
            f"the heads of a {type(model).__name__} have {cos.shape[-1]} numbers, and ONNX Runtime's operator rotates "
            f"multiples of {MULTIPLE} only: choose another model"
        )
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _relative_bias(module: Any, capacity: int) -> torch.Tensor | None:
    """T5's bias by distance of one attention module, [capacity, heads]; None where it has none."""
    if not getattr(module, "has_relative_attention_bias", False):
        return None
    distances, weight = -torch.arange(capacity), module.relative_attention_bias.weight.detach()
    if "num_buckets" in inspect.signature(module._relative_position_bucket).parameters:
        buckets = module._relative_position_bucket(
            distances,
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
    else:  # UMT5's knows these itself
        buckets = module._relative_position_bucket(distances)
    found: torch.Tensor = weight[buckets]
    return found


def export_encoder(model: PreTrainedModel, path: Path, longest: int | None = None) -> None:
    """Write the encoder's graph.

    Args:
        longest: positions that the encoder has; None: any number.
    """
    layers = len(decoder_attentions(model))
    outputs = [f"cross.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    if (features := model.main_input_name) == "input_features":
        source = torch.zeros(2, model.config.num_mel_bins, 2 * model.config.max_source_positions)  # these are halved
        speech_axes = {name: {0: "texts"} for name in (features, *outputs)}
        _export(_Encoder(model), (source,), path, [features], outputs, speech_axes, longest)
        return
    sizes = {0: "texts", 1: "sequence"}
    axes = {"input_ids": sizes, "attention_mask": sizes}
    axes |= {name: {0: "texts", 3 if name.endswith("key") else 2: "sequence"} for name in outputs}
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    encoder = _Encoder(model)
    with suppress(ExportError):
        _export(encoder, (ids, mask), path, ["input_ids", "attention_mask"], outputs, axes, longest)
        if texts_stay_apart(encoder, path, longest):
            return
    del axes["attention_mask"]
    _export(encoder, (ids,), path, ["input_ids"], outputs, axes)


def texts_stay_apart(encoder: _Encoder, path: Path, longest: int | None) -> bool:
    """Whether a graph gives texts what the model gives them, and the same to the last bit alone and together."""
    config: Any = encoder.model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    size = min(getattr(config, name, None) or config.vocab_size for name in ("src_vocab_size", "vocab_size"))
    texts = [
        torch.randint(size // 4, size // 2, (length,), generator=generator)
        for length in (2, 9, LENGTH_STEP + 6)
        if longest is None or padded(length) <= longest
    ]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it can't run is no error here
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        together = _encoded(session, texts)
        alone = [_encoded(session, [text])[0] for text in texts]
    except Exception:  # of ONNX Runtime's own types
        return False
    with torch.inference_mode():
        expected = [[array[0].numpy() for array in encoder(text[None])] for text in texts]
    return bool(texts) and all(
        np.array_equal(one, other) and np.allclose(one, own, rtol=1e-3, atol=1e-4 * np.abs(own).max())
        for text in zip(together, alone, expected, strict=True)
        for one, other, own in zip(*text, strict=True)
    )


def _encoded(session: ort.InferenceSession, texts: Sequence[torch.Tensor]) -> list[list[NDArray[np.float32]]]:
    """The outputs for each of some texts that run together."""
    ids, mask = np.zeros((2, len(texts), padded(max(map(len, texts)))), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    outputs = session.run(None, {"input_ids": ids, "attention_mask": mask})
    keys = [node.name.endswith("key") for node in session.get_outputs()]
    return [
        [array[row, :, :, :size] if key else array[row, :, :size] for key, array in zip(keys, outputs, strict=True)]
        for row, size in enumerate(map(len, texts))
    ]


def export_decoder(model: PreTrainedModel, path: Path, capacity: int) -> None:
    """Write the decoder's graph.

    Args:
        capacity: positions of a row of the cache that the graph will be used with.

    Raises:
        UnsupportedArchitecture: it has a shape that is not known, or fewer positions.
    """
    attentions = decoder_attentions(model)
    own = attentions[0][0]
    rows, texts, length = 3, 2, 7
    shapes = {
        "key": ((texts, own.kv_heads, own.head_dim, length), {0: "texts", 3: "length"}),
        "value": ((texts, own.kv_heads, length, own.head_dim), {0: "texts", 2: "length"}),
    }
    names = ["input_ids", "positions", "seqlens_k", "total_sequence_length", "cross_rows", "cross_places", "cross_mask"]
    arguments = [
        torch.ones(rows, 1, dtype=torch.long),
        torch.tensor([1, 0, 2]),
        torch.tensor([1, 0, 2], dtype=torch.int32),
        torch.tensor(capacity, dtype=torch.int32),
        torch.tensor([[0, 0], [1, 2]]),
        torch.tensor([0, 2, 3]),
        torch.zeros(texts, 1, 1, length),
    ]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "rows"},
        "positions": {0: "rows"},
        "seqlens_k": {0: "rows"},
        "cross_rows": {0: "texts", 1: "places"},
        "cross_places": {0: "rows"},
        "cross_mask": {0: "texts", 3: "length"},
        "logits": {0: "rows"},
    }
    outputs = ["logits"]
    for layer in range(len(attentions)):
        for kind, (shape, axis) in shapes.items():
            names.append(f"cross.{layer}.{kind}")
            arguments.append(torch.zeros(shape))
            axes[names[-1]] = axis
    for layer in range(len(attentions)):
        for kind in ("key", "value"):
            names.append(f"past.{layer}.{kind}")
            outputs.append(f"present.{layer}.{kind}")
            arguments.append(torch.zeros(rows, own.kv_heads, capacity, own.head_dim))
            axes[names[-1]] = axes[outputs[-1]] = {0: "rows"}
    _export(_Decoder(model, capacity), tuple(arguments), path, names, outputs, axes)


def _export(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
    longest: int | None = None,
) -> None:
    said, operators = f"a {type(module.model).__name__}", isinstance(module, _Decoder)
    with ExitStack() as stack:
        stack.enter_context(every_expert(module.model))
        stack.enter_context(windows_of_any_length(module.model))
        graph = trace(module, arguments, inputs=inputs, outputs=outputs, axes=axes, of=said, operators=operators)
    for node in attention_nodes(graph):
        place_inputs(node)
    fold_shapes(graph)
    drop_idle_casts(graph)
    if "attention_mask" in inputs:
        if "attention_mask" not in {value.name for value in graph.graph.inputs if value.uses()}:
            raise UnsupportedArchitecture(
                f"{said} does not read its mask, so texts of several lengths can't be together"
            )
        unpad(graph)
        graph.metadata_props[LONGEST_PADDED] = str(longest or 0)
    editing.save(fuse_norms(graph), path)


def place_inputs(node: ir.Node) -> None:
    """Move the attention operator's inputs to their positions behind optional ones that are absent."""
    packed, past_key, past_value, seqlens_k, total, *others = node.inputs
    placed = [packed, None, None, past_key, past_value, seqlens_k, total]
    if others:
        position = _ROTATION if len(others) > 1 else _BIAS
        placed += [None] * (position - len(placed)) + others
    editing.set_inputs(node, placed)
