"""The options of calls that generate, translate, summarize, transcribe or explain.

Written by `make schema` from `trident_serving.schema.fields`: change that, not this.
"""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict


@dataclass(frozen=True)
class Option:
    """How an option is sent, and what `trident --help` says of it.

    Attributes:
        dtype: the tensor's type by its name in the protocol; "BYTES" of texts.
        help: what it does.
        choices: the texts that it may have; (): any.
        many: whether it is a list.
        flag: whether `trident` has a flag for it.
    """

    dtype: str
    help: str
    choices: tuple[str, ...] = ()
    many: bool = False
    flag: bool = True


class GenerationOptions(TypedDict, total=False):
    """Options of `generate`, `stream` and `chat`; None leaves one out.

    Attributes:
        max_tokens: how long the answer may be, in tokens; the model's limits have a default; 0: none, for a prompt's log-probabilities, tokens or text (at least 0).
        min_tokens: how short the answer may be, in tokens (default 0; at least 0).
        temperature: 0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100).
        top_k: sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more).
        top_p: sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1).
        min_p: leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1).
        typical_p: sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1).
        repetition_penalty: above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100).
        presence_penalty: lowers the logits of tokens that the answer already has (default 0.0; between -2 and 2).
        frequency_penalty: lowers the logits of tokens by how often the answer has them (default 0.0; between -2 and 2).
        random_seed: makes sampling repeatable.
        return_log_probs: give each token's log-probability (default false).
        top_logprobs: give the log-probabilities of this many of the likeliest tokens (default 0; between 0 and 20).
        exclude_input_in_output: leave the prompt out of the answer's text (default true).
        prompt_lookup: draft greedy answers from their and others' text, which changes speed only (default true).
        stop_words: texts that end the answer and are left out of it, at most 32; they count from min_tokens on.
        stop_token_ids: tokens that end the answer, as the model's own do, at most 64.
        bad_words: texts that never appear, as their tokens at the beginning of a text and behind a space, at most 32.
        logit_bias: what is added to the logits of tokens, between -100 and 100: a JSON object of ids and numbers, at most 1024.
        watermarking_config: mark the answer so that `trident-export detect` can tell it from other texts: a JSON object with `greenlist_ratio` (0.25), `bias` (2.0) and `hashing_key`, as transformers' WatermarkingConfig has them.
        ignore_eos: go on behind the model's end tokens (default false).
        skip_special_tokens: leave special tokens out of the answer's text (default true).
        truncate_prompt_tokens: cut a longer prompt to its last tokens, so many; -1: as many as fit beside max_tokens (at least -1).
        prompt_logprobs: give the log-probability of each token of the prompt but the first, and this many of the likeliest ones (between 0 and 20).
        return_prompt_token_ids: give the tokens of the prompt, by their ids (default false).
        return_tokens: give the ids of the answer's tokens, and the bytes of every token told (default false).
        guided_json: a JSON schema that the answer follows.
        guided_regex: a regular expression that the whole answer matches.
        guided_choice: texts of which the answer is one.
        guided_grammar: a grammar that the answer follows: Lark, or GBNF where it has ::=.
        lora_name: the adapter of the model that answers, by its name in models.toml; empty: none.
        tools: functions that the model may call: a JSON list, each with a name and a JSON schema of its arguments.
        tool_choice: whether tools are called: `auto`, `none`, `required`, or a tool as chat APIs name it, in JSON.
        documents: texts for the chat template to answer from: a JSON list of objects, usually with `title` and `text`.
        chat_template_kwargs: options of the model's chat template, a JSON object, such as `enable_thinking`.
        return_reasoning: give the model's reasoning apart from the text of its answer (default false).
        split_special_tokens: read special tokens in contents, documents and tools as ordinary text; false: as Hugging Face reads a prompt (default true).
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    random_seed: int | None
    return_log_probs: bool | None
    top_logprobs: int | None
    exclude_input_in_output: bool | None
    prompt_lookup: bool | None
    stop_words: list[str] | None
    stop_token_ids: list[int] | None
    bad_words: list[str] | None
    logit_bias: Mapping[int, float] | None
    watermarking_config: Mapping[str, Any] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    prompt_logprobs: int | None
    return_prompt_token_ids: bool | None
    return_tokens: bool | None
    guided_json: Mapping[str, Any] | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    lora_name: str | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    return_reasoning: bool | None
    split_special_tokens: bool | None


GENERATION: dict[str, Option] = {
    "max_tokens": Option(
        "INT32",
        "how long the answer may be, in tokens; the model's limits have a default; 0: none, for a prompt's log-probabilities, tokens or text (at least 0)",
    ),
    "min_tokens": Option("INT32", "how short the answer may be, in tokens (default 0; at least 0)"),
    "temperature": Option(
        "FP32", "0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100)"
    ),
    "top_k": Option("INT32", "sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more)"),
    "top_p": Option(
        "FP32",
        "sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1)",
    ),
    "min_p": Option(
        "FP32", "leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1)"
    ),
    "typical_p": Option(
        "FP32",
        "sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1)",
    ),
    "repetition_penalty": Option(
        "FP32",
        "above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100)",
    ),
    "presence_penalty": Option(
        "FP32", "lowers the logits of tokens that the answer already has (default 0.0; between -2 and 2)"
    ),
    "frequency_penalty": Option(
        "FP32", "lowers the logits of tokens by how often the answer has them (default 0.0; between -2 and 2)"
    ),
    "random_seed": Option("UINT64", "makes sampling repeatable"),
    "return_log_probs": Option("BOOL", "give each token's log-probability (default false)", flag=False),
    "top_logprobs": Option(
        "INT32",
        "give the log-probabilities of this many of the likeliest tokens (default 0; between 0 and 20)",
        flag=False,
    ),
    "exclude_input_in_output": Option("BOOL", "leave the prompt out of the answer's text (default true)", flag=False),
    "prompt_lookup": Option(
        "BOOL", "draft greedy answers from their and others' text, which changes speed only (default true)"
    ),
    "stop_words": Option(
        "BYTES",
        "texts that end the answer and are left out of it, at most 32; they count from min_tokens on",
        many=True,
    ),
    "stop_token_ids": Option(
        "INT32", "tokens that end the answer, as the model's own do, at most 64", many=True, flag=False
    ),
    "bad_words": Option(
        "BYTES",
        "texts that never appear, as their tokens at the beginning of a text and behind a space, at most 32",
        many=True,
    ),
    "logit_bias": Option(
        "BYTES",
        "what is added to the logits of tokens, between -100 and 100: a JSON object of ids and numbers, at most 1024",
        flag=False,
    ),
    "watermarking_config": Option(
        "BYTES",
        "mark the answer so that `trident-export detect` can tell it from other texts: a JSON object with `greenlist_ratio` (0.25), `bias` (2.0) and `hashing_key`, as transformers' WatermarkingConfig has them",
        flag=False,
    ),
    "ignore_eos": Option("BOOL", "go on behind the model's end tokens (default false)"),
    "skip_special_tokens": Option("BOOL", "leave special tokens out of the answer's text (default true)"),
    "truncate_prompt_tokens": Option(
        "INT32",
        "cut a longer prompt to its last tokens, so many; -1: as many as fit beside max_tokens (at least -1)",
        flag=False,
    ),
    "prompt_logprobs": Option(
        "INT32",
        "give the log-probability of each token of the prompt but the first, and this many of the likeliest ones (between 0 and 20)",
        flag=False,
    ),
    "return_prompt_token_ids": Option(
        "BOOL", "give the tokens of the prompt, by their ids (default false)", flag=False
    ),
    "return_tokens": Option(
        "BOOL", "give the ids of the answer's tokens, and the bytes of every token told (default false)", flag=False
    ),
    "guided_json": Option("BYTES", "a JSON schema that the answer follows", flag=False),
    "guided_regex": Option("BYTES", "a regular expression that the whole answer matches", flag=False),
    "guided_choice": Option("BYTES", "texts of which the answer is one", many=True, flag=False),
    "guided_grammar": Option("BYTES", "a grammar that the answer follows: Lark, or GBNF where it has ::=", flag=False),
    "lora_name": Option("BYTES", "the adapter of the model that answers, by its name in models.toml; empty: none"),
    "tools": Option(
        "BYTES",
        "functions that the model may call: a JSON list, each with a name and a JSON schema of its arguments",
        flag=False,
    ),
    "tool_choice": Option(
        "BYTES",
        "whether tools are called: `auto`, `none`, `required`, or a tool as chat APIs name it, in JSON",
        flag=False,
    ),
    "documents": Option(
        "BYTES",
        "texts for the chat template to answer from: a JSON list of objects, usually with `title` and `text`",
        flag=False,
    ),
    "chat_template_kwargs": Option(
        "BYTES", "options of the model's chat template, a JSON object, such as `enable_thinking`", flag=False
    ),
    "return_reasoning": Option(
        "BOOL", "give the model's reasoning apart from the text of its answer (default false)", flag=False
    ),
    "split_special_tokens": Option(
        "BOOL",
        "read special tokens in contents, documents and tools as ordinary text; false: as Hugging Face reads a prompt (default true)",
        flag=False,
    ),
}


class TranslationOptions(TypedDict, total=False):
    """Options of `translate` and `summarize`; None leaves one out.

    Attributes:
        max_tokens: how long the answer may be, in tokens; the model's limits have a default (at least 1).
        min_tokens: how short the answer may be, in tokens (default 0; at least 0).
        temperature: 0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100).
        top_k: sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more).
        top_p: sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1).
        min_p: leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1).
        typical_p: sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1).
        repetition_penalty: above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100).
        random_seed: makes sampling repeatable.
        num_beams: beams of the search; the model's generation config has a default (at least 1).
        length_penalty: above 0 prefers longer answers of a beam search, below 0 shorter ones (between -10 and 10).
        early_stopping: end a beam search once it has as many answers as beams.
        no_repeat_ngram_size: no sequence of this many tokens comes twice; 0: off (at least 0).
        source_lang: the text's language, as the model names it.
        target_lang: the answer's language, as the model names it.
        long_input: what happens to a text that is too long (one of error, truncate, window).
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    random_seed: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | None
    no_repeat_ngram_size: int | None
    source_lang: str | None
    target_lang: str | None
    long_input: Literal["error", "truncate", "window"] | None


