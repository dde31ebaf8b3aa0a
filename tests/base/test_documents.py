"""The documents: links resolve, README's tree is complete, README and CONTRIBUTING are short."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

if not (ROOT / "README.md").exists():
    pytest.skip("the documents are in the checkout only", allow_module_level=True)
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("tinychat_mlx", "backends", "awq", "apps")
MOST_LINES = {"README.md": 150, "CONTRIBUTING.md": 80}


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (p for p in PAGES if p.name != "README.md"):
        assert f"({page.relative_to(ROOT).as_posix()})" in readme, page.name


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_page_is_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[name]


def named() -> Iterator[Path]:
    """Yield the paths in README's tree. A name without a suffix is a Python file."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    folder = ROOT
    for indent, names in re.findall(r"^ {4}( *)(\S+(?: \S+)*)  ", tree, re.MULTILINE):
        for name in names.split(" "):
            path = (folder if indent else ROOT) / name
            yield path if path.suffix or name.endswith("/") or path.exists() else path.with_suffix(".py")
        if not indent:
            folder = ROOT / names


def test_the_tree_names_what_exists_and_nothing_of_the_packages_is_missing() -> None:
    paths = list(named())
    assert len(paths) > 20
    for path in paths:
        assert path.exists(), f"README's tree names {path.relative_to(ROOT)}, which does not exist"
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    have = {Path(*Path(name).parts[:2]) for name in listed.stdout.splitlines()}
    have = {path for path in have if not path.name.startswith("__") and path.name != "py.typed"}
    missing = have - {path.relative_to(ROOT) for path in paths}
    assert not missing, f"README's tree lacks {', '.join(sorted(map(str, missing)))}"
