"""Comments, docstrings, messages and documents use no word of the list below."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

# Folders and files of the checkout that the test reads.
COVERED = [
    "tinychat_mlx",
    "apps",
    "awq",
    "backends",
    "tests",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
COVERED += ["Makefile", "pyproject.toml", ".github"]
# Modules whose strings are training data of the demo model, or openings of text for calibration.
DATA = ("apps/demo/", "awq/calibration/openings.py")

UNIT = (
    r"(?:bits?|bytes?|[kKMGT]i?B|ms|µs|us|once|twice|times|tokens|launch(?:es)?|products?|instructions?"
    r"|operations|reads|transfers|scales?"
    r"|(?:one|two|three|four|eight|\d+)(?: (?!of|for|in|is|with|to|from|on|at|and|or)\w+)?)"
)
PER = (
    r"(?:second|minute|hour|day|step|pass|call|turn|token|row|weight|value|element|group|channel|layer|expert"
    r"|head|thread|core|line|file|model|width|block|tile|word|byte|lane|launch|program|position|sequence)"
)
# Pattern -> what to write instead.
AVOID = {
    rf"{UNIT} an? {PER}": "per",
    r"lies?": "is",
    r"nobody(?:'s|’s)?": "no one, or name what does not happen",
    r"said|told": "name who reports what: prints, reports, states, is given",
    r"alone": "only",
    r"beside": "next to",
    r"apart": "separate, separately, except",
    r"anew": "again",
    r"aloud": "prints",
    r"mend(?:s|ed|ing)?": "repair",
    r"in vain": "without effect",
    r"(?:its|their) due": "its share",
    r"(?:go|goes|went|going) on(?! (?:the|a|an|disk)\b)": "continue",
    r"(?:stand|stands|stood) round": "surround",
    r"whence|whither|lest|hence(?:forth)?": "from which, so that, therefore",
    r"as good as": "almost",
    r"by and by|of late|be it": "plain words",
}
PATTERNS = {
    re.compile(rf"\b(?:{pattern})\b".replace(" ", r"[\s/*#]+"), re.IGNORECASE): remedy
    for pattern, remedy in AVOID.items()
}
C_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
QUESTION = re.compile(r"(?:What|How|Where|Which|Who|Why|Is|Are|Does|Do|Can|May)\b")
JOIN = re.compile(r"""["']\s*f?["']""")  # between the parts of a string literal
C_NAMES = (".cpp", ".h", ".cu", ".cuh", ".metal")
HASH_NAMES = (".toml", ".yml", ".cmake", "Makefile", "CMakeLists.txt")
READ = (".py", ".md", *C_NAMES, *HASH_NAMES)
Text = tuple[int, str]  # the number of its first line, and the text


def of_python(source: str, data: bool) -> Iterator[Text]:
    """Comments, docstrings and (unless the module is data) strings of several words."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    nodes = list(ast.walk(ast.parse(source)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    if not data:
        prose |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        prose |= {
            id(node) for node in nodes if isinstance(node, ast.Constant) and " " in str(node.value).strip()
        }
    for node in nodes:
        if id(node) in prose and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def texts(name: str, source: str) -> Iterator[Text]:
    """The text in a file that people read."""
    if name.endswith(".py"):
        yield from of_python(source, name.startswith(DATA))
    elif name.endswith(".md"):
        yield 1, source
    elif name.endswith(C_NAMES):
        for match in C_TEXT.finditer(source):
            yield source.count("\n", 0, match.start()) + 1, match.group()
    elif name.endswith(HASH_NAMES):
        for number, line in enumerate(source.splitlines(), 1):
            yield number, line.partition("#")[2]


def questions(source: str) -> Iterator[int]:
    """Lines of the docstrings that begin or end as a question does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if text.endswith("?") or text.partition("\n")[0].endswith("?") or QUESTION.match(text):
                yield getattr(node, "lineno", 1)


def offenders(name: str, source: str) -> Iterator[str]:
    """file:line: word, and what to write instead."""
    # Splitting a file into its texts takes far longer than a search, so most files are only searched.
    whole = JOIN.sub("", source)
    suspect = any(pattern.search(whole) for pattern in PATTERNS)
    for first, text in texts(name, source) if suspect else ():
        for pattern, remedy in PATTERNS.items():
            for match in pattern.finditer(text):
                line = first + text.count("\n", 0, match.start())
                yield f"{name}:{line}: {match.group()!r}: write {remedy}"
    if name.endswith(".py"):
        for line in questions(source):
            yield f"{name}:{line}: a question as a docstring: write what it is, does or returns"


def files() -> Iterator[str]:
    for name in COVERED:
        path = ROOT / name
        for p in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found = p.relative_to(ROOT).as_posix()
            if found.endswith(READ) and p.is_file() and p != Path(__file__).resolve():
                yield found


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the documents are in the checkout only")
def test_no_word_of_the_list() -> None:
    found = [line for name in files() for line in offenders(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert not found, "\n".join([f"{len(found)} words to avoid", *found])


@pytest.mark.parametrize(
    ("name", "source", "lines"),
    [
        (
            "a.py",
            '"""Where is it?"""\n# 4 bytes a token\nx = f"told {1} a" "new"\nsaid = "said"\n',
            [2, 3, 3, 1],
        ),
        ("a.py", 'def f():\n    """One fact.\n\n    It lies in a file.\n    """\n', [4]),
        ("apps/demo/a.py", 'x = "he said so"  # told\n', [1]),
        ("a.md", "The file lies in `x`.\n\nRead 2 MB per token.\n", [1]),
        ("a.cpp", '// mended\nint lies; /* one\n a row */ f("in vain");\n', [2, 1, 3]),
        ("a.toml", 'x = "told" # told\n', [1]),
    ],
)
def test_the_check_finds_words(name: str, source: str, lines: list[int]) -> None:
    assert sorted(int(line.split(":")[1]) for line in offenders(name, source)) == sorted(lines)
