"""Download with user interface: the size first, a progress bar, and a note on resuming after Ctrl-C."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tinychat_mlx import hub
from tinychat_mlx.base.wording import lasting, size


def note(text: str) -> None:
    """Print a line to stderr, wrapped on a terminal. stdout is for results."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False))
    click.echo(text, err=True)


def folder_of(name: str) -> Path:
    """Return the folder of a model by its name, downloaded with a progress bar if needed."""
    from tinychat_mlx.open import at_hand, find_folder

    ref = hub.parse(name)
    if ref is None or at_hand(name) is not None:
        return find_folder(name)
    return download(hub.look(ref, note))


def download(remote: hub.Remote, verify: bool = False, quiet: bool = False) -> Path:
    """Download the missing files with a progress bar on stderr -> the snapshot. Raises TinychatError."""
    start, before = time.monotonic(), remote.missing
    try:
        with bar(str(remote.ref), quiet) as (watch, say):
            folder = hub.fetch(remote, watch, say, verify)
    except KeyboardInterrupt:
        kept = remote.nbytes - remote.missing
        note(
            f"stopped: {size(kept)} of {size(remote.nbytes)} is kept; `tinychat models pull {remote.ref}` resumes "
            "the download"
        )
        raise
    seconds = time.monotonic() - start
    if before and not quiet:
        note(f"{remote.ref}: {size(before)} in {lasting(seconds)}, all checksums correct")
    return folder


@contextmanager
def bar(label: str, quiet: bool = False) -> Iterator[tuple[hub.Watch, hub.Say]]:
    """Show a progress bar with rate and time left -> (function to update it, function to print a line above it)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    console = Console(stderr=True, quiet=quiet)
    # A terminal prints ^C after the bar. If that wraps, the extra row would stay on the screen.
    console.width -= len("^C")
    name = TextColumn("{task.description}", table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis"))
    columns = [name, BarColumn(None, table_column=Column(ratio=3, min_width=6))]
    columns += [DownloadColumn(table_column=Column(no_wrap=True))] if console.width >= 48 else []
    columns += [TransferSpeedColumn(table_column=Column(no_wrap=True))] if console.width >= 78 else []
    columns += [TextColumn("left"), TimeRemainingColumn(compact=True, elapsed_when_finished=False)]
    progress = Progress(
        *columns, console=console, expand=True, transient=True, disable=quiet or not console.is_terminal
    )
    task = progress.add_task(label, total=None)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with progress:
        yield lambda done, total: progress.update(task, completed=done, total=total), say