TRANSLATION: dict[str, Option] = {
    "max_tokens": Option(
        "INT32", "how long the answer may be, in tokens; the model's limits have a default (at least 1)"
    ),
    "min_tokens": Option("INT32", "how short the answer may be, in tokens (default 0; at least 0)"),
    "temperature": Option(
        "FP32", "0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100)"
    ),
    "top_k": Option("INT32", "sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more)"),
    "top_p": Option(
        "FP32",
        "sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1)",
    ),
    "min_p": Option(
        "FP32", "leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1)"
    ),
    "typical_p": Option(
        "FP32",
        "sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1)",
    ),
    "repetition_penalty": Option(
        "FP32",
        "above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100)",
    ),
    "random_seed": Option("UINT64", "makes sampling repeatable"),
    "num_beams": Option("INT32", "beams of the search; the model's generation config has a default (at least 1)"),
    "length_penalty": Option(
        "FP32", "above 0 prefers longer answers of a beam search, below 0 shorter ones (between -10 and 10)"
    ),
    "early_stopping": Option("BOOL", "end a beam search once it has as many answers as beams"),
    "no_repeat_ngram_size": Option("INT32", "no sequence of this many tokens comes twice; 0: off (at least 0)"),
    "source_lang": Option("BYTES", "the text's language, as the model names it"),
    "target_lang": Option("BYTES", "the answer's language, as the model names it"),
    "long_input": Option(
        "BYTES",
        "what happens to a text that is too long (one of error, truncate, window)",
        choices=("error", "truncate", "window"),
    ),
}


