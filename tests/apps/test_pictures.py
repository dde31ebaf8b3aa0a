"""The pictures in the documents show what the chat prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checkout import ROOT

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)
if not (ROOT / "README.md").exists():
    pytest.skip("the pictures are in the checkout only", allow_module_level=True)
pytest.importorskip("pyte")
from pictures import FOLDER, PICTURES, Picture, svg, taken, words


def told(picture: str) -> str:
    """Return a picture's text without blanks, which differ at row ends, and without machine and speed."""
    text = re.sub(r"\s", "", "".join(words(picture)))
    text = re.sub(r"cpu:.*?context", "cpu:context", text, count=1)
    return re.sub(r"[\d.,]+(?=tok/s|s·|MB)", "#", text)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_a_picture_shows_what_the_chat_prints(picture: Picture, tmp_path: Path) -> None:
    """If not: `python tests/fixtures/pictures.py`, and look at what has changed."""
    shown = (FOLDER / f"{picture.name}.svg").read_text(encoding="utf-8")
    made = svg(picture, taken(picture, tmp_path, "--backend", "cpu"))
    assert told(made) == told(shown)
    assert len(told(made)) > 150 and all(re.sub(r"\s", "", text) in told(made) for text in picture.says)


def test_every_picture_is_in_a_document_and_loads_nothing_from_elsewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert {p.stem for p in FOLDER.glob("*.svg")} == {p.name for p in PICTURES}
    for path in FOLDER.glob("*.svg"):
        assert f"apps/chat/pictures/{path.name})" in shown
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert (
            ElementTree.fromstring(text).tag
            and "http" not in text
            and "url(" not in text.replace("url(#", "")
        )
