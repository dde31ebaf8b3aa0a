"""MLX and the machine it finds: version, device, dtype, and how much memory may be taken.

The only module that imports MLX by itself; the others take `mx` from here, so that a missing or old
MLX is one line and not a traceback from somewhere.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.errors import BackendError

MINIMUM = (0, 32, 1)  # new_thread_unsafe_stream, asarray upon host memory; what this backend was tested with
INSTALL = "pip install -U 'mlx>=0.32.1'"

# float32 is for --exact and for scores of attention: on an M5 MLX would multiply it with 10 bits of fraction
os.environ.setdefault("MLX_ENABLE_TF32", "0")

try:
    import mlx.core as _mlx
except ImportError as e:
    raise BackendError(
        f"MLX is not installed or does not load ({e})", where="mlx backend", remedy=INSTALL
    ) from None

mx: Any = _mlx  # MLX ships no types of its arrays' methods


def check_version(version: str) -> None:
    """Raises BackendError for an MLX older than MINIMUM."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[: len(MINIMUM)])
    if numbers < MINIMUM:
        raise BackendError(f"MLX {version} is too old", where="mlx backend", remedy=INSTALL)


check_version(mx.__version__)

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
MB, GB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Chip:
    """What MLX runs on. generation: 13 is M1, 14 M2, 15 M3, 16 M4; 0 is no Apple GPU."""

    name: str
    metal: bool
    generation: int
    memory: int  # bytes of the machine
    working_set: int  # bytes Metal says a GPU program should not exceed; 0 without Metal

    @property
    def limit(self) -> int:
        """Bytes this process may take. Past three quarters macOS swaps, and then panics [mlx-lm#883]."""
        quarters = self.memory * 3 // 4
        return min(quarters, self.working_set) if self.working_set else quarters


def find_chip() -> Chip:
    """Ask MLX. Raises BackendError on a Mac whose GPU is not reachable."""
    metal = bool(mx.metal.is_available())
    if sys.platform == "darwin" and not metal:
        raise BackendError(
            "this Mac has no Metal device; it may be a virtual machine",
            where="mlx backend",
            remedy="use --backend cpu",
        )
    info: dict[str, Any] = dict(mx.device_info())
    generation = re.match(r"applegpu_g(\d+)", str(info.get("architecture", "")))
    return Chip(
        name=str(info.get("device_name") or info.get("architecture") or "unknown"),
        metal=metal,
        generation=int(generation.group(1)) if generation else 0,
        memory=int(info.get("memory_size") or machine_memory()),
        working_set=int(info.get("max_recommended_working_set_size", 0)) if metal else 0,
    )


def machine_memory() -> int:
    """Bytes of RAM, where MLX does not say."""
    import psutil

    return int(psutil.virtual_memory().total)


def choose_dtype(chip: Chip, exact: bool) -> Any:
    """float16 on a GPU, float32 when exact and on a CPU, where MLX's half is slow and inaccurate.

    TINYCHAT_MLX_DTYPE overrides it. bfloat16 needs an M3: M1 and M2 emulate it, and our scales are
    float16, of which it loses three bits. Raises BackendError for a dtype that is unknown or emulated.
    """
    name = os.environ.get("TINYCHAT_MLX_DTYPE") or ("float16" if chip.metal and not exact else "float32")
    if name not in DTYPES:
        raise BackendError(
            f"unknown type {name}", where="TINYCHAT_MLX_DTYPE", remedy=f"give one of {', '.join(DTYPES)}"
        )
    if name == "bfloat16" and 0 < chip.generation < 15:
        raise BackendError(
            f"bfloat16 is emulated on {chip.name}", where="TINYCHAT_MLX_DTYPE", remedy="use float16"
        )
    return DTYPES[name]


def set_limits(chip: Chip) -> None:
    """Keep MLX below the point where macOS dies, and the weights wired so that they are not paged out.

    Process-wide, hence set when a backend is made, not when a module is imported.
    """
    mx.set_memory_limit(chip.limit)
    # Freed buffers kept for reuse: activations of a prefill piece and one attention matrix fit
    mx.set_cache_limit(min(512 * MB, chip.limit // 16))
    if chip.working_set:
        mx.set_wired_limit(chip.limit)