class TranscriptionOptions(TypedDict, total=False):
    """Options of `transcribe`; None leaves one out.

    Attributes:
        language: the language that is spoken, by its code or its English name; without it the model's, or the one it hears.
        task: write what is said, or translate it to English (one of transcribe, translate).
        timestamps: give segments with their times (default false).
        max_tokens: how long the answer may be, in tokens; the model's limits have a default (at least 1).
        min_tokens: how short the answer may be, in tokens (default 0; at least 0).
        temperature: 0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100).
        top_k: sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more).
        top_p: sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1).
        min_p: leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1).
        typical_p: sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1).
        repetition_penalty: above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100).
        random_seed: makes sampling repeatable.
        num_beams: beams of the search; the model's generation config has a default (at least 1).
        length_penalty: above 0 prefers longer answers of a beam search, below 0 shorter ones (between -10 and 10).
        early_stopping: end a beam search once it has as many answers as beams.
        no_repeat_ngram_size: no sequence of this many tokens comes twice; 0: off (at least 0).
    """

    language: str | None
    task: Literal["transcribe", "translate"] | None
    timestamps: bool | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    random_seed: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | None
    no_repeat_ngram_size: int | None


TRANSCRIPTION: dict[str, Option] = {
    "language": Option(
        "BYTES",
        "the language that is spoken, by its code or its English name; without it the model's, or the one it hears",
    ),
    "task": Option(
        "BYTES",
        "write what is said, or translate it to English (one of transcribe, translate)",
        choices=("transcribe", "translate"),
    ),
    "timestamps": Option("BOOL", "give segments with their times (default false)"),
    "max_tokens": Option(
        "INT32", "how long the answer may be, in tokens; the model's limits have a default (at least 1)"
    ),
    "min_tokens": Option("INT32", "how short the answer may be, in tokens (default 0; at least 0)"),
    "temperature": Option(
        "FP32", "0 takes the likeliest token; more spreads the choice (default 0.0; between 0 and 100)"
    ),
    "top_k": Option("INT32", "sample from this many of the likeliest tokens; 0: from all (default 0; 0 (off) or more)"),
    "top_p": Option(
        "FP32",
        "sample from the likeliest tokens that reach this probability together; 0: the likeliest (default 1.0; between 0 and 1)",
    ),
    "min_p": Option(
        "FP32", "leave out tokens below this share of the likeliest one's probability (default 0.0; between 0 and 1)"
    ),
    "typical_p": Option(
        "FP32",
        "sample from the tokens nearest to the expected surprise that have this probability together (default 1.0; above 0 and at most 1)",
    ),
    "repetition_penalty": Option(
        "FP32",
        "above 1 makes tokens of prompt and answer less likely to come again (default 1.0; above 0 and at most 100)",
    ),
    "random_seed": Option("UINT64", "makes sampling repeatable"),
    "num_beams": Option("INT32", "beams of the search; the model's generation config has a default (at least 1)"),
    "length_penalty": Option(
        "FP32", "above 0 prefers longer answers of a beam search, below 0 shorter ones (between -10 and 10)"
    ),
    "early_stopping": Option("BOOL", "end a beam search once it has as many answers as beams"),
    "no_repeat_ngram_size": Option("INT32", "no sequence of this many tokens comes twice; 0: off (at least 0)"),
}


