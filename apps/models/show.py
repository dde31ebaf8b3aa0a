"""`tinychat models show`: everything that can be said of a model before it is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tinychat_mlx import hub
from tinychat_mlx.apps import fit
from tinychat_mlx.apps.models import facts
from tinychat_mlx.apps.models.download import note
from tinychat_mlx.apps.models.opening import converted, home
from tinychat_mlx.apps.models.table import hanging, print_table
from tinychat_mlx.apps.terminal import safe, size
from tinychat_mlx.loading import find_folder


def find(name: str) -> facts.Facts:
    """Facts of a folder, the demo, a conversion, a model of the cache, or one on the hub. Raises a TinychatError."""
    kept = home() / name
    if Path(name).name == name and name.endswith("-int4") and (kept / "config.json").exists():
        return facts.local(name, kept)
    ref = None if name == "demo" or Path(name).expanduser().is_dir() else hub.parse(name)
    if ref is None:
        return facts.local(name, find_folder(name))
    if folder := hub.cached(ref) or converted(name):
        return facts.local(name, folder)
    return facts.remote(hub.look(ref, note), note)


def as_table(found: facts.Facts, rooms: list[fit.Room]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "name": found.name,
        "folder": str(found.folder) if found.folder else None,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "quantization": found.quantization,
        "parts": [asdict(p) for p in found.parts],
        "bytes": found.nbytes,
        "context": found.context,
        "kv_bytes_per_token": found.kv_bytes(),
        "chat_template": found.template,
        "licence": found.licence or None,
        "sampling": {k: {"value": v, "origin": o} for k, (v, o) in found.sampling().items()},
        "runs": not found.trouble,
        "why": found.trouble,
        "fits": [asdict(r) for r in rooms],
    }


def show(name: str, as_json: bool) -> None:
    found = find(name)
    rooms = [] if found.trouble else list(fit.rooms(found))
    if as_json:
        return click.echo(json.dumps(as_table(found, rooms)))
    where = found.folder if found.folder else "on the hub, not downloaded"
    about = {
        "model": f"{found.name} ({where})",
        "architecture": f"{found.architecture}, {found.parameters / 1e9:.3g} billion parameters"
        if found.parameters >= 1e8
        else f"{found.architecture}, {found.parameters / 1e6:.3g} million parameters",
        "weights": f"{size(found.nbytes)} on disk",
        "context": f"{found.context:,} tokens, {size(found.kv_bytes())} of keys and values each (fp16)",
        "chat template": "yes" if found.template else "no: it continues text",
        "licence": found.licence or "not stated",
        "sampling": _sampling(found),
    }
    if (int4 := converted(name)) is not None:
        about["int4"] = f"{int4} answers to this name in `tinychat chat`"
    if found.trouble:
        about["runs here"] = f"no: {found.trouble}"
        del about["context"]
    _print_pairs({k: safe(v) for k, v in about.items()})
    click.echo()
    print_table(
        ["part", "form", "tensors", "parameters", "bytes"],
        [[p.name, p.form, f"{p.tensors:,}", f"{p.parameters:,}", size(p.nbytes)] for p in found.parts],
        right={2, 3, 4},
    )
    if rooms:
        click.echo()
        print_table(["backend", "memory", "free", "fits"], [_room_row(r, found) for r in rooms], right={1, 2})


def _sampling(found: facts.Facts) -> str:
    """The defaults by origin: "temperature 0.7, top_p 0.8 (generation_config.json); min_p 0 (built in)"."""
    groups: dict[str, list[str]] = {}
    for name, (value, origin) in found.sampling().items():
        groups.setdefault(origin, []).append(f"{name} {value:g}")
    return "; ".join(f"{', '.join(each)} ({origin})" for origin, each in groups.items())


def _print_pairs(pairs: dict[str, str]) -> None:
    """A name and its value on each line, long values wrapped beside the name."""
    width = max(map(len, pairs)) + 2
    for name, value in pairs.items():
        click.echo(hanging(f"{name:<{width}}{value}", width))


def _room_row(room: fit.Room, found: facts.Facts) -> list[str]:
    if room.trouble:
        return [room.backend, "", "", safe(room.trouble)]
    if not room.context:
        what = "no: too little memory"
    elif room.context == found.context:
        what = f"yes, at its full context of {room.context:,} tokens"
    else:
        what = f"yes, up to {room.context:,} tokens (--context)"
    return [room.backend, size(room.weights), size(room.free), what]
