"""Every field of a request that generates, translates, transcribes or explains: name, type, range, default and help.

Names and types are those of Triton's TensorRT-LLM backend where it has them; `top_logprobs` is the OpenAI API's, those
of beam search are transformers'. To add a field, add a row here; a sampling field also needs its processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest
from trident_serving.text import decode_texts

Inputs = Mapping[str, NDArray[Any]]
Value = int | float | bool | str | None


class LongInput(StrEnum):
    """What happens to a text that is longer than the model takes."""

    ERROR = "error"
    TRUNCATE = "truncate"
    WINDOW = "window"


class Aggregation(StrEnum):
    """How tokens become entities.

    none: each token is one. simple: neighbours with the same label are one. The others first choose a label for each
    word: that of its first token, of the mean over its tokens, or of its surest token.
    """

    NONE = "none"
    SIMPLE = "simple"
    FIRST = "first"
    AVERAGE = "average"
    MAX = "max"


class ChatFormat(StrEnum):
    """How a model writes calls of tools: the format of a family of models.

    auto: the one that its chat template shows. json: any common one, in JSON or Python.
    """

    AUTO = "auto"
    HERMES = "hermes"
    QWEN_CODER = "qwen_coder"
    GLM = "glm"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    PHI = "phi"
    GRANITE = "granite"
    GEMMA = "gemma"
    DEEPSEEK = "deepseek"
    KIMI = "kimi"
    COMMAND_R = "command_r"
    HARMONY = "harmony"
    SMOLLM3 = "smollm3"
    LFM2 = "lfm2"
    JSON = "json"


@dataclass(frozen=True)
class Range:
    """Which numbers a field may have.

    Attributes:
        low: the least, or what it must be above.
        high: the largest; None: any.
        above: whether `low` itself is excluded.
        off: whether 0 turns the field off, for the message.
    """

    low: float
    high: float | None = None
    above: bool = False
    off: bool = False

    def __contains__(self, value: float) -> bool:
        beyond = value > self.low if self.above else value >= self.low
        return beyond and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{self.low:g} (off) or more" if self.off else f"at least {self.low:g}"
        if self.above:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"between {self.low:g} and {self.high:g}"


@dataclass(frozen=True)
class Field:
    """One optional field of a request.

    Attributes:
        name: of the tensor.
        dtype: Triton's type, without TYPE_.
        help: what it does, for the reference, the client and `trident --help`.
        default: the value for a request without the field; None: `help` says which value holds.
        range: of a number. A model's limits may narrow it, see `read`.
        choices: the texts that are allowed; (): any.
        shape: of its tensor, without the batch; [-1] is a list.
        option: whether it is an option of the client's calls. The client sets the others itself.
        flag: whether `trident` has a flag for it.
        annotation: its type for the client, where that is not the tensor's; what is no text is sent as JSON.
        only: the one value that is allowed; others are refused with `reason`.
        same_as: the field that this is another name of.
    """

    name: str
    dtype: str
    help: str
    default: Value = None
    range: Range | None = None
    choices: tuple[str, ...] = ()
    shape: tuple[int, ...] = (1,)
    option: bool = True
    flag: bool = True
    annotation: str = ""
    only: Value = None
    reason: str = ""
    same_as: str = ""

    def read(self, inputs: Inputs, default: Value = None, high: float | None = None) -> Any:
        """The field's value in a request.

        Args:
            default: replaces the field's own default.
            high: the largest number that this model allows; replaces the range's own.

        Raises:
            InvalidRequest: the tensor does not hold exactly one value, or the value is not allowed.
        """
        tensor = inputs.get(self.name)
        if tensor is None:
            return self.default if default is None else default
        if tensor.size != 1:
            raise InvalidRequest(f"{self.name} must hold one value, found {tensor.size}")
        if self.dtype == "STRING":
            value = single_text(inputs, self.name)
            if self.choices and value not in self.choices:
                raise InvalidRequest(f"{self.name} must be one of {', '.join(self.choices)}, found {value[:80]!r}")
            return value
        return self.check(tensor.reshape(-1)[0].item(), high)

    def check(self, value: Any, high: float | None = None) -> Any:
        """The value, if it is in the range.

        Raises:
            InvalidRequest: it is out of range; the message names field, range and value.
        """
        if self.only is not None and value != self.only:
            only, found = str(self.only).lower(), str(value).lower()
            raise InvalidRequest(f"{self.name} must be {only}, found {found}: {self.reason}")
        allowed = self.range
        if allowed is not None and high is not None:
            allowed = Range(allowed.low, high, allowed.above)
        if allowed is not None and value not in allowed:
            raise InvalidRequest(f"{self.name} must be {allowed}, found {value}")
        return value


def single_text(inputs: Inputs, name: str) -> str:
    """The one text of a BYTES tensor."""
    texts = decode_texts(inputs[name], name)
    if len(texts) != 1:
        raise InvalidRequest(f"{name} must hold one text, found {len(texts)}")
    return texts[0]


def timeout_seconds(value: object, limit: float) -> float:
    """The seconds that a request may take: its `timeout` parameter, at most the model's limit.

    Args:
        value: the parameter, in microseconds; 0 or None: no timeout of the request's own.
        limit: the model's, in seconds.

    Raises:
        InvalidRequest: it is not a number of microseconds.
    """
    number = 0 if value is None else value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None and isinstance(value, str) and value.isdecimal():
        number = int(value)
    if number is None or not 0 <= number < 2**63:
        raise InvalidRequest(f"timeout must be a number of microseconds, 0 (none) or more, found {value!r}")
    return min(number / 1e6, limit) if number else limit


DEFAULT_TIMEOUT_SECONDS = 300.0
MAX_TOP_LOG_PROBS = 20
MAX_STOP_WORDS = 32
MAX_STOP_WORD_BYTES = 1024
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1024
MAX_ANSWERS = 32

_SAMPLING = (
    Field(
        "max_tokens",
        "INT32",
        "how long the answer may be, in tokens; the model's limits have a default",
        range=Range(1),
    ),
    Field("min_tokens", "INT32", "how short the answer may be, in tokens", 0, Range(0)),
    Field("temperature", "FP32", "0 takes the likeliest token; more spreads the choice", 0.0, Range(0, 100)),
    Field("top_k", "INT32", "sample from this many of the likeliest tokens; 0: from all", 0, Range(0, off=True)),
    Field(
        "top_p",
        "FP32",
        "sample from the likeliest tokens that reach this probability together; 0: the likeliest",
        1.0,
        Range(0, 1),
    ),
    Field("min_p", "FP32", "leave out tokens below this share of the likeliest one's probability", 0.0, Range(0, 1)),
    Field(
        "typical_p",
        "FP32",
        "sample from the tokens nearest to the expected surprise that have this probability together",
        1.0,
        Range(0, 1, above=True),
    ),
)
_REPETITION = Field(
    "repetition_penalty",
    "FP32",
    "above 1 makes tokens of prompt and answer less likely to come again",
    1.0,
    Range(0, 100, above=True),
)
_SEED = Field("random_seed", "UINT64", "makes sampling repeatable")

# Of a conversation: they need `messages`.
MESSAGES = (
    Field(
        "tools",
        "STRING",
        "functions that the model may call: a JSON list, each with a name and a JSON schema of its arguments",
        flag=False,
        annotation="Sequence[Mapping[str, Any]]",
    ),
    Field(
        "tool_choice",
        "STRING",
        "whether tools are called: `auto`, `none`, `required`, or a tool as chat APIs name it, in JSON",
        flag=False,
        annotation="str | Mapping[str, Any]",
    ),
    Field(
        "documents",
        "STRING",
        "texts for the chat template to answer from: a JSON list of objects, usually with `title` and `text`",
        flag=False,
        annotation="Sequence[Mapping[str, Any]]",
    ),
    Field(
        "chat_template_kwargs",
        "STRING",
        "options of the model's chat template, a JSON object, such as `enable_thinking`",
        flag=False,
        annotation="Mapping[str, Any]",
    ),
    Field(
        "return_reasoning", "BOOL", "give the model's reasoning apart from the text of its answer", False, flag=False
    ),
    Field(
        "split_special_tokens",
        "BOOL",
        "read special tokens in contents, documents and tools as ordinary text; false: as Hugging Face reads a prompt",
        True,
        flag=False,
    ),
)
# What clients of TensorRT-LLM's backend send beside that, where it means the same here or changes nothing.
_NO_BEAMS = "generators do not search with beams; n asks for several answers"
_NO_LOGITS = "logits are not returned; top_logprobs and prompt_logprobs give log-probabilities"
_COMPATIBLE = tuple(
    replace(field, option=False, flag=False)
    for field in (
        Field("seed", "UINT64", "another name of random_seed", same_as="random_seed"),
        Field("min_length", "INT32", "another name of min_tokens", same_as="min_tokens"),
        Field("num_return_sequences", "INT32", "another name of n", same_as="n"),
        Field("end_id", "INT32", "a token that ends the answer beside the model's own; -1: none", range=Range(-1)),
        Field(
            "guided_decoding_guide_type",
            "STRING",
            "what guided_decoding_guide holds",
            choices=("json", "json_schema", "regex", "choice", "ebnf_grammar", "lark_grammar"),
        ),
        Field("guided_decoding_guide", "STRING", "what the answer follows; of `choice` a JSON list of texts"),
        Field("pad_id", "INT32", "taken and not used: nothing is padded"),
        Field("beam_width", "INT32", "1: no beams", only=1, reason=_NO_BEAMS),
        Field("length_penalty", "FP32", "taken and not used: it is about beams"),
        Field("len_penalty", "FP32", "taken and not used: it is about beams"),
        Field("early_stopping", "BOOL", "taken and not used: it is about beams"),
        Field("return_num_input_tokens", "BOOL", "taken and not used: the number is always given"),
        Field(
            "return_num_output_tokens",
            "BOOL",
            "num_output_tokens counts the tokens of each response, which Triton's OpenAI frontend adds up; without it, "
            "those so far",
            False,
        ),
        Field("return_context_logits", "BOOL", "false", only=False, reason=_NO_LOGITS),
        Field("return_generation_logits", "BOOL", "false", only=False, reason=_NO_LOGITS),
    )
)

GENERATION = (
    replace(
        _SAMPLING[0],
        help=f"{_SAMPLING[0].help}; 0: none, for a prompt's log-probabilities, tokens or text",
        range=Range(0),
    ),
    *_SAMPLING[1:],
    _REPETITION,
    Field("presence_penalty", "FP32", "lowers the logits of tokens that the answer already has", 0.0, Range(-2, 2)),
    Field(
        "frequency_penalty", "FP32", "lowers the logits of tokens by how often the answer has them", 0.0, Range(-2, 2)
    ),
    _SEED,
    Field("stream", "BOOL", "answer in chunks", False, option=False, flag=False),
    Field("return_log_probs", "BOOL", "give each token's log-probability", False, flag=False),
    Field(
        "top_logprobs",
        "INT32",
        "give the log-probabilities of this many of the likeliest tokens",
        0,
        Range(0, MAX_TOP_LOG_PROBS),
        flag=False,
    ),
    Field("exclude_input_in_output", "BOOL", "leave the prompt out of the answer's text", True, flag=False),
    Field("prompt_lookup", "BOOL", "draft greedy answers from their and others' text, which changes speed only", True),
    Field(
        "stop_words",
        "STRING",
        f"texts that end the answer and are left out of it, at most {MAX_STOP_WORDS}; they count from min_tokens on",
        shape=(-1,),
    ),
    Field(
        "stop_token_ids",
        "INT32",
        f"tokens that end the answer, as the model's own do, at most {MAX_STOP_TOKENS}",
        shape=(-1,),
        flag=False,
    ),
    Field(
        "bad_words",
        "STRING",
        f"texts that never appear, as their tokens at the beginning of a text and behind a space, at most "
        f"{MAX_STOP_WORDS}",
        shape=(-1,),
    ),
    Field(
        "logit_bias",
        "STRING",
        f"what is added to the logits of tokens, between -100 and 100: a JSON object of ids and numbers, at most "
        f"{MAX_BIASED_TOKENS}",
        annotation="Mapping[int, float]",
        flag=False,
    ),
    Field(
        "watermarking_config",
        "STRING",
        "mark the answer so that `trident-export detect` can tell it from other texts: a JSON object with "
        "`greenlist_ratio` (0.25), `bias` (2.0) and `hashing_key`, as transformers' WatermarkingConfig has them",
        annotation="Mapping[str, Any]",
        flag=False,
    ),
    Field("ignore_eos", "BOOL", "go on behind the model's end tokens", False),
    Field("skip_special_tokens", "BOOL", "leave special tokens out of the answer's text", True),
    Field(
        "truncate_prompt_tokens",
        "INT32",
        "cut a longer prompt to its last tokens, so many; -1: as many as fit beside max_tokens",
        range=Range(-1),
        flag=False,
    ),
    Field(
        "prompt_logprobs",
        "INT32",
        "give the log-probability of each token of the prompt but the first, and this many of the likeliest ones",
        range=Range(0, MAX_TOP_LOG_PROBS),
        flag=False,
    ),
    Field("return_prompt_token_ids", "BOOL", "give the tokens of the prompt, by their ids", False, flag=False),
    Field(
        "return_tokens",
        "BOOL",
        "give the ids of the answer's tokens, and the bytes of every token told",
        False,
        flag=False,
    ),
    Field(
        "n",
        "INT32",
        "answers to the prompt; sampled ones differ, and the n-th has the seed random_seed + n",
        1,
        Range(1, MAX_ANSWERS),
        option=False,
        flag=False,
    ),
    Field(
        "guided_json",
        "STRING",
        "a JSON schema that the answer follows",
        annotation="Mapping[str, Any] | str",
        flag=False,
    ),
    Field("guided_regex", "STRING", "a regular expression that the whole answer matches", flag=False),
    Field("guided_choice", "STRING", "texts of which the answer is one", shape=(-1,), flag=False),
    Field(
        "guided_grammar",
        "STRING",
        "a grammar that the answer follows: Lark, or GBNF where it has ::=",
        flag=False,
    ),
    Field("lora_name", "STRING", "the adapter of the model that answers, by its name in models.toml; empty: none"),
    *MESSAGES,
    *_COMPATIBLE,
)
SEQ2SEQ = (
    *_SAMPLING,
    _REPETITION,
    _SEED,
    Field("num_beams", "INT32", "beams of the search; the model's generation config has a default", range=Range(1)),
    Field(
        "length_penalty",
        "FP32",
        "above 0 prefers longer answers of a beam search, below 0 shorter ones",
        range=Range(-10, 10),
    ),
    Field("early_stopping", "BOOL", "end a beam search once it has as many answers as beams"),
    Field("no_repeat_ngram_size", "INT32", "no sequence of this many tokens comes twice; 0: off", range=Range(0)),
    Field("source_lang", "STRING", "the text's language, as the model names it"),
    Field("target_lang", "STRING", "the answer's language, as the model names it"),
    Field("long_input", "STRING", "what happens to a text that is too long", choices=tuple(LongInput)),
)
_SEARCH = ("num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size")
SPEECH = (
    Field(
        "language",
        "STRING",
        "the language that is spoken, by its code or its English name; without it the model's, or the one it hears",
    ),
    Field(
        "task",
        "STRING",
        "write what is said, or translate it to English",
        choices=("transcribe", "translate"),
    ),
    Field("timestamps", "BOOL", "give segments with their times", False),
    Field("stream", "BOOL", "answer in parts, as the text comes", False, option=False, flag=False),
    *_SAMPLING,
    _REPETITION,
    _SEED,
    *(field for field in SEQ2SEQ if field.name in _SEARCH),
)
TEMPLATE = (*_SAMPLING, _REPETITION, _SEED)
EXPLANATION = (
    Field("by", "STRING", "what is hidden at a time", "word", choices=("word", "sentence", "token")),
    Field("label", "STRING", "the class that is explained, of a masked text the token; without it the likeliest"),
    Field("text_pair", "STRING", "of a classifier of pairs: the second text"),
    Field("query", "STRING", "of a ranker"),
    Field("question", "STRING", "of question answering, where the text is the context"),
    Field("candidate_labels", "STRING", "of zero-shot classification", shape=(-1,)),
    Field("hypothesis_template", "STRING", "of zero-shot classification: the sentence for a label"),
    Field("multi_label", "BOOL", "of zero-shot classification: score each label by itself", False),
    Field("answer", "STRING", "of a generator: the answer that is explained; without it the model's greedy one"),
    Field("chat", "BOOL", "of a generator: the text is a message for the chat template", False),
    Field("max_tokens", "INT32", "of a generator: how long its own answer may be; 64 without it", range=Range(1)),
    Field("variant", "STRING", "the variant that is explained; without it the default one", option=False),
    Field("page", "BOOL", "give the page with the marked text, too", False, option=False),
)
LANGUAGES = tuple(field for field in SEQ2SEQ if field.name.endswith("_lang"))


def without_aliases(inputs: Inputs, fields: Sequence[Field]) -> Inputs:
    """The tensors of a request, each under its field's first name.

    Raises:
        InvalidRequest: a field is given by two names.
    """
    renamed = {field.name: field.same_as for field in fields if field.same_as and field.name in inputs}
    for name, first in renamed.items():
        if first in inputs:
            raise InvalidRequest(f"{name} is another name of {first}: give one of them")
    return {renamed.get(name, name): tensor for name, tensor in inputs.items()}


def by_name(fields: Sequence[Field]) -> dict[str, Field]:
    """Fields by their names."""
    return {field.name: field for field in fields}