class ExplanationOptions(TypedDict, total=False):
    """Options of `explain`; None leaves one out.

    Attributes:
        by: what is hidden at a time (default word; one of word, sentence, token).
        label: the class that is explained, of a masked text the token; without it the likeliest.
        text_pair: of a classifier of pairs: the second text.
        query: of a ranker.
        question: of question answering, where the text is the context.
        candidate_labels: of zero-shot classification.
        hypothesis_template: of zero-shot classification: the sentence for a label.
        multi_label: of zero-shot classification: score each label by itself (default false).
        answer: of a generator: the answer that is explained; without it the model's greedy one.
        chat: of a generator: the text is a message for the chat template (default false).
        max_tokens: of a generator: how long its own answer may be; 64 without it (at least 1).
    """

    by: Literal["word", "sentence", "token"] | None
    label: str | None
    text_pair: str | None
    query: str | None
    question: str | None
    candidate_labels: list[str] | None
    hypothesis_template: str | None
    multi_label: bool | None
    answer: str | None
    chat: bool | None
    max_tokens: int | None


EXPLANATION: dict[str, Option] = {
    "by": Option(
        "BYTES",
        "what is hidden at a time (default word; one of word, sentence, token)",
        choices=("word", "sentence", "token"),
    ),
    "label": Option("BYTES", "the class that is explained, of a masked text the token; without it the likeliest"),
    "text_pair": Option("BYTES", "of a classifier of pairs: the second text"),
    "query": Option("BYTES", "of a ranker"),
    "question": Option("BYTES", "of question answering, where the text is the context"),
    "candidate_labels": Option("BYTES", "of zero-shot classification", many=True),
    "hypothesis_template": Option("BYTES", "of zero-shot classification: the sentence for a label"),
    "multi_label": Option("BOOL", "of zero-shot classification: score each label by itself (default false)"),
    "answer": Option("BYTES", "of a generator: the answer that is explained; without it the model's greedy one"),
    "chat": Option("BOOL", "of a generator: the text is a message for the chat template (default false)"),
    "max_tokens": Option("INT32", "of a generator: how long its own answer may be; 64 without it (at least 1)"),
}
