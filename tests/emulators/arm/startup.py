"""Estimate the chat's start-up time on a Raspberry Pi from its instruction count.

    python tests/emulators/arm/startup.py          about a minute; needs what lane.py needs, and pexpect, pyte

The whole program is counted, from the first instruction of the loader through Python, its imports, the model
and the first prompt to the last of the exit (Ctrl-D at the prompt), in a pseudo-terminal, with one thread and
files in the page cache. time = instructions / (instructions per cycle x clock).

Instructions per cycle are an assumption. Starting Python is cold, branchy code that runs once, far below what
these cores reach in a loop (3 and 4 instructions wide). The assumption is 0.7 for the Cortex-A72 and 1.0 for
the wider A76 with its larger caches. The value that this machine reaches for the same start is printed too,
as an upper bound for a smaller core. At the first start after boot, reading from a slow card takes additional
time.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path += [str(TESTS / "emulators"), str(TESTS / "fixtures")]
from arm import lane as arm
from chat_screen import CTRL_D, Screen


@dataclass(frozen=True)
class Board:
    name: str
    cpu: str  # qemu's name
    hertz: float
    per_cycle: float  # instructions, assumed

    def seconds(self, instructions: int) -> float:
        return instructions / (self.per_cycle * self.hertz)


BOARDS = (
    Board("Raspberry Pi 5", "cortex-a76", 2.4e9, 1.0),
    Board("Raspberry Pi 4", "cortex-a72", 1.8e9, 0.7),
)
STARTS = {
    "tinychat --version": ("--version",),
    "tinychat, to the prompt": ("chat", "--no-save", "--backend", "cpu", "--threads", "1"),
}


def start(argv: list[str], environment: dict[str, str], prompts: bool) -> float:
    """Run the program and leave at its first prompt, if it has one.

    Returns the seconds until then, or to its end.
    """
    began = time.monotonic()
    screen = Screen(argv, 24, 80, environment | {"TERM": "xterm-256color"})
    if prompts:
        screen.prompt(120)
        seconds = time.monotonic() - began
        screen.type(CTRL_D)
    while screen.pump(60):
        pass
    screen.child.close()
    if screen.child.exitstatus:
        raise RuntimeError(f"{' '.join(argv)} ended with {screen.child.exitstatus}:\n{screen.text.strip()}")
    return seconds if prompts else time.monotonic() - began


def count(emulator: list[str], rest: list[str], environment: dict[str, str]) -> int:
    """Return the instructions of one whole run."""
    log, plugin = arm.WORK / "count.log", arm.WORK / "icount.so"
    arm.run("gcc", "-O2", "-shared", "-fPIC", arm.ROOT / "tests/emulators/arm/icount.c", "-o", plugin)
    counting = ["-plugin", str(plugin), "-d", "plugin", "-D", str(log)]
    start([*emulator, *counting, *rest], environment, "chat" in rest)
    found = re.search(r"total=(\d+)", log.read_text())
    if not found:
        raise RuntimeError(f"qemu left no count in {log}")
    return int(found[1])


def on_board(lane: arm.Lane, board: Board, arguments: tuple[str, ...]) -> int:
    emulator, *rest = lane.command(board.cpu, "-m", "tinychat_mlx", *arguments)
    return count([emulator], rest, lane.environment())


def main() -> int:
    if why := arm.missing():
        print(why, file=sys.stderr)
        return 1
    lane = arm.make()
    for what, arguments in STARTS.items():
        for board in BOARDS:
            n = on_board(lane, board, arguments)
            print(
                f"{what}: {board.name} {board.seconds(n):.2f} s, computed: {n / 1e6:.0f} million instructions at "
                f"{board.per_cycle} per cycle, {board.hertz / 1e9} GHz"
            )
        if platform.machine() == "x86_64":
            show_here(what, arguments)
    return 0


def show_here(what: str, arguments: tuple[str, ...]) -> None:
    """Count instructions and measure the time on this machine too."""
    python = str(Path(sys.executable).resolve())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    rest = [
        "-c",
        "import sys; from tinychat_mlx.apps.cli import main; sys.exit(main(sys.argv[1:]))",
        *arguments,
    ]
    prompts = "chat" in arguments
    seconds = sorted(start([python, *rest], environment, prompts) for _ in range(5))[2]
    n = count(["qemu-x86_64"], [python, *rest], environment)
    print(
        f"{what}: here {seconds:.2f} s, measured; {n / 1e6:.0f} million instructions, {n / seconds / 1e9:.1f} per ns"
    )


if __name__ == "__main__":
    sys.exit(main())
