"""What does doctor say? Findings in sections: each a key and a value for programs, a line for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One line. text: for people ("": the value; None: for programs alone). state: "" is mere information.

    do: what to do about it. shared: the text for a bug report, where `text` holds what is private.
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
    """Findings that answer one question. key: under which `--json` has them."""

    key: str
    title: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        return {f.key: f.value for f in self.findings}


def problems(sections: list[Section]) -> Iterator[dict[str, str]]:
    """Every finding that asks for something, the broken ones first."""
    for state in (BROKEN, NOTE):
        for section in sections:
            for f in section.findings:
                if f.state == state:
                    yield {"where": f"{section.key}.{f.key}", "state": state, "what": f.line, "do": f.do}
