"""Run all checks in order. The slow ones (starting other backends) run in parallel to the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tinychat_mlx.apps.doctor import software
from tinychat_mlx.apps.doctor.finding import BROKEN, Finding, Section
from tinychat_mlx.apps.terminal import detect


def examine(backend: str | None, measure: bool) -> tuple[list[Section], bool]:
    """Return all sections, and whether the chosen backend runs. If a library is missing, only that section."""
    libraries = software.software()
    if any(f.state == BROKEN and f.value is None for f in libraries.findings):
        return [libraries], False
    from tinychat_mlx.apps.doctor import disk, machine, settings
    from tinychat_mlx.apps.doctor.devices import Backends

    options = settings.defaults()
    with saying("checking the backends"):
        backends = Backends(backend or options["backend"], measure)
        before = [machine.machine(), machine.memory(), machine.threads(), software.native(), libraries]
        found = backends.section()
    answer = backends.answers.get(backends.chosen, {})
    sections = [*before, found]
    free = next(f.value for f in before[1].findings if f.key == "free_bytes")
    if measure:
        from tinychat_mlx.apps.doctor.speed import speed

        with saying("measuring memory and arithmetic"):
            name = backends.chosen if backends.works else ""
            sections.append(speed(name, answer.get("bandwidth"), free))
    sections += [disk.disk(), settings.configuration()]
    sections.append(settings.default_model(options, backends.chosen if backends.works else ""))
    ok = backends.works and not any(f.state == BROKEN for f in _needed(sections))
    return sections, ok


def _needed(sections: list[Section]) -> Iterator[Finding]:
    """Yield the findings that every backend depends on: libraries and a readable configuration."""
    for section in sections:
        if section.key in ("software", "configuration"):
            yield from section.findings


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Show a temporary status line on stderr if it is a terminal."""
    live = sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    if live:
        sys.stderr.write(f"\r{what} {detect().glyphs.ellipsis}\x1b[K")
        sys.stderr.flush()
    try:
        yield
    finally:
        if live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
