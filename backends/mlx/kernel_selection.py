"""Choose the kernels: those measured to be faster than the stock operation on this Mac, or those requested."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinychat_mlx.backends.mlx import head
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.fused import KINDS as PRODUCTS
from tinychat_mlx.backends.mlx.fused import Takes
from tinychat_mlx.backends.mlx.shader_source import digest
from tinychat_mlx.base import disk_cache
from tinychat_mlx.base.errors import BackendError

KINDS = (*PRODUCTS, head.KIND)
SWITCH = "TINYCHAT_MLX_KERNELS"
CAPTURE = "captured step"  # key of the measurement of whole steps, with and without mx.compile
MARGIN = 0.97  # a kernel must be 3 % faster; repeated measurements differ by as much


def choice(asked: str | None, metal: bool, chip: str) -> tuple[Takes | None, str]:
    """Return (which kernels to use or None, the reason as text).

    asked, or else TINYCHAT_MLX_KERNELS: "off", "all", or kinds separated by commas. Otherwise the
    measurements of this Mac decide. Raises BackendError for an unknown kind.
    """
    if asked is None and not metal:
        return None, "stock operations: no Metal"
    text = asked or os.environ.get(SWITCH) or "measured"
    if text == "measured":
        wins = read(chip)
        if not wins - {CAPTURE}:
            return None, "stock operations: not measured on this Mac yet (tinychat bench --kernels)"
        won = Counter(key.split()[0] for key in wins - {CAPTURE})
        by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(won.items()))
        tried = len(measured(chip).keys() - {CAPTURE})
        return (
            lambda key: key in wins
        ), f"our kernels where they were faster here, {won.total()} of {tried}: {by_kind}"
    if text == "off":
        return None, "stock operations: requested"
    kinds = set(KINDS) if text == "all" else set(text.split(","))
    if unknown := sorted(kinds - set(KINDS)):
        raise BackendError(
            f"unknown kernel {unknown[0]!r}",
            where=SWITCH,
            remedy=f"set it to off, all, or some of {','.join(KINDS)}",
        )
    return (lambda key: key.split()[0] in kinds), f"our kernels, as requested: {', '.join(sorted(kinds))}"


def captures(chip: str) -> bool:
    """Return whether decode steps use mx.compile: only if that was measured to be faster.

    It saves Python time, which a step in flight mostly hides, and costs one launch per cache write.
    TINYCHAT_MLX_CAPTURE=1 or 0 overrides it.
    """
    asked = os.environ.get("TINYCHAT_MLX_CAPTURE")
    return asked == "1" if asked else CAPTURE in read(chip)


def path() -> Path:
    """Return the file of measurements."""
    return disk_cache.place("winners")


def conditions(chip: str) -> dict[str, str]:
    """Return the conditions of a measurement: chip, MLX version and kernel sources."""
    return {"chip": chip, "mlx": str(mx.__version__), "kernels": digest()}


def save(chip: str, microseconds: Mapping[str, tuple[float, float]]) -> Path:
    """Save {key: (ours, stock)} in addition to earlier measurements under the same conditions."""
    file = path()
    kept = {**measured(chip), **{k: list(v) for k, v in microseconds.items()}}
    disk_cache.write(file, json.dumps({**conditions(chip), "microseconds": kept}, indent=1).encode())
    return file


def measured(chip: str) -> dict[str, list[float]]:
    """Return {key: [ours, stock]} in microseconds; empty if nothing is measured for these conditions."""
    try:
        found: Any = json.loads(path().read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in conditions(chip).items()):
            return {}
        return {str(k): [float(ours), float(stock)] for k, (ours, stock) in found["microseconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache: if absent, old or damaged, measure again


def read(chip: str) -> frozenset[str]:
    """Return the keys of the shapes for which our kernel was faster."""
    return frozenset(k for k, (ours, stock) in measured(chip).items() if ours < MARGIN * stock)
