"""Settings in effect and their sources, and whether the default model fits."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat_mlx import hub
from tinychat_mlx.apps import environment
from tinychat_mlx.apps.doctor.finding import BROKEN, NOTE, OK, Finding, Section
from tinychat_mlx.base.errors import ConfigError, TinychatError
from tinychat_mlx.base.wording import size

if TYPE_CHECKING:
    from tinychat_mlx import inspect


def configuration() -> Section:
    """Return the section on the config file and the environment variables."""
    found = [_config_file(), *_variables()]
    return Section("configuration", "Configuration", tuple(found))


def _config_file() -> Finding:
    from tinychat_mlx.apps.config_file import config_path, settings

    path = config_path()
    origin = "TINYCHAT_CONFIG" if os.environ.get("TINYCHAT_CONFIG") else "the platform's config folder"
    value = {"path": str(path), "origin": origin, "exists": path.is_file(), "settings": None}
    if not path.is_file():
        return Finding("file", value, f"no config file at {path} ({origin})", shared="no config file")
    try:
        names = sorted(settings(os.environ.get("TINYCHAT_PRESET")))
    except (ConfigError, OSError) as e:
        what, do = (e.problem, e.remedy) if isinstance(e, ConfigError) else (str(e), "fix the file")
        return Finding("file", value, what, BROKEN, do, shared="the config file is not valid")
    sets = f"sets {', '.join(names)}" if names else "sets nothing"
    value["settings"] = names
    return Finding("file", value, f"{path} ({origin}) {sets}", OK, shared=f"config file ({origin}) {sets}")


def _variables() -> list[Finding]:
    """Report environment variables, with values only of those that have no private data."""
    shown = environment.shown()
    known = {*shown, *environment.ours(), *environment.ELSEWHERE}
    here = sorted(v for v in os.environ if v in known or v.startswith("TINYCHAT_"))
    found = {v: os.environ[v] if v in shown else None for v in here}
    words = {v: v if value is None else f"{v}={value}" for v, value in found.items()}
    strange = [v for v in here if v not in known]
    everything, public = (", ".join(w for v, w in words.items() if v not in out) for out in ((), strange))
    rows = [Finding("environment", found, f"environment: {everything or 'no variable of tinychat'}",
                    shared=f"environment: {public or 'no variable of tinychat'}")]  # fmt: skip
    if strange:
        near = difflib.get_close_matches(strange[0], known, 1)
        do = f"unset it, or use {near[0]}" if near else "unset it"
        text = f"{', '.join(strange)}: unknown setting, ignored"
        rows.append(Finding("unknown_variables", strange, text, NOTE, do, shared="an unknown variable"))
    return rows


def defaults() -> dict[str, str]:
    """Return the default model and backend of `tinychat`, and `origin`: the source of the model."""
    from tinychat_mlx.apps.config_file import settings
    from tinychat_mlx.apps.setting_table import DEFAULTS

    try:
        file = settings(os.environ.get("TINYCHAT_PRESET"))
    except (TinychatError, OSError):  # reported under configuration
        file = {}

    def look(name: str) -> tuple[str, str]:
        if value := os.environ.get(f"TINYCHAT_{name.upper()}"):
            return value, "environment"
        return str(file.get(name, DEFAULTS[name])), "config" if name in file else "built in"

    model, origin = look("model")
    return {"model": model, "origin": origin, "backend": look("backend")[0]}


def default_model(options: dict[str, str], backend: str) -> Section:
    """Return the section on the default model, and whether it fits. backend: "" if none runs."""
    return Section("model", "Default model", (_model(options["model"], options["origin"], backend),))


def _model(name: str, origin: str, backend: str) -> Finding:
    from tinychat_mlx.apps.models.prepare import existing_conversion
    from tinychat_mlx.inspect import local
    from tinychat_mlx.open import at_hand

    path = Path(name).expanduser()
    ref = None if name == "demo" or path.is_dir() else hub.parse(name)
    kind = "demo" if name == "demo" else "a folder" if ref is None else "a model of the hub"
    folder = existing_conversion(name) or at_hand(name) or (None if ref else path)
    value: dict[str, Any] = {"name": name, "origin": origin, "here": folder is not None}
    if folder is None:
        do = f"tinychat models pull {name}"
        return Finding(
            "model", value, f"{name} ({origin}) is not installed", NOTE, do, f"{kind}, not installed"
        )
    try:
        found = local(name, folder)
        if found.trouble:
            raise found.trouble
        fits = _context(found, backend)
    except (TinychatError, OSError) as e:
        what = e.problem if isinstance(e, TinychatError) else e
        do = "choose another with -m, TINYCHAT_MODEL or `model` in the config file"
        return Finding("model", value, f"{name} ({origin}): {what}", BROKEN, do, f"{kind}; it cannot be read")
    value |= {"bytes": found.nbytes, "fits_context": fits, "context": found.context}
    about = f"{size(found.nbytes)}, {found.quantization}"
    if not fits:
        why = f"does not fit the {backend} backend" if backend else "has no backend to run on"
        do = "tinychat models list --recommended" if backend else ""
        return Finding(
            "model", value, f"{name} ({about}; {origin}) {why}", NOTE, do, f"{kind} ({about}) {why}"
        )
    whole = " (its maximum)" if fits == found.context else ""
    why = f"fits, with a context of {fits:,} tokens{whole}"
    return Finding("model", value, f"{name} ({about}; {origin}) {why}", OK, "", f"{kind} ({about}) {why}")


def _context(found: inspect.ModelInfo, backend: str) -> int:
    """Return the tokens of context that fit."""
    from tinychat_mlx import memory_plan

    return memory_plan.room(found, memory_plan.chosen({"backend": backend})).context if backend else 0
