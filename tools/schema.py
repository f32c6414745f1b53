"""Writes what is made from trident_serving.schema: the client's options, and the tables of docs/reference/requests.md.

python tools/schema.py          writes them (`make schema`)
python tools/schema.py --check  says which are out of step, with status 1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trident_serving.schema.fields import GENERATION, LANGUAGES, SEQ2SEQ, TEMPLATE, Field

ROOT = Path(__file__).parents[1]
OPTIONS = ROOT / "client" / "trident_client" / "_options.py"
REQUESTS = ROOT / "docs" / "reference" / "requests.md"
TABLES = {"generation": GENERATION, "seq2seq": SEQ2SEQ, "template": (*TEMPLATE, *LANGUAGES)}

_TYPES = {"INT32": "int", "UINT64": "int", "FP32": "float", "BOOL": "bool", "STRING": "str"}
_HEAD = '''"""The options of calls that generate, translate or summarize.

Written by `make schema` from `trident_serving.schema.fields`: change that, not this.
"""

# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict


@dataclass(frozen=True)
class Option:
    """How an option is sent, and what `trident --help` says of it.

    Attributes:
        dtype: the tensor's type by its name in the protocol; "BYTES" of texts.
        help: what it does.
        choices: the texts that it may have; (): any.
        many: whether it is a list of texts.
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


def requests(text: str) -> str:
    """The page with its tables made anew, each between its two comments."""
    for name, fields in TABLES.items():
        pattern = rf"(<!-- fields:{name} -->\n).*?(<!-- /fields -->)"
        found = table(fields)
        text = re.sub(pattern, lambda match, found=found: f"{match[1]}\n{found}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns the exit status."""
    made = {OPTIONS: options(), REQUESTS: requests(REQUESTS.read_text(encoding="utf-8"))}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what trident_serving.schema says: run make schema", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
