"""The progress of a conversion on stderr: a bar, the time left, a line per layer."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tinychat_mlx.base.wording import lasting

if TYPE_CHECKING:
    from tinychat_mlx.awq.layer_stream import Progress


class Screen:
    """Progress on stderr: a bar with the time left and a line per layer; without a terminal, only lines."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True, quiet=quiet)
        # A terminal prints ^C after the bar. If that wraps, the extra row would stay on the screen.
        self.console.width -= len("^C")
        columns = ("[progress.description]{task.description}", "{task.completed}/{task.total}")
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}
        self.rates: dict[str, Rate] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar while the block runs. An exception removes it."""
        with self.bar:
            try:
                yield
            except BaseException:
                self.bar.live.transient = True
                raise

    def show(self, p: Progress) -> None:
        if p.phase not in self.tasks:
            self.tasks[p.phase] = self.bar.add_task(p.phase, total=p.total, left="")
        if p.phase not in self.rates or p.note == "kept":
            self.rates[p.phase] = Rate()
        self.rates[p.phase].add(p.done)
        left = self._left(p)
        self.bar.update(self.tasks[p.phase], completed=p.done, total=p.total, left=left)
        line_left = f", {left}" if left and not self.console.is_terminal else ""
        if p.layer and p.layer.rounded:
            fallen = [site.key for site in p.layer.sites if site.fell_back]
            plain = f"  plain rounding kept: {', '.join(fallen)}" if fallen else ""
            off = f"off by {p.layer.off:.1%}, plain rounding {p.layer.rounded:.1%}{plain}"
            self._print(f"layer {p.done}/{p.total}  {off}  {_memory()}{line_left}")
        elif p.note and (p.done in (0, p.total) or p.phase == "finish"):
            self._print(f"{p.phase}: {p.note}")
        elif (
            not self.console.is_terminal
            and p.done
            and p.phase != "finish"
            and p.done * 4 // p.total > (p.done - 1) * 4 // p.total
        ):
            self._print(f"{p.phase} {p.done / p.total:.0%}{line_left}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _left(self, p: Progress) -> str:
        """Return the time left in a phase, as "40 s left", or "" if it is unknown or 0."""
        seconds = self.rates[p.phase].seconds(p.total - p.done)
        return f"{lasting(seconds)} left" if seconds else ""


class Rate:
    """Estimates the time left in a phase from the later half of its steps so far.

    The first steps are slower (cold memory and caches), and steps get slower as the model's cache grows. The later half
    excludes the first effect and includes the second.
    """

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []  # number of steps done, and the time

    def add(self, done: int) -> None:
        self.times.append((done, time.perf_counter()))

    def seconds(self, steps: int) -> float:
        """Return the time of this many further steps; 0.0 before the first is done."""
        (first, _), (done, now) = self.times[0], self.times[-1]
        middle = bisect.bisect_right(self.times, ((first + done) / 2, math.inf)) - 1
        begun, start = self.times[middle]
        return (now - start) / (done - begun) * steps if done > begun else 0.0


def _memory() -> str:
    import psutil

    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
