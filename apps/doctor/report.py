"""Bug report in Markdown without private data: no names of people, machines, folders, models or prompts.

Each finding has a text that may be shared (`Finding.shared`). The result is scrubbed again, because an error message may
contain any path: a path keeps only its last part, or, below the folders of caches and settings, everything but the
home. Names of the user and of the machine are replaced wherever they occur as a word.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from tinychat_mlx.apps.doctor.finding import Finding, Section
from tinychat_mlx.apps.doctor.view import ASCII, summary
from tinychat_mlx.apps.options import check_writable
from tinychat_mlx.base.errors import UsageError

PUBLIC = ("/proc/", "/sys/", "/dev/", "/usr/", "/etc/", "/opt/cuda")
OURS = (".cache/", ".local/share/tinychat", ".config/tinychat", "Library/", "AppData/")
PATH = re.compile(r"(?<![\w…])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"`:;,()]+[/\\])*[^\s'\"`:;,()]*")


def markdown(sections: list[Section], ok: bool) -> str:
    """Return the report as text."""
    lines = ["### tinychat doctor", "", summary(sections, ok)]
    for section in sections:
        lines += ["", f"**{section.title}**", ""]
        for finding in section.findings:
            if finding.text is not None:
                lines += list(_lines(finding))
    return "\n".join(lines) + "\n"


def _lines(finding: Finding) -> Iterable[str]:
    yield f"- [{ASCII[finding.state]}] {scrub(finding.line if finding.shared is None else finding.shared)}"
    if finding.do and finding.shared is None:
        yield f"  - {scrub(finding.do)}"


def scrub(text: str, home: Path | None = None, names: Iterable[str] | None = None) -> str:
    """Remove the home, other folders, and the names of the user and of the machine from a text."""
    home = home or Path.home()
    text = " ".join(text.split())
    for spelling in dict.fromkeys((str(home.resolve()), str(home))):
        if len(spelling) > 1:
            text = re.sub(re.escape(spelling) + r"(?![\w.-])", "~", text)
    text = PATH.sub(lambda match: _path(match[0]), text)
    for name in people() if names is None else names:
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", "…", text, flags=re.IGNORECASE)
    return text


def _path(path: str) -> str:
    """Shorten a path to the part that may be shared."""
    plain = path.replace("\\", "/")
    if (
        plain.startswith(PUBLIC)
        or plain.startswith(tuple(f"~/{folder}" for folder in OURS))
        or len(plain) < 3
    ):
        return path
    last = plain.rstrip("/").rpartition("/")[2]
    return f"…/{last}" if plain.count("/") > 1 or plain.startswith(("/", "~")) else path


def people() -> list[str]:
    """Return the names of the user and of the machine, longest first, without generic ones."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        user = ""
    host = socket.gethostname()
    found = {user, Path.home().name, host, host.partition(".")[0]} - {"", "root", "localhost", "user"}
    return sorted(found, key=len, reverse=True)


def check(target: str) -> None:
    """Raise UsageError, before any measurement, if a report cannot be written there."""
    path = Path(target).expanduser()
    if os.path.lexists(path):
        raise UsageError("it exists already", where=f"--report {target}", remedy="give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder {path.parent}",
            where=f"--report {target}",
            remedy="give a file in an existing folder",
        )
    check_writable(path, "--report")


def write(target: str, text: str) -> None:
    """Write to a new file, or to stdout."""
    if target == "-":
        click.echo(text, nl=False)
        return
    with Path(target).expanduser().open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {target}: read it before you share it", file=sys.stderr)
