"""Run `tinychat` in a separate process against the stand-in hub, for the tests of downloads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stand_in_hub import Hub

from tinychat_mlx.hub.http import PIECE

# Pauses before a retry are milliseconds here; {more} is code that a test adds.
PROGRAM = """
import signal, sys
from tinychat_mlx.hub import http
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
http.PAUSES = (0.01,) * 5
{more}
from tinychat_mlx.apps.cli import main
sys.exit(main(sys.argv[1:]))
"""
SLACK = 8 * PIECE  # bytes in flight when a download is stopped


class Client:
    """A user of the stand-in hub with an empty home."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.cache = home / "hf" / "hub"

    def environ(self, **more: str) -> dict[str, str]:
        own = {"XDG_DATA_HOME": str(self.home / "data"), "XDG_CONFIG_HOME": str(self.home / "config")}
        return os.environ | self.hub.environ(self.home / "hf") | own | {"COLUMNS": "200"} | more

    def start(self, *args: str, more: str = "", **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM.format(more=more), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=self.environ(**env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *args: str, more: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, more=more, **env)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def refused(self, *args: str, more: str = "", **env: str) -> str:
        """Run a command that must fail with exit code 1 and a one-line error. Returns that line."""
        done = self.run(*args, more=more, **env)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1, done
        assert len(lines) == 1 and lines[0] == done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr and "a defect" not in done.stderr and not done.stdout
        return lines[0]

    def files(self, repo: str = "org/model") -> dict[str, bytes]:
        """Return the files of the only snapshot in the cache."""
        (snapshot,) = (self.cache / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
        return {p.name: p.read_bytes() for p in snapshot.iterdir()}

    def partial(self) -> list[Path]:
        return list(self.cache.glob("models--*/blobs/*.incomplete"))
