"""`tinychat models show`: the properties of a model, without loading it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tinychat_mlx import hub, inspect, memory_plan
from tinychat_mlx.apps.models.download import note
from tinychat_mlx.apps.models.int4_plan import as_int4
from tinychat_mlx.apps.models.prepare import existing_conversion, int4_settings
from tinychat_mlx.apps.models.table import hanging, print_table
from tinychat_mlx.apps.terminal import safe
from tinychat_mlx.base.wording import size
from tinychat_mlx.open import at_hand, find_folder
from tinychat_mlx.parts import Part


def find(name: str) -> inspect.ModelInfo:
    """Return the facts of an installed model, or of one on the hub, by a name for `chat -m`. Raises TinychatError."""
    ref = hub.parse(name)
    if folder := at_hand(name) or existing_conversion(name):
        return inspect.local(name, folder)
    return inspect.remote(hub.look(ref, note), note) if ref else inspect.local(name, find_folder(name))


def as_table(
    found: inspect.ModelInfo,
    rooms: list[memory_plan.Room],
    int4: inspect.ModelInfo | None,
    small: list[memory_plan.Room],
) -> dict[str, Any]:
    """Return the object that --json prints."""
    return {
        "name": found.name,
        "folder": str(found.folder) if found.folder else None,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "quantization": found.quantization,
        "parts": [_row(p) for p in found.parts],
        "bytes": found.nbytes,
        "context": found.context,
        "kv_bytes_per_token": found.kv_bytes(),
        "chat_template": found.template,
        "licence": found.licence or None,
        "sampling": {k: {"value": v, "origin": o} for k, (v, o) in found.sampling().items()},
        "runs": not found.trouble,
        "why": str(found.trouble or ""),
        "fits": [asdict(r) for r in rooms],
        "as_int4": {"bytes": int4.nbytes, "fits": [asdict(r) for r in small]} if int4 else None,
    }


def _row(part: Part) -> dict[str, Any]:
    return {"name": part.name, "form": part.form, "tensors": part.tensors, "parameters": part.parameters,
            "nbytes": part.nbytes}  # fmt: skip


def show(name: str, as_json: bool, modules: bool = False) -> None:
    """Print a model's properties. modules: also those of each module."""
    found = find(name)
    settings = None if found.trouble else int4_settings(found)
    int4 = as_int4(found, settings) if settings else None
    both = [] if found.trouble else list(memory_plan.rooms(found, int4) if int4 else memory_plan.rooms(found))
    rooms, small = [r[0] for r in both], [r[-1] for r in both if len(r) > 1]
    if as_json:
        each = {"modules": [m._asdict() for m in found.modules]} if modules else {}
        return click.echo(json.dumps(as_table(found, rooms, int4, small) | each))
    about = _about(found, int4)
    if (kept := existing_conversion(name)) is not None:
        about["int4"] = f"`tinychat chat` uses {kept} for this name"
    _print_pairs({k: safe(v) for k, v in about.items()})
    click.echo()
    print_table(
        ["part", "form", "tensors", "parameters", "bytes"],
        [[safe(p.name), p.form, f"{p.tensors:,}", f"{p.parameters:,}", size(p.nbytes)] for p in found.parts],
        right={2, 3, 4},
    )
    if modules:
        click.echo()
        print_table(
            ["module", "form", "parameters", "bytes"],
            [[safe(m.name), m.form, f"{m.parameters:,}", size(m.nbytes)] for m in found.modules],
            right={2, 3},
        )
    if both:
        click.echo()
        rows = [_room_row(r, found, " as int4" if i else "") for each in both for i, r in enumerate(each)]
        print_table(["backend", "memory", "free", "fits"], rows, right={1, 2})


def _about(found: inspect.ModelInfo, int4: inspect.ModelInfo | None) -> dict[str, str]:
    where = found.folder if found.folder else "on the hub, not downloaded"
    billions = found.parameters >= 1e8
    count = f"{found.parameters / 1e9:.3g} billion" if billions else f"{found.parameters / 1e6:.3g} million"
    about = {
        "model": f"{found.name} ({where})",
        "architecture": f"{found.architecture}, {count} parameters",
        "weights": f"{size(found.nbytes)} {'on disk' if found.folder else 'to download'}",
    }
    if int4 is not None:
        way = (
            f"`tinychat chat -m {found.name}` offers to convert it"
            if hub.parse(found.name)
            else f"`{_convert_command(Path(found.name).expanduser())}`"
        )
        about["as int4"] = f"{size(int4.nbytes)}: {way}"
    if found.trouble:
        about["runs here"] = f"no: {found.trouble}"
    else:
        kv = size(found.kv_bytes())
        about["context"] = f"{found.context:,} tokens, {kv} of keys and values per token (fp16)"
    return about | {
        "chat template": "yes" if found.template else "no: it continues text",
        "licence": found.licence or "not stated",
        "sampling": _sampling(found),
    }


def _convert_command(folder: Path) -> str:
    """Return the command that converts a folder to int4, next to it."""
    if folder.name in ("", ".."):  # for "." and similar, use the real folder's name
        folder = folder.resolve()
    return shlex.join(["tinychat", "convert", str(folder), "-o", f"{folder}-int4"])


def _sampling(found: inspect.ModelInfo) -> str:
    """Format the defaults by origin: "temperature 0.7, top_p 0.8 (generation_config.json); min_p 0 (built in)"."""
    groups: dict[str, list[str]] = {}
    for name, (value, origin) in found.sampling().items():
        groups.setdefault(origin, []).append(f"{name} {value:g}")
    return "; ".join(f"{', '.join(each)} ({origin})" for origin, each in groups.items())


def _print_pairs(pairs: dict[str, str]) -> None:
    """Print a name and its value per line; long values are wrapped with an indent."""
    width = max(map(len, pairs)) + 2
    for name, value in pairs.items():
        click.echo(hanging(f"{name:<{width}}{value}", width))


def _room_row(room: memory_plan.Room, found: inspect.ModelInfo, form: str) -> list[str]:
    name = f"{room.backend}{form}"
    if room.trouble:
        return [name, "", "", safe(room.trouble)]
    if not room.context:
        what = "no: too little memory"
    elif room.context == found.context:
        what = f"yes, at its full context of {room.context:,} tokens"
    else:
        what = f"yes, up to {room.context:,} tokens (--context)"
    return [name, size(room.weights), size(room.free), what]
