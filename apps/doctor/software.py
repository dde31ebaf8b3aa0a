"""Installed libraries, their versions, and conflicts with other distributions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import tinychat_mlx
from tinychat_mlx.apps.doctor.finding import BROKEN, NOTE, OK, Finding, Section
from tinychat_mlx.base.errors import TinychatError, pip_install

US = "tinychat-mlx"
OPTIONAL = {"mlx": "mlx", "torch": "cuda", "pyarrow": "parquet"}  # library -> the extra that installs it
SHARED_NAMES = ("awq", "backends", "apps")  # must not be at the top of site-packages


def software() -> Section:
    """Return the section on the version and kind of installation, libraries and conflicts."""
    dists = list(metadata.distributions())
    clashes = [*_conflicts(dists)]
    about = [f.value for f in clashes if f.state]
    none = None if about else "no conflicts with other packages"
    here = [*libraries()]
    fine = ", ".join(str(f.text) for f in here if f.state == OK)
    versions = {f.key: f.value for f in here}
    found = [_ourselves(), Finding("libraries", versions, f"new enough: {fine}", OK)]
    found += [
        *(f for f in here if f.state != OK),
        Finding("conflicts", about, none, "" if about else OK),
        *clashes,
    ]
    return Section("software", "Software", tuple(found))


def _ourselves() -> Finding:
    here = Path(tinychat_mlx.__file__).resolve().parent
    kind = "checkout" if (here.parent / "pyproject.toml").exists() else "installed"
    commit = _commit(here.parent) if kind == "checkout" else None
    about = {"version": tinychat_mlx.__version__, "kind": kind, "commit": commit}
    words = f"{US} {tinychat_mlx.__version__} ({kind}{f' of {commit}' if commit else ''})"
    return Finding("tinychat", about, f"{words} in {here}", OK, shared=words)


def _commit(root: Path) -> str | None:
    """Return "73d0ceab6a94", with "-dirty" if files changed; None if git fails."""
    if not (root / ".git").exists():  # a parent folder may be another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# libraries ---------------------------------------------------------------------------------------------
def requirements() -> list[str]:
    """Return the requirements: from pyproject.toml in a checkout, else from the installed metadata."""
    project = Path(tinychat_mlx.__file__).resolve().parent.parent / "pyproject.toml"
    if project.exists():
        text = project.read_text(encoding="utf-8")
        block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        return re.findall(r'^\s*"(.+?)",?$', block[1], re.MULTILINE) if block else []
    try:
        return [r for r in metadata.requires(US) or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        return []


def libraries() -> Iterable[Finding]:
    """Yield a finding per required library: whether it is installed and new enough."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("packaging", None, "packaging (a dependency of huggingface-hub) is not installed", BROKEN,
                      "pip install -U huggingface-hub")  # fmt: skip
        return

    wanted = [Requirement(text) for text in requirements()]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in here:
        yield _library(requirement.name, str(requirement.specifier), requirement.specifier.contains)
    mlx = next((r for r in wanted if r.name == "mlx"), None)
    for name, extra in OPTIONAL.items():
        version = version_of(name)
        if name in [r.name for r in here]:
            continue
        if version is None:
            yield Finding(name, None, f"{name}: not installed (optional: {pip_install(extra)})"
                          if name != "mlx" else "mlx: not installed (for Macs)")  # fmt: skip
        elif name == "mlx" and mlx:
            yield _library(name, str(mlx.specifier), mlx.specifier.contains)
        else:
            yield Finding(name, version, f"{name} {version}", OK)


def _library(name: str, asked: str, is_enough: object) -> Finding:
    version = version_of(name)
    do = f"pip install -U '{name}{asked}'"
    if version is None:
        return Finding(name, None, f"{name} is not installed, {asked or 'any version'} is needed", BROKEN, do)
    assert callable(is_enough)
    if not is_enough(version, prereleases=True):
        state = NOTE if name == "mlx" and sys.platform != "darwin" else BROKEN
        return Finding(name, version, f"{name} {version}, but {asked} is needed", state, do)
    return Finding(name, version, f"{name} {version}", OK)


def version_of(name: str) -> str | None:
    """Return the version that an import would find, without importing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# conflicts ---------------------------------------------------------------------------------------------
def _conflicts(dists: list[metadata.Distribution]) -> Iterable[Finding]:
    named: dict[str, list[metadata.Distribution]] = {}
    for dist in dists:
        named.setdefault(_normal(dist.metadata["Name"] or ""), []).append(dist)
    for name in (US, "torch", "mlx", "numpy"):
        yield from _twice(name, named.get(name, []))
    for dist in dists:
        yield from _claims(dist)


def _twice(name: str, dists: list[metadata.Distribution]) -> Iterable[Finding]:
    """Report two versions, in two folders or in one (where a second installation left the first one's record)."""
    found = dict.fromkeys((d.version, str(d.locate_file("").resolve())) for d in dists)  # type: ignore[attr-defined]
    if len(found) > 1:
        times = f"{name} is installed {len(found)} times"
        which = ", ".join(f"{version} in {place}" for version, place in found)
        do = f"pip uninstall {name} until none is left, then install one"
        shared = f"{times}: {', '.join(version for version, _ in found)}"
        yield Finding(f"twice_{name}", name, f"{times}: {which}", NOTE, do, shared)


def _claims(dist: metadata.Distribution) -> Iterable[Finding]:
    """Report files of this distribution inside tinychat_mlx, or with its generic names in site-packages."""
    name = _normal(dist.metadata["Name"] or "")
    record = dist.read_text("RECORD") or ""
    tops = {line.partition("/")[0] for line in record.splitlines() if "/" in line}
    if name != US and "tinychat_mlx" in tops:
        do = f"pip uninstall {name}, then {pip_install('', '--force-reinstall')}"
        yield Finding(f"claim_{name}", name, f"{name} also owns files of tinychat_mlx", BROKEN, do)
    bare = [top for top in SHARED_NAMES if top in tops]
    if bare and name == US:
        do = pip_install("", "--force-reinstall")
        yield Finding("bare_names", name, f"an old {US} left {', '.join(bare)} in site-packages", NOTE, do)
    elif (
        "awq" in bare
    ):  # transformers takes a module of that name for AutoAWQ; tinychat's is tinychat_mlx.awq
        yield Finding(
            "awq_owner", name, f"`import awq` belongs to {name}; tinychat uses tinychat_mlx.awq: no conflict"
        )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# native library ----------------------------------------------------------------------------------------
def native() -> Section:
    """Return the section on the native kernels: presence, version, and the instruction sets of this processor."""
    from tinychat_mlx.backends.cpu import native_abi

    try:
        path = native_abi.find_library()
        sets = native_abi.instruction_sets()
    except TinychatError as e:
        return Section("native", "Native library", (Finding("library", None, e.problem, BROKEN, e.remedy),))
    asked = os.environ.get("TINYCHAT_CPU_ISA", "")
    used = asked or sets[0]
    bad = used not in sets
    return Section("native", "Native library", (
        Finding("library", str(path), f"{path}, matching version", OK, shared=f"{path.name}, matching version"),
        Finding("instruction_sets", sets, f"for this processor: {', '.join(sets)}"),
        Finding("used", used, f"{used} is not for this processor" if bad else
                f"{used} is used{': set by TINYCHAT_CPU_ISA' if asked else ', the best here'}",
                BROKEN if bad else OK, "unset TINYCHAT_CPU_ISA" if bad else ""),
    ))  # fmt: skip
