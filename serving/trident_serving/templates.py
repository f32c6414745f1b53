"""Tasks of an instruction-tuned generator: turns a request into prompts, and the answers into the task's tensors.

The template is data: a Jinja text over the request's fields, which becomes one message of the user. The generator is
another model of the same server, so that several tasks share its weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from trident_serving.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServingError
from trident_serving.schema.fields import LANGUAGES, TEMPLATE, by_name, single_text
from trident_serving.schema.limits import TemplateLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.text import decode_texts, encode_texts

Tensors = Mapping[str, NDArray[Any]]

# The fields that a template of each task may use.
FIELDS = {
    "translation": ("text_input", "source_lang", "target_lang"),
    "summarization": ("text_input",),
    "question-answering": ("question", "context"),
}
_MAX_TOKENS = by_name(TEMPLATE)["max_tokens"]
_LANGUAGE = re.compile(r"[\w()' -]{1,40}")
_ERRORS: dict[str, type[ServingError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAVAILABLE": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}


def compile_template(task: str, text: str) -> PromptTemplate:
    """A template that uses the task's fields and no others.

    Raises:
        ValueError: it is not a Jinja template, uses another name, or lacks a field of the request.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        used = meta.find_undeclared_variables(environment.parse(text))
    except TemplateError as error:
        raise ValueError(f"template is not a Jinja template: {error}") from None
    unknown = sorted(used - set(FIELDS[task]))
    needed = [name for name in FIELDS[task] if not name.endswith("_lang") and name not in used]
    if unknown or needed:
        found, known = ", ".join(sorted(used)) or "no field", ", ".join(FIELDS[task])
        raise ValueError(f"template uses {found}; a template of {task} uses {known}")
    return PromptTemplate(environment.from_string(text))


class PromptTemplate:
    """Makes a prompt of a request's fields."""

    def __init__(self, template: Any) -> None:
        self._template = template

    def render(self, fields: Mapping[str, str]) -> str:
        """The prompt."""
        text: str = self._template.render(**fields)
        return text


@dataclass(frozen=True)
class Prompt:
    """One call of the generator.

    Attributes:
        text: the message of the user.
        context: of question answering: the text that may hold the answer.
    """

    text: str
    context: str = ""


@dataclass(frozen=True)
class Completion:
    """One answer of the generator; `log_probs` has one for each of its tokens."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    log_probs: tuple[float, ...]

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Completion:
        """Read the generator's response."""
        return cls(
            text=tensors["text_output"].reshape(-1)[0].decode("utf-8"),
            finish_reason=tensors["finish_reason"].reshape(-1)[0].decode("utf-8"),
            num_input_tokens=int(tensors["num_input_tokens"].reshape(-1)[0]),
            num_output_tokens=int(tensors["num_output_tokens"].reshape(-1)[0]),
            log_probs=tuple(tensors["output_log_probs"].reshape(-1).tolist()),
        )


