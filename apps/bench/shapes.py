"""The shapes that `bench --shape` builds without a download."""

from __future__ import annotations

import difflib

from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.base.shapes import SHAPES, Config

__all__ = ["SHAPES", "Config", "find"]


def find(name: str) -> Config:
    """Return a shape's config. Raises UsageError naming the nearest."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.3)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UsageError(
        f"unknown shape {name!r}{hint}", where="--shape", remedy=f"use one of {', '.join(SHAPES)}"
    )
