"""What a line of a batch may ask for: the verbs, the fields of each, and the call of `Client` that answers them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trident_client import Client
from trident_client._options import EXPLANATION, GENERATION, TRANSCRIPTION, TRANSLATION
from trident_client.cli import output
from trident_client.cli.exits import InputError
from trident_client.cli.generation import answered

_Arguments = dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """A kind of request.

    Attributes:
        needs: the fields that a line must have; `text` stands for the first of them, too.
        takes: those that it may have, beside `model` and `timeout`.
        call: the result of a line's fields, as JSON has it.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    call: Callable[[Client, _Arguments], Any]


@dataclass(frozen=True)
class Asked:
    """A line of a batch.

    Attributes:
        line: its number in the input, from 1.
        id: the line's own name for itself; None: it has none.
        verb: of `VERBS`; "" of a line that asks for nothing because something is wrong with it.
        arguments: its fields and the defaults for those that it doesn't have.
        own_model: whether the line itself names its model.
        wrong: what is wrong with it; "" if nothing is.
    """

    line: int
    id: str | int | None
    verb: str = ""
    arguments: Mapping[str, Any] = ()  # type: ignore[assignment]
    own_model: bool = False
    wrong: str = ""

    @property
    def key(self) -> str | int:
        """What tells it from the other lines: its id, or else its number."""
        return f"id {json.dumps(self.id)}" if self.id is not None else self.line

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell what it asks for."""
        asked = [self.verb, dict(self.arguments), self.wrong]
        text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def answer(self, client: Client) -> Any:
        """The result, as JSON has it.

        Raises:
            TridentError: see its subclasses.
            InputError: something is wrong with the line.
            ValueError, TypeError: an argument has a value that it can't have.
        """
        if self.wrong:
            raise InputError(self.wrong)
        return VERBS[self.verb].call(client, dict(self.arguments))


def read(line: int, content: bytes, verb: str | None, defaults: Mapping[str, Any], *, texts: bool = False) -> Asked:
    """A line of a batch's input; one that can't be asked says so in `wrong`.

    Args:
        content: the line.
        verb: that of lines that name none.
        defaults: arguments of every line that doesn't give them.
        texts: whether the line is a text, and no JSON.
    """
    try:
        text = content.decode("utf-8")
        fields = text if texts else json.loads(text, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        return Asked(line, None, wrong=f"line {line} is not UTF-8: byte 0x{content[error.start]:02x}")
    except ValueError as error:
        return Asked(line, None, wrong=f"line {line} is no JSON: {error}")
    except RecursionError:
        return Asked(line, None, wrong=f"line {line} is no JSON that can be read: it is nested too deep")
    if isinstance(fields, str):
        fields = {"text": fields}
    if not isinstance(fields, dict):
        return Asked(line, None, wrong=f"line {line} is neither an object nor a text")
    return _checked(line, fields, verb, defaults)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _checked(line: int, fields: _Arguments, verb: str | None, defaults: Mapping[str, Any]) -> Asked:
    id = fields.pop("id", None)
    if id is not None and (not isinstance(id, str | int) or isinstance(id, bool)):
        return Asked(line, None, wrong=f"line {line}: an id is a text or a whole number, found {json.dumps(id)[:80]}")
    name = fields.pop("verb", verb)
    known = VERBS.get(name) if isinstance(name, str) else None
    if known is None:
        found = "names no verb" if name is None else f"has the unknown verb {json.dumps(name)[:80]}"
        return Asked(line, id, wrong=f"line {line} {found}; known are {', '.join(VERBS)}")
    if "text" in fields and "text" not in known.needs:
        if known.needs[0] in fields:
            return Asked(line, id, wrong=f"line {line} has both text and {known.needs[0]}, which are the same")
        fields[known.needs[0]] = fields.pop("text")
    allowed = (*known.needs, *known.takes, "model", "timeout")
    arguments = {name: value for name, value in defaults.items() if name in allowed} | fields
    if unknown := [name for name in fields if name not in allowed]:
        return Asked(line, id, wrong=f"line {line}: {name} has no {unknown[0]!r}; it has {', '.join(allowed)}")
    if missing := [name for name in known.needs if name not in arguments]:
        other = " (or text)" if missing[0] == known.needs[0] != "text" else ""
        return Asked(line, id, wrong=f"line {line} has no {missing[0]}{other}")
    return Asked(line, id, name, arguments, own_model="model" in fields)


def _generate(client: Client, given: _Arguments) -> Any:
    prompt, n = given.pop("prompt"), given.pop("n", None) or 1
    if n == 1:
        return answered(client.generate(prompt, **given), given)
    return [answered(each, given) for each in client.generate_many(prompt, n, **given)]


def _chat(client: Client, given: _Arguments) -> Any:
    messages, system = given.pop("messages"), given.pop("system", None)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return _generate(client, {"prompt": messages, **given})


def _translated(call: str) -> Callable[[Client, _Arguments], Any]:
    def answer(client: Client, given: _Arguments) -> Any:
        found = output.plain(getattr(client, call)(given.pop("texts"), **given))
        for each in found if isinstance(found, list) else [found]:
            del each["log_probs"]
        return found

    return answer


def _named(call: str) -> Callable[[Client, _Arguments], Any]:
    """What a method of the client gives; its first arguments go by their names, too."""
    return lambda client, given: output.plain(getattr(client, call)(**given))


VERBS: dict[str, Verb] = {
    "generate": Verb(("prompt",), ("n", *GENERATION), _generate),
    "chat": Verb(("messages",), ("system", "n", *GENERATION), _chat),
    "embed": Verb(("texts",), ("prompt_name", "dimensions", "truncate"), _named("embed")),
    "embed-sparse": Verb(("texts",), ("prompt_name", "truncate"), _named("embed_sparse")),
    "classify": Verb(("texts",), ("text_pairs", "top_k", "truncate"), _named("classify")),
    "zero-shot": Verb(
        ("texts", "candidate_labels"),
        ("hypothesis_template", "multi_label", "truncate"),
        _named("classify_zero_shot"),
    ),
    "entities": Verb(("texts",), ("aggregation_strategy", "truncate"), _named("entities")),
    "answer": Verb(("question", "context"), ("top_k", "max_answer_len", "handle_impossible_answer"), _named("answer")),
    "rank": Verb(("query", "passages"), ("prompt_name", "truncate"), _named("rank")),
    "fill-mask": Verb(("text",), ("top_k",), _named("fill_mask")),
    "translate": Verb(("texts",), tuple(TRANSLATION), _translated("translate")),
    "summarize": Verb(("texts",), tuple(TRANSLATION), _translated("summarize")),
    "transcribe": Verb(("audio",), tuple(TRANSCRIPTION), _named("transcribe")),
    "explain": Verb(("text", "model"), tuple(EXPLANATION), _named("explain")),
    "embed-images": Verb(("images",), (), _named("embed_images")),
    "classify-images": Verb(("images",), ("top_k",), _named("classify_images")),
    "zero-shot-images": Verb(
        ("images", "candidate_labels"), ("hypothesis_template",), _named("classify_images_zero_shot")
    ),
    "tokenize": Verb(("texts",), ("text_pairs", "truncate"), _named("tokenize")),
}
