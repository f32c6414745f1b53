"""Passages for a query: a classifier of both, or a decoder whose next token is yes or no.

Reference: sentence-transformers, `CrossEncoder` and its `LogitScore`; for Qwen3-Reranker without a chat template for
pairs its model card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trident_export.errors import UnsupportedModel
from trident_export.graphs import encoder as encoder_graph
from trident_export.huggingface import chat_templates
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.models_file import ModelSpec
from trident_export.tasks import Job
from trident_export.tasks.encoders.base import Floats, Texts
from trident_export.tasks.encoders.classification import Classification
from trident_serving.artefacts import VERSION
from trident_serving.encoders import ranking
from trident_serving.encoders.labels import Activation, LabelSettings
from trident_serving.encoders.ranking import RankingTemplates
from trident_serving.schema.limits import LabelLimits

_QUERY, _PASSAGE = "\ue000query\ue001", "\ue000passage\ue001"
_SHORT = 24  # bytes of a sample's query and of its passage, which must fit into a template
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Ranking(Classification):
    """`text-ranking`; `read` gives scores of a query and a passage, [1, labels]."""

    task = ranking.TASK
    architecture = ""

    def problems(self, limits: LabelLimits, source: HuggingFaceFolder) -> Iterator[str]:
        if not _answers(source):
            yield from super().problems(limits, source)
        elif limits.labels != 1:
            yield f"limits.labels is {limits.labels}, and a model that answers yes or no gives 1"
        else:
            tokenizer, prompts = source.tokenizer, ["", *source.roles().prompts.values()]
            texts = [_rendered(source, tokenizer, prompt, "a", "b") for prompt in prompts]
            most = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
            if most + 2 * _SHORT > limits.max_tokens:
                yield f"limits.max_tokens is {limits.max_tokens}, and the template alone takes {most}"

    def proposed_limits(self, source: HuggingFaceFolder, max_tokens: int) -> dict[str, Any]:
        return {"labels": 1} if _answers(source) else super().proposed_limits(source, max_tokens)

    def settings(self, source: HuggingFaceFolder) -> LabelSettings:
        return LabelSettings(("yes",), self.activation(source)) if _answers(source) else super().settings(source)

    def activation(self, source: HuggingFaceFolder) -> Activation:
        """What a cross-encoder applies.

        Raises:
            UnsupportedModel: it names one that is not supported.
        """
        one = _answers(source) or source.config.num_labels == 1
        return source.sentence.score_activation(source.config, one=one)

    def head_of(self, source: HuggingFaceFolder) -> Any:
        return AutoModelForCausalLM if _answers(source) else self.head

    def prepare(self, model: PreTrainedModel, source: HuggingFaceFolder) -> None:
        if not _answers(source):
            super().prepare(model, source)
            return
        # Only the logits of the answers are computed.
        whole, rows = model.get_output_embeddings(), _tokens(source)
        few = torch.nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None)
        with torch.no_grad():
            few.weight.copy_(whole.weight[rows])
            if whole.bias is not None:
                few.bias.copy_(whole.bias[rows])
        model.set_output_embeddings(few)

    def finish(self, model: ir.Model, limits: LabelLimits, source: HuggingFaceFolder) -> None:
        if _answers(source):
            encoder_graph.with_last_score(model)

    def check(self, spec: ModelSpec, source: HuggingFaceFolder) -> None:
        if _answers(source):
            tokenizer = source.tokenizer
            if isinstance(tokenizer.chat_template, str):
                messages = ((("query", "a"), ("document", "b")),)
                chat_templates.check(source, tokenizer.chat_template, tokenizer.special_tokens_map, messages)
            _tokens(source)
        super().check(spec, source)

    def trace(self, job: Job) -> None:
        super().trace(job)
        if _answers(job.source):
            parts = _parts(job.source, job.spec.own_prompts)
            RankingTemplates(parts).save(job.staging / f"{job.spec.name}_tokenizer" / VERSION)

    def samples(self, texts: Sequence[str], source: HuggingFaceFolder) -> list[Texts]:
        if _answers(source):
            texts = [text.encode()[:_SHORT].decode(errors="ignore") for text in texts]
        return list(zip(texts, [*texts[1:], *texts[:1]], strict=True))

    def far_sample(self, text: str, sample: Texts, source: HuggingFaceFolder) -> Texts | None:
        return None if _answers(source) else (sample[0], text)  # Hugging Face's side cuts no template

    def reference(self, spec: ModelSpec, source: HuggingFaceFolder) -> Callable[[Texts], list[Floats]]:
        roles, tokenizer = source.roles(spec.own_prompts), source.tokenizer
        prompt = roles.prompts[roles.default_prompt] if roles.default_prompt is not None else ""
        if not _answers(source):
            ask = super().reference(spec, source)
            return lambda texts: ask((prompt + texts[0], *texts[1:]))
        model, settings, rows = source.reference(AutoModelForCausalLM), self.settings(source), _tokens(source)

        def answered(texts: Texts) -> list[Floats]:
            text = _rendered(source, tokenizer, prompt, *texts)
            batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            logits = model(**batch).logits[0, -1].numpy()[rows]
            return self.read({"logits": np.array([[logits[0] - logits[1:].sum()]], np.float32)}, settings)

        return answered


def _answers(source: HuggingFaceFolder) -> bool:
    """Whether the model is a decoder that answers yes or no."""
    named = str((source.config.architectures or [""])[0]).endswith("ForCausalLM")
    return named or "LogitScore" in dict(source.sentence.modules)


def _tokens(source: HuggingFaceFolder) -> list[int]:
    """The ids of yes and no, whose logits' difference is the score; of yes alone where that is one.

    Raises:
        UnsupportedModel: the tokenizer has no such tokens.
    """
    settings = source.sentence.settings_of("LogitScore")
    if settings:
        found = [settings.get("true_token_id"), settings.get("false_token_id")]
        return [token for token in found if token is not None]
    tokenizer = source.tokenizer
    ids: list[int] = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    if None in ids or tokenizer.unk_token_id in ids:
        raise UnsupportedModel(f"{source} has no tokens yes and no, by which a decoder ranks: choose a cross-encoder")
    return ids


def _rendered(source: HuggingFaceFolder, tokenizer: Any, prompt: str, query: str, passage: str) -> str:
    """The text that the model reads.

    Raises:
        UnsupportedModel: nothing says where query and passage go.
    """
    messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
    if prompt:
        messages = [{"role": "system", "content": prompt}, *messages]
    with reading(source.path, "processing_kwargs of sentence-transformers' files"):
        options = dict((source.sentence.transformer.get("processing_kwargs") or {}).get("chat_template") or {})
    found = ""
    if tokenizer.chat_template:
        with reading(source.path, "the chat template"):
            found = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if query in found and passage in found:
        return found
    if source.config.model_type == "qwen3":
        asked = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        return (
            f'<|im_start|>system\n{asked}Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {prompt or _INSTRUCTION}\n<Query>: {query}\n<Document>: {passage}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
    raise UnsupportedModel(
        f"{source} is a decoder whose chat template has no place for the roles query and document: export a folder of "
        "sentence-transformers 5.4 or later that has one"
    )


def _parts(source: HuggingFaceFolder, prompts: Any) -> dict[str, list[str]]:
    roles, tokenizer = source.roles(prompts), source.tokenizer
    found = {}
    for prompt in {"", *roles.prompts.values()}:
        text = _rendered(source, tokenizer, prompt, _QUERY, _PASSAGE)
        before, _, rest = text.partition(_QUERY)
        between, _, after = rest.partition(_PASSAGE)
        if text.count(_QUERY) != 1 or text.count(_PASSAGE) != 1 or _QUERY in after:
            raise UnsupportedModel(f"{source}: the chat template must have the query once, and then the passage once")
        found[prompt] = [before, between, after]
    return found


EXPORT = Ranking()
check, trace, write, evaluator = EXPORT.check, EXPORT.trace, EXPORT.write, EXPORT.evaluator