class TemplateTask:
    """One task in front of a generator, from the `parameters` of its config.

    Raises:
        ValueError: a parameter is missing, or the template is not the task's.
    """

    def __init__(self, parameters: Mapping[str, str]) -> None:
        missing = [name for name in ("task", "generator", "template", "max_tokens") if not parameters.get(name)]
        if missing:
            raise ValueError(f"parameters {', '.join(missing)} are missing")
        self.task = parameters["task"]
        self.limits = read_parameters(TemplateLimits, parameters)
        self._template = compile_template(self.task, self.limits.template)
        self._languages = {field: parameters.get(field.name, "") for field in LANGUAGES}

    def prompts(self, inputs: Tensors) -> list[Prompt]:
        """The prompts of a request: one, or one for each question.

        Raises:
            InvalidRequest: a field is empty, or a language is not the name of one.
        """
        if self.task == "question-answering":
            questions, contexts = (decode_texts(inputs[name], name) for name in ("question", "context"))
            if len(contexts) == 1:
                contexts = contexts * len(questions)
            if len(contexts) != len(questions) or not questions:
                raise InvalidRequest(
                    f"there are {len(questions)} questions and {len(contexts)} contexts: give one context, or one each"
                )
            return [
                Prompt(self._render({"question": question, "context": context}), context)
                for question, context in zip(questions, contexts, strict=True)
            ]
        return [Prompt(self._render({"text_input": single_text(inputs, "text_input"), **self._named(inputs)}))]

    def generator_inputs(self, inputs: Tensors, prompt: Prompt) -> dict[str, NDArray[Any]]:
        """The tensors of one call, [1, n] each; sampling options are passed on unchanged."""
        message = json.dumps([{"role": "user", "content": prompt.text}])
        tensors: dict[str, NDArray[Any]] = {
            "messages": encode_texts([message])[None],
            "max_tokens": np.array([[_MAX_TOKENS.read(inputs, self.limits.max_tokens)]], np.int32),
            "return_log_probs": np.array([[True]]),
            "return_reasoning": np.array([[True]]),  # so that it is no part of the answer
        }
        if self.limits.chat_template_kwargs.values:
            tensors["chat_template_kwargs"] = encode_texts([self.limits.chat_template_kwargs])[None]
        for field in TEMPLATE:
            if field is not _MAX_TOKENS and field.name in inputs:
                tensors[field.name] = inputs[field.name].reshape(1, -1)
        return tensors

    def answer(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, NDArray[Any]]:
        """The task's tensors, the same as those of the task's other models."""
        if self.task == "question-answering":
            return _answers(prompts, completions)
        (only,) = completions
        return {
            "text_output": encode_texts([only.text.strip()])[None],
            "finish_reason": encode_texts([only.finish_reason])[None],
            "num_input_tokens": np.array([[only.num_input_tokens]], np.int32),
            "num_output_tokens": np.array([[only.num_output_tokens]], np.int32),
            "output_log_probs": np.array([only.log_probs], np.float32),
        }

    def _named(self, inputs: Tensors) -> dict[str, str]:
        """The languages by field; "" where neither the request nor the model's config names one."""
        found = {}
        for field, default in self._languages.items():
            language = field.read(inputs, default)
            if language and not _LANGUAGE.fullmatch(language):
                raise InvalidRequest(f"{field.name} must be the name of a language, found {language[:80]!r}")
            found[field.name] = language
        return found

    def _render(self, fields: dict[str, str]) -> str:
        for name, value in fields.items():
            if not name.endswith("_lang") and not value.strip():
                raise InvalidRequest(f"{name} is empty")
        return self._template.render(fields)


def _answers(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, NDArray[Any]]:
    """Tensors [questions, 1]. An answer that the context holds has its span there; any other has the span 0 to 0."""
    texts, starts, ends, scores = [], [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion.text.strip()
        start = prompt.context.casefold().find(text.rstrip(".").casefold()) if text.rstrip(".") else -1
        same_length = len(prompt.context.casefold()) == len(prompt.context)
        end = start + len(text.rstrip("."))
        if start < 0 or not same_length:
            start = end = 0
        texts.append(prompt.context[start:end] if end else text)
        starts.append(start)
        ends.append(end)
        count = max(len(completion.log_probs), 1)
        scores.append(math.exp(sum(completion.log_probs) / count))
    return {
        "answer": encode_texts(texts)[:, None],
        "score": np.array(scores, np.float32)[:, None],
        "start": np.array(starts, np.int32)[:, None],
        "end": np.array(ends, np.int32)[:, None],
        "no_answer_score": np.zeros(len(texts), np.float32),
    }


def error_from(message: str) -> Exception:
    """The generator's error as an error of this request; its message begins with the name of a code."""
    name, separator, text = message.partition(": ")
    if separator and name in _ERRORS:
        return _ERRORS[name](text.replace("messages has", "the text with its template has"))
    return RuntimeError(message)
