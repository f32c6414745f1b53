"""Writes what is made from trident_serving.schema: the client's options, and the tables of docs/reference.

python tools/schema.py          writes them (`make schema`)
python tools/schema.py --check  says which are out of step, with status 1
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trident_serving.encoders import TASKS
from trident_serving.encoders.task import Tensor
from trident_serving.guard.rules import Rule
from trident_serving.schema.fields import EXPLANATION, GENERATION, LANGUAGES, SEQ2SEQ, SPEECH, TEMPLATE, Field
from trident_serving.schema.limits import (
    LIMITS,
    EncoderLimits,
    ExplanationLimits,
    GenerationLimits,
    ImageLimits,
    Limits,
    Seq2SeqLimits,
    SpeechLimits,
    TemplateLimits,
    VllmLimits,
)
from trident_serving.schema.vllm import VllmSettings

ROOT = Path(__file__).parents[1]
OPTIONS = ROOT / "client" / "trident_client" / "_options.py"
REQUESTS = ROOT / "docs" / "reference" / "requests.md"
MODELS = ROOT / "docs" / "reference" / "models-toml.md"
TABLES = {
    "generation": GENERATION,
    "seq2seq": SEQ2SEQ,
    "speech": SPEECH,
    "template": (*TEMPLATE, *LANGUAGES),
    "explanation": EXPLANATION,
}

_TYPES = {"INT32": "int", "UINT64": "int", "FP32": "float", "BOOL": "bool", "STRING": "str"}
_HEAD = '''"""The options of calls that generate, translate, summarize, transcribe or explain.

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
'''


def described(field: Field) -> str:
    """What a field does, its default and its range, in one line."""
    remarks = []
    if field.default is not None:
        remarks.append(f"default {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
    if field.range is not None:
        remarks.append(str(field.range))
    if field.choices:
        remarks.append("one of " + ", ".join(field.choices))
    return field.help + (f" ({'; '.join(remarks)})" if remarks else "")


def options() -> str:
    """The text of the client's module."""
    parts = [_HEAD]
    for name, what, fields in (
        ("Generation", "`generate`, `stream` and `chat`", GENERATION),
        ("Translation", "`translate` and `summarize`", SEQ2SEQ),
        ("Transcription", "`transcribe`", SPEECH),
        ("Explanation", "`explain`", EXPLANATION),
    ):
        own = [field for field in fields if field.option]
        lines = [f'class {name}Options(TypedDict, total=False):\n    """Options of {what}; None leaves one out.\n']
        lines.append("    Attributes:")
        lines += [f"        {field.name}: {described(field)}." for field in own]
        lines.append('    """\n')
        lines += [f"    {field.name}: {_annotation(field)} | None" for field in own]
        table = [f"{name.upper()}: dict[str, Option] = {{", *(f"    {_entry(field)}" for field in own), "}"]
        parts.append("\n".join(lines) + "\n\n\n" + "\n".join(table) + "\n")
    return "\n\n".join(parts)


def _annotation(field: Field) -> str:
    if field.annotation:
        return field.annotation
    if field.choices:
        return f"Literal[{', '.join(_quoted(choice) for choice in field.choices)}]"
    return f"list[{_TYPES[field.dtype]}]" if field.shape == (-1,) else _TYPES[field.dtype]


def _entry(field: Field) -> str:
    dtype = "BYTES" if field.dtype == "STRING" else field.dtype
    more = [f"choices=({', '.join(map(_quoted, field.choices))})"] if field.choices else []
    more += ["many=True"] if field.shape == (-1,) else []
    more += ["flag=False"] if not field.flag else []
    arguments = [_quoted(dtype), _quoted(described(field)), *more]
    inner = ", ".join(arguments)
    line = f"{_quoted(field.name)}: Option({inner}),"
    if len(line) + 4 <= 120:
        return line
    if len(inner) + 8 <= 120:
        return f"{_quoted(field.name)}: Option(\n        {inner}\n    ),"
    return f"{_quoted(field.name)}: Option(\n" + "".join(f"        {argument},\n" for argument in arguments) + "    ),"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def table(fields: Sequence[Field]) -> str:
    """The fields as a table of Markdown."""
    rows = ["| field | type | default | allowed | what it does |", "|---|---|---|---|---|"]
    for field in fields:
        kind = f"{field.dtype} {list(field.shape)}"
        default = "" if field.default is None else f"`{str(field.default).lower()}`"
        allowed = str(field.range) if field.range is not None else ", ".join(f"`{choice}`" for choice in field.choices)
        rows.append(f"| `{field.name}` | {kind} | {default} | {allowed} | {field.help} |")
    return "\n".join(rows)


def limits_table(*kinds: type[Limits] | type[Rule] | type[VllmSettings] | type[ExplanationLimits]) -> str:
    """The limits of dataclasses as a table of Markdown; those of all but the first name the tasks that have them."""
    rows = ["| key | default | meaning |", "|---|---:|---|"]
    base = {field.name: field.default for field in dataclasses.fields(kinds[0])}
    seen: dict[str, list[str]] = {}
    for kind in kinds:
        described_by = meanings(kind)
        tasks = ", ".join(f"`{task}`" for task, its in LIMITS.items() if its is kind)
        for field in dataclasses.fields(kind):
            if kind is not kinds[0] and field.name in base and base[field.name] == field.default:
                continue
            plain = "by length" if field.name == "buckets" else _plain(field.default)
            default = "required" if field.default is dataclasses.MISSING else f"`{plain}`"
            line = f"| `{field.name}` | {default} | {described_by[field.name]} |"
            seen.setdefault(line, []).append("" if kind is kinds[0] else tasks)
    for line, tasks_of in seen.items():
        only = ", ".join(filter(None, tasks_of))
        rows.append(line.removesuffix(" |") + f" (only {only}) |" if only else line)
    return "\n".join(rows)


def meanings(kind: type[object]) -> dict[str, str]:
    """What the fields of a dataclass mean, by the Attributes of its docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, attributes = (base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", attributes, flags=re.MULTILINE):
            found[name] = " ".join(text.split()).rstrip(".")
    return found


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and value:
        return ", ".join(map(str, value))
    return "none" if value == () else "vLLM's" if value is None else str(value) or '""'


def encoders_table() -> str:
    """The tensors of every encoder task as a table of Markdown."""
    rows = ["| task | a request gives | and may give | the answer |", "|---|---|---|---|"]
    for name, task in TASKS.items():
        columns = (task.texts, (*task.options, *task.answer_options), task.answers)
        rows.append(f"| `{name}` | " + " | ".join(", ".join(map(_tensor, tensors)) for tensors in columns) + " |")
    return "\n".join(rows)


def _tensor(tensor: Tensor) -> str:
    return f"`{tensor.name}` {tensor.data_type} [{', '.join(map(str, tensor.shape))}]"


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables written again, each between its two comments."""
    for name, found in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name.partition(':')[0]} -->)"
        text = re.sub(pattern, lambda match, found=found: f"{match[1]}\n{found}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def made() -> dict[Path, str]:
    """Every file that comes from the schema, with its text."""
    fields = {f"fields:{name}": table(fields) for name, fields in TABLES.items()}
    limits = {
        "limits:generation": limits_table(GenerationLimits),
        "limits:vllm": limits_table(VllmLimits),
        "limits:vllm-settings": limits_table(VllmSettings),
        "limits:encoders": limits_table(
            EncoderLimits, *dict.fromkeys(kind for kind in LIMITS.values() if issubclass(kind, EncoderLimits))
        ),
        "limits:images": limits_table(
            ImageLimits, *dict.fromkeys(kind for kind in LIMITS.values() if issubclass(kind, ImageLimits))
        ),
        "limits:seq2seq": limits_table(Seq2SeqLimits),
        "limits:speech": limits_table(SpeechLimits),
        "limits:template": limits_table(TemplateLimits),
        "limits:rule": limits_table(Rule),
        "limits:explanation": limits_table(ExplanationLimits),
    }
    pages = {REQUESTS: fields | {"fields:encoders": encoders_table()}, MODELS: limits}
    found = {page: with_tables(page.read_text(encoding="utf-8"), tables) for page, tables in pages.items()}
    return found | {OPTIONS: options()}


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns the exit status."""
    texts = made()
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what trident_serving.schema says: run make schema", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
