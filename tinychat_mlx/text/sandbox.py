"""Sandbox for untrusted chat templates.

A template comes with the model folder, so it is code of an unknown author. It runs in jinja2's immutable sandbox,
configured as in transformers 5 (to render the same text), with limits that transformers does not have: CPU time, the
length of strings and lists, and the size of integers. This module imports jinja2 (60 ms), so import it only when
needed.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_LENGTH = 4 << 20  # characters of a string, items of a list: far above a million tokens of text
MAX_BITS = 4096  # bits of an integer
MAX_SECONDS = 2.0  # CPU time of this thread, so that load on the machine does not count

# These make a long result from short arguments, in one step that cannot be interrupted.
_WIDENING = {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "tojson", "zfill"}


class LimitError(TemplateError):
    """A template exceeds a limit of time or size."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox as in transformers 5, with limits on time and size.

    Every loop iteration, call, filter and operator that can enlarge a value is checked. A single built-in step on
    large values (`select` by `in` over two long lists) is not interrupted: it is slow, but it terminates.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.code_generator_class = _Generator
        self._thread = threading.local()
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = self._guarded(name, function)
        del self.globals["lipsum"]  # no template needs it, and several sandbox escapes used it
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Limit the template code inside this block to MAX_SECONDS in total."""
        self._thread.end = time.thread_time() + MAX_SECONDS
        try:
            yield
        finally:
            del self._thread.end

    def tick(self) -> None:
        """Raise LimitError if the time is used up."""
        if time.thread_time() > getattr(self._thread, "end", float("inf")):
            raise LimitError(f"it runs longer than {MAX_SECONDS:g} s")

    def bounded(self, value: Any) -> Any:
        """Return the value, or raise LimitError if it is too long or the time is used up."""
        self.tick()
        if isinstance(value, str | list | tuple | dict) and len(value) > MAX_LENGTH:
            raise LimitError(f"it makes a value of more than {MAX_LENGTH} characters")
        return value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _check_widening(obj.__name__, (owner, *args))
        return self.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for times, many in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | list | tuple):
                    _check_size(times * len(many), MAX_LENGTH)
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            grown = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _check_size(grown, MAX_BITS)
        return self.bounded(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile with a time check in each loop iteration and a size check of each captured block."""
        for loop in source.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        for block in source.find_all(nodes.AssignBlock):
            if block.filter is None:
                block.filter = nodes.Filter(None, "string", [], [], None, None)
                block.filter.set_lineno(block.lineno)
        return super()._generate(source, *args, **kwargs)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps the attributes by which jinja2 passes the context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            _check_widening(name, (*args, *kwargs.values()))
            return self.bounded(function(*args, **kwargs))

        return guarded


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it returns its body unchanged."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(lineno)

    def _pass_on(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """Replaces `dict` without exposing the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without underscore names, which jinja2 itself looks up on objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # allows `namespace(self=…)` as a plain attribute
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute must not begin with an underscore ({name!r})")


def _check_widening(name: str, args: tuple[Any, ...]) -> None:
    """Raise LimitError before a built-in step makes a huge value."""
    if name in _WIDENING:
        _check_size(max((a for a in args if isinstance(a, int)), default=0), MAX_LENGTH)
    if name in ("replace", "join"):  # at most one insertion per character or item
        sizes = sorted(len(a) for a in args if isinstance(a, str | list | tuple))
        _check_size(sizes[-1] * sizes[-2] if len(sizes) > 1 else 0, 64 * MAX_LENGTH)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise LimitError(f"it needs a value of size {size:.3g}")


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Serialise as transformers does. jinja2's own filter escapes HTML and sorts keys, unlike training data."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))
