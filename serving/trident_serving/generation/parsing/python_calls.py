"""Calls as models write them in Python: `weather(city="Zürich", days=2)`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

_FENCE = re.compile(r"^```\w*|```$")
# Longer code is text; Python's own parser takes memory for it.
MAX_CODE = 20_000


def calls_in(code: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls of known tools that a code consists of, with their arguments; None where it is something else.

    Args:
        tools: by name, the JSON schemas of their arguments, whose order that of positional arguments is.
    """
    if len(code) > MAX_CODE:
        return None
    try:
        body = ast.parse(_FENCE.sub("", code.strip())).body
        found = [call for statement in body for call in _of_statement(statement, tools)]
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        return None
    return found or None


def _of_statement(statement: ast.stmt, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The calls of one statement.

    Raises:
        ValueError: it is something else than calls of known tools.
    """
    if not isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign) or statement.value is None:
        raise ValueError("no call")
    value = statement.value
    values = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    return [_of_value(item, tools) for item in values]


def _of_value(value: ast.expr, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(value.func)
    if name == "print" and "print" not in tools and len(value.args) == 1:
        return _of_value(value.args[0], tools)
    name = name.removesuffix(".call") if name not in tools else name
    if name not in tools:
        raise ValueError(f"{name} is no tool")
    order = list(tools[name].get("properties") or {})
    if len(value.args) > len(order):
        raise ValueError("more arguments than the tool has")
    arguments = {key: ast.literal_eval(item) for key, item in zip(order, value.args, strict=False)}
    for keyword in value.keywords:
        if keyword.arg is None:
            raise ValueError("arguments that are no literals")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return name, {key: _as_json(item) for key, item in arguments.items()}


def _as_json(value: Any) -> Any:
    """A literal of Python as JSON has it.

    Raises:
        TypeError, ValueError: JSON has none.
    """
    if isinstance(value, tuple | list | set):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {_as_json(str(key)): _as_json(item) for key, item in value.items()}
    if not isinstance(value, str | int | float | bool | None):
        raise TypeError(f"{value!r} has no form in JSON")
    # Half of a surrogate pair, and infinity, are none either.
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value
