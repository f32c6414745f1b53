"""The tensors of an encoder task's ensemble, as data: what its stages read and write.

A new task is a row here, a preprocess and a postprocess in trident_serving, and a loader in `tasks.encoders`.
Shapes leave the batch out where the ensemble batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trident_serving.schema.limits import (
    AnswerLimits,
    EmbeddingLimits,
    EncoderLimits,
    EntityLimits,
    FillMaskLimits,
    LabelLimits,
)

# Name, Triton's type without TYPE_, shape.
Tensor = tuple[str, str, tuple[int, ...]]

_INPUT_IDS: Tensor = ("input_ids", "INT64", (-1,))
_ATTENTION_MASK: Tensor = ("attention_mask", "INT64", (-1,))
_TOKEN_TYPE_IDS: Tensor = ("token_type_ids", "INT64", (-1,))
_SINGLE = (_INPUT_IDS, _ATTENTION_MASK)
_PAIR = (*_SINGLE, _TOKEN_TYPE_IDS)
_TRUNCATE: Tensor = ("truncate", "BOOL", (1,))
_TOP_K: Tensor = ("top_k", "INT32", (1,))


@dataclass(frozen=True)
class Stages:
    """One task's ensemble.

    Attributes:
        texts: what a request must give.
        tokenizer_options: what it may give to the first stage.
        model_inputs: what the graph reads.
        model_outputs: what it gives.
        read: what the last stage reads of the texts, the tokens and the graph's outputs.
        postprocess_options: what a request may give to the last stage.
        answers: what the ensemble gives.
        extra: what the first stage gives beside the graph's inputs.
        batched: whether the batch of a request is that of the graph; a question may need several windows.
        tokenizer_parameters: and `postprocess_parameters`, for the configs.
    """

    texts: tuple[Tensor, ...]
    tokenizer_options: tuple[Tensor, ...]
    model_inputs: tuple[Tensor, ...]
    model_outputs: tuple[Tensor, ...]
    read: tuple[Tensor, ...]
    postprocess_options: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    extra: tuple[Tensor, ...] = ()
    batched: bool = True
    tokenizer_parameters: Mapping[str, object] = field(default_factory=dict)
    postprocess_parameters: Mapping[str, object] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """What the first stage gives."""
        if self.batched:
            return (*self.model_inputs, *self.extra)
        rows = tuple((name, kind, (-1, *shape)) for name, kind, shape in self.model_inputs)
        return (*rows, *self.extra)


def stages(task: str, limits: EncoderLimits) -> Stages:
    """The ensemble of a task with these limits."""
    encoding: dict[str, object] = {
        "max_tokens": limits.max_tokens,
        "max_bytes": limits.max_bytes,
        "buckets": ",".join(map(str, limits.all_buckets)),
        "truncate": limits.truncate,
    }
    text: Tensor = ("text_input", "STRING", (1,))
    score: Tensor = ("score", "FP32", (-1,))
    if isinstance(limits, EmbeddingLimits):
        pooled: Tensor = ("pooled", "FP32", (limits.dimensions,))
        return Stages(
            texts=(text,),
            tokenizer_options=(_TRUNCATE, ("prompt_name", "STRING", (1,))),
            model_inputs=_SINGLE,
            model_outputs=(pooled,),
            read=(pooled,),
            postprocess_options=(),
            answers=(("embedding", "FP32", (limits.dimensions,)),),
            tokenizer_parameters=encoding,
        )
    if isinstance(limits, EntityLimits):
        logits: Tensor = ("logits", "FP32", (-1, limits.labels))
        spans: Tensor = ("token_spans", "INT32", (-1, 2))
        return Stages(
            texts=(text,),
            tokenizer_options=(_TRUNCATE,),
            model_inputs=_SINGLE,
            model_outputs=(logits,),
            read=(text, _INPUT_IDS, logits, spans),
            postprocess_options=(("aggregation_strategy", "STRING", (1,)),),
            answers=(
                ("entity", "STRING", (-1,)),
                score,
                ("word", "STRING", (-1,)),
                ("start", "INT32", (-1,)),
                ("end", "INT32", (-1,)),
            ),
            extra=(spans,),
            tokenizer_parameters=encoding,
            postprocess_parameters={"aggregation": limits.aggregation},
        )
    if isinstance(limits, LabelLimits):
        logits = ("logits", "FP32", (limits.labels,))
        ranking = task == "text-ranking"
        return Stages(
            texts=(("query", "STRING", (1,)), text) if ranking else (text,),
            tokenizer_options=(_TRUNCATE,) if ranking else (_TRUNCATE, ("text_pair", "STRING", (1,))),
            model_inputs=_PAIR,
            model_outputs=(logits,),
            read=(logits,),
            postprocess_options=() if ranking else (_TOP_K,),
            answers=(("score", "FP32", (limits.labels,)),) if ranking else (("label", "STRING", (-1,)), score),
            tokenizer_parameters=encoding,
        )
    if isinstance(limits, AnswerLimits):
        outputs: tuple[Tensor, ...] = (("start_logits", "FP32", (-1,)), ("end_logits", "FP32", (-1,)))
        places: tuple[Tensor, ...] = (("token_spans", "INT32", (-1, -1, 4)), ("window_question", "INT32", (-1,)))
        context: Tensor = ("context", "STRING", (-1,))
        return Stages(
            texts=(("question", "STRING", (-1,)), context),
            tokenizer_options=(),
            model_inputs=_PAIR,
            model_outputs=outputs,
            read=(context, *((name, kind, (-1, *shape)) for name, kind, shape in outputs), *places),
            postprocess_options=(_TOP_K, ("max_answer_len", "INT32", (1,)), ("handle_impossible_answer", "BOOL", (1,))),
            answers=(
                ("answer", "STRING", (-1, -1)),
                ("score", "FP32", (-1, -1)),
                ("start", "INT32", (-1, -1)),
                ("end", "INT32", (-1, -1)),
                ("no_answer_score", "FP32", (-1,)),
            ),
            extra=places,
            batched=False,
            tokenizer_parameters=encoding | {"stride": limits.stride, "max_windows": limits.max_batch_size},
        )
    assert isinstance(limits, FillMaskLimits)
    top: tuple[Tensor, ...] = (
        ("top_scores", "FP32", (-1, limits.top_k)),
        ("top_ids", "INT64", (-1, limits.top_k)),
        ("log_normalizer", "FP32", (-1,)),
    )
    return Stages(
        texts=(text,),
        tokenizer_options=(_TRUNCATE,),
        model_inputs=_SINGLE,
        model_outputs=top,
        read=(*_SINGLE, *top),
        postprocess_options=(_TOP_K,),
        answers=(
            ("token_str", "STRING", (-1, -1)),
            ("score", "FP32", (-1, -1)),
            ("token", "INT32", (-1, -1)),
            ("sequence", "STRING", (-1, -1)),
        ),
        tokenizer_parameters=encoding,
    )
