"""`tinychat models list --recommended`: the curated models (recommended.json) that fit this machine."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import click

from tinychat_mlx import hub, memory_plan
from tinychat_mlx.apps.models.download import note
from tinychat_mlx.apps.models.prepare import existing_conversion
from tinychat_mlx.apps.models.table import print_table
from tinychat_mlx.base.wording import size


def recommended() -> list[dict[str, Any]]:
    """Return the curated models, smallest first."""
    text = (files("tinychat_mlx.apps.models") / "recommended.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["models"]
    return found


def with_fit(model: dict[str, Any], free: int) -> dict[str, Any]:
    """Return a model with the context that fits into `free` bytes (0: none), and whether it is installed."""
    room = free - model["memory_bytes"] - memory_plan.BASE
    context = min(model["context"], max(0, room) // model["kv_bytes_per_token"])
    here = hub.cached(hub.Ref(model["id"])) is not None or existing_conversion(model["id"]) is not None
    return model | {"fits_context": context if context >= memory_plan.LEAST_CONTEXT else 0, "here": here}


def show_recommended(everything: bool, as_json: bool) -> None:
    backend = memory_plan.chosen({"backend": "auto"})
    free = memory_plan.free_on(backend)
    rows = [with_fit(m, free) for m in recommended()]
    shown = rows if everything else [r for r in rows if r["fits_context"]]
    if as_json:
        return click.echo(json.dumps(shown))
    print_table(
        ["model", "download", "memory", "context that fits", "licence", "good for"],
        [
            [
                r["id"] + (" (installed)" if r["here"] else ""),
                size(r["download_bytes"]),
                size(r["memory_bytes"]),
                _context(r),
                r["licence"],
                r["good_for"],
            ]
            for r in shown
        ],
        right={1, 2},
    )
    hidden = len(rows) - len(shown)
    note(
        f"{backend.name}: {size(free)} of memory free"
        + (f"; {hidden} larger models do not fit (list them with --all)" if hidden else "")
        + "; models with a download larger than their memory are in 16 bits: `tinychat chat -m MODEL` offers to convert them"
    )


def _context(row: dict[str, Any]) -> str:
    fits, whole = row["fits_context"], row["context"]
    return "none" if not fits else f"all {whole:,}" if fits == whole else f"{fits:,} of {whole:,}"
