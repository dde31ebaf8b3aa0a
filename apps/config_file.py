"""The config file: settings and presets in TOML, read and checked."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from tinychat_mlx.base.errors import SettingsError
from tinychat_mlx.base.wording import refusal


def config_path() -> Path:
    """Return TINYCHAT_CONFIG, or config.toml in the platform's config folder."""
    if named := os.environ.get("TINYCHAT_CONFIG"):
        return Path(named)
    from platformdirs import user_config_path

    return user_config_path("tinychat-mlx", appauthor=False) / "config.toml"


def settings(preset: str | None = None) -> dict[str, Any]:
    """Return the settings in the file, with the preset's values over them. Raises SettingsError."""
    path = config_path()
    if not path.is_file():
        if preset:
            raise SettingsError(
                f"there is no preset {preset!r}: the file does not exist",
                where=path,
                remedy="write the preset into it, or leave out --preset",
            )
        return {}
    table = _read(path)
    presets = table.pop("presets", {})
    preset = preset or table.pop("preset", None)
    table.pop("preset", None)
    if not isinstance(presets, dict) or not all(isinstance(p, dict) for p in presets.values()):
        raise SettingsError(
            "presets must be tables", where=path, remedy="write each preset as a table [presets.NAME]"
        )
    if preset and preset not in presets:
        raise SettingsError(
            f"there is no preset {preset!r}",
            where=path,
            remedy=f"use one of {', '.join(presets)}"
            if presets
            else "write it as a table [presets.NAME], or leave out --preset",
        )
    made = _checked(str(path), table)
    for name, values in presets.items():
        checked = _checked(f"{path}, presets.{name}", values)
        made |= checked if name == preset else {}
    return made


def _read(path: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        where, what, remedy = refusal(e)
        raise SettingsError(what, where=where, remedy=remedy) from None
    except ValueError as e:  # the message of a TOML error has line and column
        raise SettingsError(f"not TOML: {e}", where=path) from None
    return found


def _checked(where: str, table: dict[str, Any]) -> dict[str, Any]:
    from tinychat_mlx.apps.setting_table import known

    kinds = known()
    for name, value in table.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, [*kinds, "preset", "presets"], 1)
            remedy = f"use {near[0]!r}" if near else f"use one of {', '.join(kinds)}"
            raise SettingsError(f"unknown setting {name!r}", where=where, remedy=remedy)
        try:
            kinds[name](value)
        except (click.BadParameter, ValueError, TypeError) as e:
            reason = e.message.rstrip(".") if isinstance(e, click.BadParameter) else e
            raise SettingsError(f"{name}: {reason}", where=where) from None
    return table
