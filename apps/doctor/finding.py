"""Findings of `tinychat doctor`, in sections: each has a key and value for programs and a line for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One line. text: for people ("": print the value; None: only in --json). state: "" is information only.

    do: how to fix it. shared: the text for a bug report, if `text` has private data.
    """

    key: str
    value: Any
    text: str | None = ""
    state: str = ""
    do: str = ""
    shared: str | None = None

    @property
    def line(self) -> str:
        return self.text or str(self.value)


@dataclass(frozen=True)
class Section:
    """Findings on one topic. key: its name in --json."""

    key: str
    title: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        return {f.key: f.value for f in self.findings}


def problems(sections: list[Section]) -> Iterator[dict[str, str]]:
    """Yield every finding that needs attention, broken ones first."""
    for state in (BROKEN, NOTE):
        for section in sections:
            for f in section.findings:
                if f.state == state:
                    yield {"where": f"{section.key}.{f.key}", "state": state, "what": f.line, "do": f.do}
