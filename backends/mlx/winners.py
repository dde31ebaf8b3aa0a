"""Which kernels are used: those that beat the stock operation on this very Mac, or those asked for."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinychat_mlx import disk_cache
from tinychat_mlx.backends.mlx import head
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.fused import KINDS as PRODUCTS
from tinychat_mlx.backends.mlx.fused import Takes
from tinychat_mlx.backends.mlx.texts import digest
from tinychat_mlx.errors import BackendError

KINDS = (*PRODUCTS, head.KIND)
SWITCH = "TINYCHAT_MLX_KERNELS"
CAPTURE = "captured step"  # the key of a measurement of whole steps: through mx.compile, and not
MARGIN = 0.97  # a kernel must be 3 % faster: two measurements of one thing differ by as much


def choice(asked: str | None, metal: bool, chip: str) -> tuple[Takes | None, str]:
    """-> (which kernels to use or None, why in words).

    asked, or else TINYCHAT_MLX_KERNELS: "off", "all", or kinds with commas. Else what was measured here.
    Raises BackendError for an unknown kind.
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
        ), f"our kernels where they won here, {won.total()} of {tried}: {by_kind}"
    if text == "off":
        return None, "stock operations: asked for"
    kinds = set(KINDS) if text == "all" else set(text.split(","))
    if unknown := sorted(kinds - set(KINDS)):
        raise BackendError(
            f"unknown kernel {unknown[0]!r}",
            where=SWITCH,
            remedy=f"set it to off, all, or some of {','.join(KINDS)}",
        )
    return (lambda key: key.split()[0] in kinds), f"our kernels asked for: {', '.join(sorted(kinds))}"


def captures(chip: str) -> bool:
    """Whether decode steps go through mx.compile: where that was measured to be faster.

    It saves Python's time, which a step in flight mostly hides, and costs a launch for each cache write.
    TINYCHAT_MLX_CAPTURE=1 or 0 overrides it.
    """
    asked = os.environ.get("TINYCHAT_MLX_CAPTURE")
    return asked == "1" if asked else CAPTURE in read(chip)


def path() -> Path:
    """Where measurements are kept."""
    return disk_cache.place("winners")


def conditions(chip: str) -> dict[str, str]:
    """A measurement holds for one chip, one MLX and one text of the kernels."""
    return {"chip": chip, "mlx": str(mx.__version__), "kernels": digest()}


def save(chip: str, microseconds: Mapping[str, tuple[float, float]]) -> Path:
    """Keep {key: (ours, stock)}, beside what was measured before under the same conditions."""
    file = path()
    kept = {**measured(chip), **{k: list(v) for k, v in microseconds.items()}}
    disk_cache.write(file, json.dumps({**conditions(chip), "microseconds": kept}, indent=1).encode())
    return file


def measured(chip: str) -> dict[str, list[float]]:
    """{key: [ours, stock]} in microseconds; empty where nothing (readable) was measured so."""
    try:
        found: Any = json.loads(path().read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in conditions(chip).items()):
            return {}
        return {str(k): [float(ours), float(stock)] for k, (ours, stock) in found["microseconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache: absent, old or damaged, it is measured again


def read(chip: str) -> frozenset[str]:
    """Keys of the shapes where our kernel won."""
    return frozenset(k for k, (ours, stock) in measured(chip).items() if ours < MARGIN * stock)
