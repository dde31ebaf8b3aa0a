"""Every place in the source that makes an error for users, and which test provokes it.

    pytest --note-raised tests/test_foo.py …     notes in tests/data/raised.json what these provoke

A site is known by file, function and the first words of its message, so moving a line changes nothing. Every run of
the tests watches (conftest.py), their child processes too (children/sitecustomize.py): where a test that is noted has
run and its error was not made, the run fails.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click

from tinychat_mlx import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinychat_mlx", "apps", "awq", "backends")
NOTES = ROOT / "tests" / "data" / "raised.json"
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type)}
CLICKS = {"UsageError", "BadParameter"}  # click's own, with which a command's arguments are refused
SEEN = "RAISED_SITES"  # variable: the file in which errors are noted as they are made


class Site(NamedTuple):
    """`text`: the message with {} for what is filled in; {} alone where the text comes from elsewhere."""

    file: str
    function: str
    error: str
    text: str
    first: int  # line
    last: int

    @property
    def key(self) -> str:
        words = [word.strip(",:;—()") for word in self.text.split()[:4]]
        return f"{self.file}:{self.function}: {' '.join(filter(None, words))}"


def sites() -> list[Site]:
    """All of them, in order of file and line."""
    found: list[Site] = []
    for folder in FOLDERS:
        for directory, names, files in os.walk(ROOT / folder):
            names[:] = [n for n in names if not (Path(directory) / n).is_symlink()]
            for name in sorted(files):
                if name.endswith(".py"):
                    found += _of_file(Path(directory) / name)
    return sorted(found)


def _of_file(path: Path) -> Iterator[Site]:
    file = path.relative_to(ROOT).as_posix()
    stack: list[tuple[ast.AST, str]] = [(ast.parse(path.read_text(encoding="utf-8")), "")]
    while stack:
        node, function = stack.pop()
        if isinstance(node, ast.Call) and (error := _made_by(node.func)):
            text = _fixed(node.args[0]) if node.args else ""
            yield Site(file, function, error, text, node.lineno, node.end_lineno or node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        stack += [(child, function) for child in ast.iter_child_nodes(node)]


def _made_by(called: ast.expr) -> str:
    """The class of error that a call makes: FormatError(…), errors.FormatError(…), click.UsageError(…), or "".

    type(error)(…) keeps another's class: TinychatError stands for it.
    """
    if isinstance(called, ast.Name) and called.id in CLASSES:
        return called.id
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        if called.value.id == "click" and called.attr in CLICKS:
            return f"click.{called.attr}"
        return called.attr if called.value.id == "errors" and called.attr in CLASSES else ""
    inner = called.func if isinstance(called, ast.Call) else None
    return "TinychatError" if isinstance(inner, ast.Name) and inner.id == "type" else ""


def _fixed(node: ast.expr) -> str:
    """The fixed words of a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_fixed(v) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _fixed(node.left) + _fixed(node.right)
    return "{}"


class Places:
    """file and line -> site."""

    def __init__(self) -> None:
        self.by_file: dict[str, list[Site]] = {}
        for site in sites():
            self.by_file.setdefault(site.file, []).append(site)

    def at(self, filename: str, line: int) -> Site | None:
        path = Path(filename).resolve()
        if not path.is_relative_to(ROOT):
            return None
        near = [
            s for s in self.by_file.get(path.relative_to(ROOT).as_posix(), []) if s.first <= line <= s.last
        ]
        return min(near, key=lambda s: s.last - s.first, default=None)


# what tests provoke ------------------------------------------------------------------------------------
@cache
def _places() -> Places:
    return Places()


@contextmanager
def watching(tell: Callable[[str, int, Exception], None]) -> Iterator[None]:
    """While this lasts, tell(file, line, error) is called for every error for users that this process makes."""
    before = errors.TinychatError.__init__, click.ClickException.__init__

    def ours(self: errors.TinychatError, *args: Any) -> None:
        Exception.__init__(self, *args)
        frame = sys._getframe(1)
        tell(frame.f_code.co_filename, frame.f_lineno, self)

    def clicks(self: click.ClickException, message: str) -> None:
        before[1](self, message)
        frame = sys._getframe(1)
        while frame.f_back is not None and Path(frame.f_code.co_filename).name == "exceptions.py":
            frame = frame.f_back  # out of the constructors of click's own classes
        tell(frame.f_code.co_filename, frame.f_lineno, self)

    errors.TinychatError.__init__ = ours  # type: ignore[method-assign,assignment]
    click.ClickException.__init__ = clicks  # type: ignore[method-assign]
    try:
        yield
    finally:
        errors.TinychatError.__init__, click.ClickException.__init__ = before  # type: ignore[method-assign]


@contextmanager
def noting(tell: Callable[[Site, str], None]) -> Iterator[None]:
    """While this lasts, tell(site, message) is called for every error that this process makes."""

    def found(file: str, line: int, error: Exception) -> None:
        if site := _places().at(file, line):
            tell(site, error.message if isinstance(error, click.ClickException) else errors.in_words(error))

    with watching(found):
        yield


def watch() -> None:
    """From now on every place that makes an error is noted in the file SEEN, once a test."""
    known: set[tuple[str, int, str]] = set()

    def tell(file: str, line: int, error: Exception) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("[")[0]
        row = file, line, test.removeprefix("tests/")
        if test and "test_errors.py" not in test and row not in known:
            known.add(row)
            with open(os.environ[SEEN], "a", encoding="utf-8") as notes:
                notes.write(json.dumps(row) + "\n")

    _always.enter_context(watching(tell))


_always = ExitStack()  # until the process ends


def begin() -> None:
    """Watch this run of the tests, and what it starts."""
    handle, os.environ[SEEN] = tempfile.mkstemp(suffix=".jsonl", prefix="raised-")
    os.close(handle)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests" / "children"), inherited]))
    watch()


def seen() -> set[tuple[str, str]]:
    """(key of a site, test that provoked it) so far."""
    rows = [json.loads(line) for line in Path(os.environ[SEEN]).read_text(encoding="utf-8").splitlines()]
    return {(site.key, test) for file, line, test in rows if (site := _places().at(file, line))}


def stale(complete: set[str]) -> dict[str, str]:
    """What tests are noted to provoke and, run from end to end, did not: key -> test."""
    if not (ROOT / "apps").is_dir():  # away from a checkout
        return {}
    provoked, noted = seen(), json.loads(NOTES.read_text(encoding="utf-8"))
    return {key: test for key, test in noted.items() if test in complete and (key, test) not in provoked}


def note(complete: set[str]) -> None:
    """Add what was seen to what other runs saw; what is stale, or in the source no more, goes."""
    kept: dict[str, str] = json.loads(NOTES.read_text(encoding="utf-8"))
    for key in stale(complete):
        del kept[key]
    for key, test in sorted(seen()):
        kept.setdefault(key, test)
    known = {site.key for site in sites()}
    text = json.dumps({k: kept[k] for k in sorted(kept) if k in known}, indent=0, ensure_ascii=False)
    NOTES.write_text(text + "\n", encoding="utf-8")
