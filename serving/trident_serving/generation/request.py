"""A generation request, checked: from the tensors of the call to what the engine runs.

The fields are those of `trident_serving.schema.fields`, plus the prompt: `text_input`, `messages` or `input_ids`.
Everything but the prompt is optional.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from trident_serving.chat.messages import (
    Conversation,
    ToolMode,
    parse_documents,
    parse_messages,
    parse_options,
    parse_tool_choice,
    parse_tools,
)
from trident_serving.chat.origins import plain
from trident_serving.errors import InvalidRequest
from trident_serving.generation.chat import Chat
from trident_serving.generation.images import PARTS, ImageReader, PromptImage, PromptImages
from trident_serving.generation.media import NO_MEDIA, MediaTokens
from trident_serving.runtime.sampling.defaults import NO_DEFAULTS, GenerationDefaults
from trident_serving.runtime.sampling.grammars import Grammar, GrammarKind
from trident_serving.runtime.sampling.params import SAMPLING, SamplingParams
from trident_serving.runtime.sampling.watermark import Watermark
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import (
    DEFAULT_TIMEOUT_SECONDS,
    GENERATION,
    MAX_BIASED_TOKENS,
    MAX_STOP_TOKENS,
    MAX_STOP_WORD_BYTES,
    MAX_STOP_WORDS,
    MESSAGES,
    Inputs,
    by_name,
    single_text,
    timeout_seconds,
    without_aliases,
)
from trident_serving.schema.limits import CausalLimits
from trident_serving.text import decode_texts

_SPLIT_SPECIAL_TOKENS = by_name(MESSAGES)["split_special_tokens"]
_KEPT = by_name(GENERATION)["truncate_prompt_tokens"]
_SKIP_SPECIAL_TOKENS = by_name(GENERATION)["skip_special_tokens"]
_IMAGE_DATA = re.compile(r'"data:[^"\\]*(?:\\.[^"\\]*)*"')  # a data URL, as JSON has it
T = TypeVar("T", bound=str)
_END_CHARACTERS = 64  # of a prompt, which show whether it has opened the reasoning
MAX_TRUNCATED_BYTES = 2**20

# Fields whose default a model's generation config may give.
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationRequest:
    """One checked request.

    Attributes:
        prompt: the text that was tokenized, after the chat template.
        prompt_ids: its tokens, at least one.
        top_log_probs: for how many of the likeliest tokens log-probabilities are returned at each position.
        include_prompt: whether the answer repeats the prompt's text.
        prompt_lookup: see `Job`.
        timeout_seconds: the request fails once so much time is over.
        conversation: what the chat template was given; None: the prompt is a text of the request.
        prompt_end: the end of the rendered prompt, whatever of it was cut.
        return_reasoning: whether the model's reasoning comes apart from the text of its answer.
        return_prompt_token_ids: whether the prompt's tokens are told.
        return_tokens: whether the answer's tokens are told, and the bytes of all that are.
        stop_token_ids: end the answer beside the model's own end tokens.
        ignore_eos: the model's own do not.
        skip_special_tokens: whether the answer's text leaves them out.
        prompt_log_probs: for how many of the likeliest tokens log-probabilities of the prompt are returned at each
            position, beside its own; None: none at all.
        answers: to the prompt.
        grammar: what the answer follows; None: nothing.
        counts_chunks: whether a response counts its own tokens only.
        adapter: number of the model's adapter that answers; 0: the base does.
        bad_words: the texts whose tokens `sampling` forbids.
        images: of the prompt; None: it has none.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_words: tuple[str, ...] = ()
    stream: bool = False
    return_log_probs: bool = False
    top_log_probs: int = 0
    include_prompt: bool = False
    prompt_lookup: bool = True
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_log_probs: int | None = None
    answers: int = 1
    grammar: Grammar | None = None
    counts_chunks: bool = False
    conversation: Conversation | None = None
    prompt_end: str = ""
    return_reasoning: bool = False
    adapter: int = 0
    return_prompt_token_ids: bool = False
    return_tokens: bool = False
    bad_words: tuple[str, ...] = ()
    images: PromptImages | None = None

    @property
    def needs_model(self) -> bool:
        """Whether the answer takes a run of the model, not only the tokenizer."""
        return self.sampling.max_tokens > 0 or self.prompt_log_probs is not None


