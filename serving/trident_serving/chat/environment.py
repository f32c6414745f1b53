"""What a chat template may use: transformers' own environment, over texts whose origins are followed.

Filters and functions that make a new text of a request's give it the origin UNKNOWN, unless they are followed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from trident_serving.chat.origins import Traced, concat, from_request, origins_of, text_of


class _Generation(Extension):
    """`{% generation %}`, with which templates mark an assistant's words for training: its content is the prompt's."""

    tags = {"generation"}  # noqa: RUF012 - so jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """See jinja2's `Extension`."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Generator(CodeGenerator):
    """Jinja's compiler, but `a ~ b` keeps origins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the compiler's name
        self.write("concat((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of `apply_chat_template`."""

    code_generator_class = _Generator
    concat = staticmethod(concat)
    intercepted_binops = frozenset("%")

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=text_of)
        self.filters.update({name: _followed(function) for name, function in self.filters.items()})
        self.filters.update(join=_join, tojson=_followed(_to_json))
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
            dict=_Dict(),
            namespace=_Namespace,
        )

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See jinja2; the names leave those of a template's arguments free."""
        receiver = getattr(__obj, "__self__", None) if isinstance(__obj, BuiltinMethodType) else None
        if type(receiver) is str and from_request(args, kwargs):
            # The template's own text, as in `', '.join(names)`: its method follows origins too.
            __obj = getattr(Traced(receiver, origins_of(receiver)), __obj.__name__)
        result = super().call(__context, __obj, *args, **kwargs)
        if type(result) is str and not isinstance(__obj, Macro):
            return _told(result, receiver, args, kwargs)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See jinja2."""
        return _told(super().call_binop(context, operator, left, right), left, right)


def _told(result: Any, *sources: Any) -> Any:
    """A result, as a text of unknown origin where it is one without origins and a source may come from a request."""
    if isinstance(result, str) and not isinstance(result, Traced) and from_request(*sources):
        return Traced(str(result))
    return result


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose texts are told to come from a request where they may."""

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        # Jinja hands the environment or the context to some filters, as the first argument.
        sources = args[1:] if hasattr(function, "jinja_pass_arg") else args
        return _told(function(*args, **kwargs), *sources, *kwargs.values())

    return filtered


@pass_eval_context
def _join(eval_ctx: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter."""
    items: Iterator[Any] = iter(value)
    if attribute is not None:
        items = map(make_attrgetter(eval_ctx.environment, attribute), items)
    separator = str(d)
    return Traced(separator, origins_of(separator)).join(map(text_of, items))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers: without HTML's escapes, and with the arguments of `json.dumps`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Dict:
    """`dict` as a template may use it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """See `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's `namespace`, but for names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_attribute(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template can't set {name!r} of a namespace: the name begins with an underscore")
