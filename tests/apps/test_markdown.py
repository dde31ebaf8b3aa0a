"""Streaming Markdown: the screen does not depend on how an answer is split, and no letter is lost."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinychat_mlx.apps.chat import stream
from tinychat_mlx.apps.terminal import Terminal

pyte = pytest.importorskip("pyte")
from rich.console import Console


class Paper(io.StringIO):
    """A terminal display of what is written to it, including scrollback."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.001)
        self.screen.set_mode(pyte.modes.LNM)  # a line feed also returns, as with a terminal driver
        self.feed = pyte.Stream(self.screen).feed

    def write(self, text: str) -> int:
        self.feed(text)
        return len(text)

    @property
    def lines(self) -> list[str]:
        shown = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
        return ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in shown]


def show(pieces: list[str], columns: int = 40, rows: int = 24) -> list[str]:
    """Return the screen after an answer arrived in these pieces, each of them drawn."""
    paper = Paper(columns, rows)
    console = Console(file=paper, force_terminal=True, width=columns, height=rows, legacy_windows=False)
    answer = stream.MarkdownAnswer(console, Terminal(True, True, True, True))
    for piece in pieces:
        answer.drawn = 0.0
        answer.feed(piece)
    answer.finish()
    return "\n".join(paper.lines).rstrip().split("\n")


def cut(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(0, len(text), n)]


WORDS = st.sampled_from(
    [
        "a",
        "word",
        "longer-word",
        "**bold**",
        "**two words**",
        "*slanted*",
        "`code x`",
        "[link](http://u.v)",
        "日本語の文",
    ]
    + [
        "🎉",
        "2 * 3",
        "snake_case",
        "f(x)",
        "a[0]",
        "~~gone~~",
        "***both***",
        "I'm",
        "<tag>",
        "a_b_c",
        "**",
        "`",
        "100%",
    ]
)
PROSE = st.builds(
    lambda prefix, words: prefix + " ".join(words),
    st.sampled_from(["", "", "- ", "* ", "12. ", "  - ", "> ", "# ", "### ", "- [ ] "]),
    st.lists(WORDS, min_size=1, max_size=9),
)
CODE = st.sampled_from(
    ["```python\ndef f(x):\n    '''Doc.\n\n    More.'''\n\n    return x\n```", "~~~\nplain | text\n~~~"]
)
TABLE = st.sampled_from(["| a | b |\n|---|:-:|\n| 1 | **2** |", "| not | a table"])
DOCUMENT = st.lists(
    st.one_of(PROSE, PROSE, PROSE, st.just(""), CODE, TABLE, st.just("---")), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENT, st.integers(1, 9))
def test_however_an_answer_is_cut_the_screen_ends_up_the_same(lines: list[str], n: int) -> None:
    text = "\n".join(lines)
    assert show(cut(text, n), 60) == show([text], 60)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=60), st.integers(1, 9), st.sampled_from([20, 40, 80]))
def test_no_letter_of_a_paragraph_is_lost_or_said_twice(words: list[str], n: int, columns: int) -> None:
    """Markup may be shown or applied; everything else appears once, in order."""

    def letters(text: str) -> str:
        return re.sub(r"[\s*_`~]", "", text)

    text = " ".join(words)
    assume(set(text) - set("* "))  # a line of only stars is a rule
    flat = re.sub(r"\[link\]\((.*?)\)", r"link(\1)", text)
    shown = letters("".join(show(cut(text, n), columns)))
    assert shown in (letters(flat), letters(text)) or shown.replace("[link]", "link") == letters(flat)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_every_kind_of_line_is_shown_whole(columns: int, piece: int) -> None:
    answer = (
        "# Title\n\nSome **bold text which is long and longer until the row is over and beyond** and *more*.\n"
        "An unclosed **marker that never ends although the row does, and the next, and the one after that as "
        "well, until everyone has given up on it, because it is longer than four rows of forty letters, is it not\n"
        "- item `one`\n  - item two, 日本語の文章はスペースなしで続きますから、どこで折り返しても構いません。\n"
        "```python\nx = [i for i in range(10)]\n\n# done\n```\n1. first\n2. second 🎉🎉\n> quoted"
    )
    text = "\n".join(show(cut(answer, piece), columns))
    for gone in ("# Title", "**bold", "beyond**", "*more*", "`one`", "```", "- item"):
        assert gone not in text
    kept = re.sub(r"# (?=Title)|\*\*(?=bold)|(?<=beyond)\*\*|\*(?=more)|(?<=more)\*|`", "", answer)
    kept = kept.replace("- ", "•").replace("> ", "│")
    assert "".join(text.split()).replace("─", "") == "".join(kept.split())


def rows_of(text: str, **kwargs: Any) -> list[str]:
    return show(cut(text, 3), **kwargs)


def test_a_table_is_aligned() -> None:
    rows = rows_of("| a | bb |\n|---|---:|\n| 1 | 22 |\n| long | **3** |\n| x \\| y |\n\nend")
    ends = [r.rfind(x) + len(x) for r, x in zip([rows[0], rows[2], rows[3]], ("bb", "22", "3"), strict=True)]
    assert len(set(ends)) == 1 and "x | y" in rows[4] and rows[-1] == "end", rows


def test_lines_of_verse_stay_lines_and_blank_lines_collapse() -> None:
    assert rows_of("\n\nRoses are red\nviolets\n\n\n\nare blue\n\n") == [
        "Roses are red",
        "violets",
        "",
        "are blue",
    ]


def test_what_looks_like_markdown_inside_code_is_code() -> None:
    rows = rows_of("```\n# not a title\n| no | table |\n- **no** item\n\n\n```\nafter")
    assert rows[1:6] == ["# not a title", "| no | table |", "- **no** item", "", ""] and rows[-1] == "after"


def test_formulas_keep_their_backslashes() -> None:
    assert rows_of("so \\(x^2\\) and \\[y\\]") == ["so \\(x^2\\) and \\[y\\]"]


def test_a_code_line_longer_than_the_row_is_shown_whole() -> None:
    rows = rows_of("```\n" + "x" * 100 + "\n```")
    assert "".join(rows).count("x") == 100


def test_an_unfinished_fence_is_closed() -> None:
    rows = rows_of("```python\nx = 1")
    assert rows[1] == "x = 1" and set(rows[2]) == {"─"}


def test_highlighting_never_changes_the_text() -> None:
    from tinychat_mlx.apps.chat.markdown import Highlighter

    source = Path(stream.__file__).read_text(encoding="utf-8").split("\n")
    for language in ("python", "html", "nonsense", "c", ""):
        made = Highlighter(language)
        assert [made.line(line).plain.rstrip() for line in source] == [line.rstrip() for line in source]