class RequestParser:
    """Turns tensors into requests for one model.

    Args:
        chat: the model's conversations; None: it takes texts only.
        defaults: what the model's generation config says where a request does not.
        vocabulary_size: tokens of the model.
        adapters: names of the model's adapters.
        images: reads images for the model; None: it reads none.
        media: the model's tokens of images, videos and sound.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        chat: Chat | None,
        limits: CausalLimits,
        defaults: GenerationDefaults = NO_DEFAULTS,
        vocabulary_size: int = 2**31,
        adapters: Sequence[str] = (),
        images: ImageReader | None = None,
        media: MediaTokens = NO_MEDIA,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._defaults = defaults
        self._vocabulary_size = vocabulary_size
        self._images = images
        self._media = media
        self._adapters = {name: number for number, name in enumerate(adapters, start=1)}

    def parse(self, inputs: Inputs, timeout: object = None) -> GenerationRequest:
        """Check the tensors of one request, each of them [1, n].

        Args:
            timeout: the request parameter of that name, in microseconds; None or 0 where there is none.

        Raises:
            InvalidRequest: a field is missing, malformed or out of range.
        """
        inputs = without_aliases(inputs, GENERATION)
        conversation, images = self._conversation(inputs)
        values = {field.name: field.read(inputs) for field in GENERATION if field.shape == (1,)}
        rendered, prompt, prompt_ids = self._prompt(
            inputs, conversation, images, values["truncate_prompt_tokens"], values["max_tokens"]
        )
        room = self._limits.context - len(prompt_ids)
        if values["max_tokens"] == 0 and values["prompt_logprobs"] is None and not values["return_prompt_token_ids"]:
            raise InvalidRequest(
                "max_tokens must be at least 1, found 0; 0 is for requests with prompt_logprobs or "
                "return_prompt_token_ids"
            )
        if values["max_tokens"] is None:
            values["max_tokens"] = min(self._limits.default_max_tokens, room)
        for name in DEFAULTS:
            if name not in inputs:
                values[name] = getattr(self._defaults, name)
        if "min_tokens" not in inputs:
            values["min_tokens"] = min(self._defaults.min_new_tokens, values["max_tokens"])
        bad_words = _words(inputs, "bad_words")
        sampling = SamplingParams(
            **{name: values[name] for name in SAMPLING if name in values},
            seed=values["random_seed"],
            bad_words=self._bad_words(bad_words),
            logit_bias=self._logit_bias(values["logit_bias"]),
            watermark=self._watermark(values["watermarking_config"]),
            defaults=self._defaults,
        )
        if sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {sampling.max_tokens}, but the prompt's {len(prompt_ids)} tokens leave room for {room} "
                f"in the context of {self._limits.context}"
            )
        stop_words = _words(inputs, "stop_words")
        grammar = _grammar(inputs, values)
        turn_ends: frozenset[int] = frozenset()
        if self._chat is not None and conversation is not None and not values["ignore_eos"]:
            turn_ends = self._chat.end_token_ids
        return GenerationRequest(
            prompt=prompt,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            stop_words=stop_words,
            stream=values["stream"],
            return_log_probs=values["return_log_probs"] or values["top_logprobs"] > 0,
            top_log_probs=values["top_logprobs"],
            include_prompt=not values["exclude_input_in_output"],
            prompt_lookup=values["prompt_lookup"],
            timeout_seconds=timeout_seconds(timeout, self._limits.timeout),
            stop_token_ids=self._stop_token_ids(inputs, values["end_id"], stop_words) | turn_ends,
            ignore_eos=values["ignore_eos"],
            skip_special_tokens=values["skip_special_tokens"],
            prompt_log_probs=values["prompt_logprobs"],
            answers=values["n"],
            grammar=self._forced(conversation, rendered, grammar) or grammar,
            counts_chunks=values["return_num_output_tokens"],
            conversation=conversation,
            prompt_end=rendered[-_END_CHARACTERS:],
            return_reasoning=values["return_reasoning"],
            return_prompt_token_ids=values["return_prompt_token_ids"],
            return_tokens=values["return_tokens"],
            adapter=self._adapter(values["lora_name"]),
            bad_words=bad_words,
            images=self._placed(prompt_ids, images),
        )

    def _conversation(self, inputs: Inputs) -> tuple[Conversation | None, Sequence[PromptImage]]:
        """What the chat template gets, None where the prompt is a text, and the images of the request."""
        reader = self._images
        given = [name for name in ("text_input", "messages", "input_ids") if name in inputs]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of text_input, messages and input_ids, found {' and '.join(given) or 'none'}"
            )
        if given != ["messages"]:
            for field in MESSAGES:
                if field.name in inputs and field.read(inputs) not in (False, field.default):
                    raise InvalidRequest(f"{field.name} needs messages; {given[0]} is read as it is")
            return None, [] if reader is None else reader.read(reader.files(inputs.get("images")))
        text = single_text(inputs, "messages")
        # Images have limits of their own; what else is in the messages has that of a text.
        counted = text if reader is None else _IMAGE_DATA.sub('""', text)
        self._check_bytes(counted, "messages", _KEPT.read(inputs))
        if self._chat is None:
            raise InvalidRequest("messages needs a model with a chat template: send text_input instead")
        sent = {
            name: self._checked_text(inputs, name)
            for name in ("tools", "documents", "chat_template_kwargs", "tool_choice")
            if name in inputs
        }
        images: list[PromptImage] = []
        messages = parse_messages(text, ("text",) if reader is None else ("text", *PARTS))
        if reader is not None:
            messages, files = reader.take(messages, reader.files(inputs.get("images")))
            images = reader.read(files)
        tools = parse_tools(sent["tools"]) if "tools" in sent else None
        choice = parse_tool_choice(sent["tool_choice"], tools) if "tool_choice" in sent else ToolMode.AUTO
        conversation = Conversation(
            messages,
            tools=None if choice == ToolMode.NONE else tools,
            tool_choice=choice,
            documents=parse_documents(sent["documents"]) if "documents" in sent else None,
            options=parse_options(sent["chat_template_kwargs"]) if "chat_template_kwargs" in sent else {},
        )
        return conversation, images

    def _forced(self, conversation: Conversation | None, rendered: str, other: Grammar | None) -> Grammar | None:
        """The grammar of a call that `tool_choice` forces."""
        if self._chat is None or conversation is None:
            return None
        grammar = self._chat.forced_grammar(conversation, rendered)
        if grammar is None:
            return None
        if other is not None:
            raise InvalidRequest(f"give one of tool_choice and {other.field}: an answer follows one grammar")
        return Grammar(GrammarKind.LARK, grammar, "tool_choice")

    def _prompt(
        self,
        inputs: Inputs,
        conversation: Conversation | None,
        images: Sequence[PromptImage],
        kept: int | None,
        max_tokens: int | None,
    ) -> tuple[str, str, list[int]]:
        """The text of a prompt as it was rendered, and as its tokens have it, with them."""
        if images and kept is not None:
            raise InvalidRequest("truncate_prompt_tokens can't be used with images, which it could cut apart")
        self._check_images(images)
        if "input_ids" in inputs:
            field = "input_ids"
            ids = self._given_ids(inputs)
            prompt = self._tokenizer.decode(ids, skip_special_tokens=_SKIP_SPECIAL_TOKENS.read(inputs))
        elif conversation is None:
            field = "text_input"
            prompt = self._checked_text(inputs, field)
            if self._images is not None:
                prompt = self._with_images(prompt, images, self._marks(prompt), field)
            ids = self._tokenizer.encode(prompt)
        else:
            field = "messages"
            assert self._chat is not None
            traced = self._chat.template.render(conversation)
            self._check_bytes(traced, field, kept)
            if images and self._images is not None:
                control, token = self._chat.control, self._images.settings.token
                marks = control.places(traced, token, conversation.texts)
                traced = self._with_images(traced, images, marks, field)
            prompt = plain(traced)
            if _SPLIT_SPECIAL_TOKENS.read(inputs):
                ids = self._chat.control.encode(traced, conversation.texts)
            else:
                ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        rendered = prompt
        if not ids:
            raise InvalidRequest(f"{field} is empty: the model needs at least one token to go on from")
        if kept is not None:
            ids = self._truncated(ids, kept, max_tokens)
            prompt = self._tokenizer.decode(ids)
        longest = self._limits.context - (max_tokens != 0)
        if len(ids) > longest:
            raise InvalidRequest(
                f"{field} has {len(ids)} tokens, the model's context of {self._limits.context} allows {longest}"
                + (" and one generated token" if max_tokens != 0 else "")
            )
        return rendered, prompt, ids

    def _check_images(self, images: Sequence[PromptImage]) -> None:
        """Refuse images that can't fit before their tokens are written."""
        if self._images is not None and (tokens := self._images.tokens(images)) >= self._limits.context:
            cut = ", ".join(f"{image.name} {self._images.settings.shown(image.grid)}" for image in images)
            raise InvalidRequest(
                f"images take {tokens} tokens ({cut}), the model's context of {self._limits.context} allows fewer: "
                "send fewer images, or smaller ones, or ones nearer to a square"
            )

    def _placed(self, ids: Sequence[int], images: Sequence[PromptImage]) -> PromptImages | None:
        """Where the images of a prompt are; None: it has none."""
        if self._images is None:
            self._media.check_none(ids)
            return None
        placed = self._images.placed(ids, images)
        self._images.settings.check_marks(ids, self._media, [image.grid for image in images])
        return placed

    def _marks(self, prompt: str) -> list[tuple[int, int]]:
        """Where a text says that an image goes, as (begin, end)."""
        assert self._images is not None
        return [match.span() for match in re.finditer(re.escape(self._images.settings.token), prompt)]

    def _with_images(self, prompt: T, images: Sequence[PromptImage], marks: Sequence[tuple[int, int]], field: str) -> T:
        """A prompt with what stands for each image in the place of its mark."""
        assert self._images is not None
        settings = self._images.settings
        if len(marks) != len(images):
            raise InvalidRequest(
                f"{field} says {len(marks)} times where an image goes ({settings.token}), and the request's images are "
                f"{len(images)}"
            )
        parts: list[str] = []
        end = 0
        for (begin, behind), image in zip(marks, images, strict=True):
            parts += [prompt[end:begin], settings.expanded(image.grid)]
            end = behind
        return type(prompt)("").join([*parts, prompt[end:]])  # type: ignore[return-value]

    def _given_ids(self, inputs: Inputs) -> list[int]:
        """The tokens of a prompt that a request names by their ids."""
        given = inputs["input_ids"].reshape(-1)
        if given.size:
            for token in (int(given.min()), int(given.max())):
                self._check_token("input_ids", token)
        ids: list[int] = given.tolist()
        return ids

    def _checked_text(self, inputs: Inputs, field: str) -> str:
        text = single_text(inputs, field)
        self._check_bytes(text, field, _KEPT.read(inputs))
        return text

    def _truncated(self, ids: list[int], kept: int, max_tokens: int | None) -> list[int]:
        """The last tokens of a prompt."""
        if kept == 0:
            raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1, found 0")
        if kept == -1:
            answer = self._limits.default_max_tokens if max_tokens is None else max_tokens
            kept = max(self._limits.context - answer, 1)
        return ids[-kept:]

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word at the beginning of a text, and behind a space where that begins otherwise."""
        found: list[tuple[int, ...]] = []
        for word in words:
            plain, spaced = (
                tuple(self._tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
            )
            found.append(plain)
            if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
                found.append(spaced)
        return tuple(filter(None, found))

    def _stop_token_ids(self, inputs: Inputs, end: int | None, words: Sequence[str]) -> frozenset[int]:
        """Those of the request, with the special tokens that stop words name: these are in no text."""
        found = [int(token) for token in inputs.get("stop_token_ids", np.empty(0, np.int32)).reshape(-1)]
        if len(found) > MAX_STOP_TOKENS:
            raise InvalidRequest(f"stop_token_ids holds {len(found)} tokens, the limit is {MAX_STOP_TOKENS}")
        if end is not None and end >= 0:
            found.append(end)
        for token in found:
            self._check_token("stop_token_ids", token)
        special = self._tokenizer.special_tokens
        return frozenset([*found, *(special[word] for word in words if word in special)])

    def _logit_bias(self, text: str | None) -> tuple[tuple[int, float], ...]:
        if not text:
            return ()
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise InvalidRequest(f'logit_bias must be a JSON object like {{"42": -1.5}}, found {text[:80]!r}')
        if len(given) > MAX_BIASED_TOKENS:
            raise InvalidRequest(f"logit_bias holds {len(given)} tokens, the limit is {MAX_BIASED_TOKENS}")
        bias: dict[int, float] = {}
        for name, value in given.items():
            if not name.isascii() or not name.isdecimal():
                raise InvalidRequest(f"logit_bias must name tokens by their ids, found {name[:80]!r}")
            token = int(name[:20])
            self._check_token("logit_bias", token)
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise InvalidRequest(f"logit_bias must hold numbers between -100 and 100, found {str(value)[:80]}")
            bias[token] = float(value)
        return tuple(bias.items())

    def _watermark(self, text: str | None) -> Watermark | None:
        if not text:
            return None
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise InvalidRequest(f'watermarking_config must be a JSON object like {{"bias": 2.0}}, found {text[:80]!r}')
        return Watermark.from_config(given, self._vocabulary_size)

    def _adapter(self, name: str | None) -> int:
        """The number of the adapter of a name; 0 of the base, which has none."""
        if not name:
            return 0
        if name not in self._adapters:
            known = f"its adapters are {', '.join(self._adapters)}" if self._adapters else "this model has no adapters"
            raise InvalidRequest(f"lora_name {name[:80]!r} is not known: {known}; leave it out to ask the base")
        return self._adapters[name]

    def _check_token(self, field: str, token: int) -> None:
        if not 0 <= token < self._vocabulary_size:
            raise InvalidRequest(f"{field} names the token {token}, the model has {self._vocabulary_size}")

    def _check_bytes(self, text: str, field: str, kept: int | None) -> None:
        """Refuse a hopeless text before tokenizing it: a megabyte takes half a second, which others wait."""
        longest = self._tokenizer.longest_token_bytes
        size = len(text.encode("utf-8", "surrogatepass"))
        if kept is not None:
            if size > MAX_TRUNCATED_BYTES:
                raise InvalidRequest(f"{field} has {size} bytes, the limit of a text to cut is {MAX_TRUNCATED_BYTES}")
            return
        if longest is not None and size > longest * self._limits.context:
            raise InvalidRequest(
                f"{field} has {size} bytes, at least {-(-size // longest)} tokens, and the model's context "
                f"is {self._limits.context} tokens"
            )


def _words(inputs: Inputs, field: str) -> tuple[str, ...]:
    """The texts of a list; an empty text is none."""
    tensor = inputs.get(field)
    if tensor is None:
        return ()
    if tensor.size > MAX_STOP_WORDS:
        raise InvalidRequest(f"{field} holds {tensor.size} texts, the limit is {MAX_STOP_WORDS}")
    return tuple(filter(None, decode_texts(tensor.astype(np.object_), field, MAX_STOP_WORD_BYTES)))


_GUIDES = {
    "json": GrammarKind.JSON,
    "json_schema": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "choice": GrammarKind.CHOICE,
    "ebnf_grammar": GrammarKind.GBNF,
    "lark_grammar": GrammarKind.LARK,
}


def _grammar(inputs: Inputs, values: Mapping[str, Any]) -> Grammar | None:
    """What the answer follows, by the field that says it."""
    names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_guide_type")
    given = [name for name in names if name in inputs]
    if len(given) > 1:
        raise InvalidRequest(f"give one of {' and '.join(given)}: an answer follows one grammar")
    if not given:
        if "guided_decoding_guide" in inputs:
            raise InvalidRequest("guided_decoding_guide needs guided_decoding_guide_type")
        return None
    name = given[0]
    if name == "guided_choice":
        return Grammar(GrammarKind.CHOICE, json.dumps(_words(inputs, name)), name)
    if name == "guided_decoding_guide_type":
        kind = _GUIDES[values[name]]
        if kind != GrammarKind.JSON and "guided_decoding_guide" not in inputs:
            raise InvalidRequest(f"guided_decoding_guide_type {values[name]!r} needs guided_decoding_guide")
        return Grammar(kind, values["guided_decoding_guide"] or "", "guided_decoding_guide")
    kinds = {"guided_json": GrammarKind.JSON_SCHEMA, "guided_regex": GrammarKind.REGEX}
    lark_or_gbnf = GrammarKind.GBNF if "::=" in values[name] else GrammarKind.LARK
    return Grammar(kinds.get(name, lark_or_gbnf), values[name], name)
