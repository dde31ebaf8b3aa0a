"""Every place in the source that makes an error for users, and which test provokes it.

    PYTHONPATH=.:tests pytest -p raise_sites tests/test_foo.py …     notes in tests/data/raised.json what these provoke

A site is known by file, function and the first words of its message, so moving a line changes nothing.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tinychat_mlx import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinychat_mlx", "apps", "awq", "backends")
NOTES = ROOT / "tests" / "data" / "raised.json"
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type)}


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
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
            text = _fixed(node.args[0]) if node.args else ""
            yield Site(file, function, node.func.id, text, node.lineno, node.end_lineno or node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        stack += [(child, function) for child in ast.iter_child_nodes(node)]


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
def noting(tell: Callable[[Site, str], None]) -> Iterator[None]:
    """While this lasts, tell(site, message) is called for every error that this process makes."""

    def note(self: errors.TinychatError, *args: Any) -> None:
        Exception.__init__(self, *args)
        frame = sys._getframe(1)
        if site := _places().at(frame.f_code.co_filename, frame.f_lineno):
            tell(site, errors.in_words(self))

    before = errors.TinychatError.__init__
    errors.TinychatError.__init__ = note  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        errors.TinychatError.__init__ = before  # type: ignore[method-assign]


def watch() -> None:
    """From now on every error is noted in the file RAISED_SITES, with the running test."""

    def tell(site: Site, message: str) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("[")[0]
        if test and "test_errors.py" not in test:
            with open(os.environ["RAISED_SITES"], "a", encoding="utf-8") as file:
                file.write(json.dumps([site.key, test.removeprefix("tests/")]) + "\n")

    _watching.enter_context(noting(tell))


_watching = ExitStack()  # until the process ends


def pytest_configure() -> None:
    """As a plugin. Children take part if a sitecustomize.py in their PYTHONPATH calls `watch`."""
    os.environ.setdefault("RAISED_SITES", str(ROOT / "build" / "raised.jsonl"))
    Path(os.environ["RAISED_SITES"]).unlink(missing_ok=True)
    watch()


def pytest_sessionfinish() -> None:
    """Add what was seen to what other runs saw; what is in the source no more goes."""
    kept: dict[str, str] = json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.exists() else {}
    seen = Path(os.environ["RAISED_SITES"])
    for line in seen.read_text(encoding="utf-8").splitlines() if seen.exists() else ():
        kept.setdefault(*json.loads(line))
    known = {site.key for site in sites()}
    text = json.dumps({k: kept[k] for k in sorted(kept) if k in known}, indent=0, ensure_ascii=False)
    NOTES.write_text(text + "\n", encoding="utf-8")
