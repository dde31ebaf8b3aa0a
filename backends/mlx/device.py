"""Import MLX and describe the machine: version, device, dtype, and the memory limit.

The other modules import `mx` from here, so that a missing or old MLX gives a one-line error and no traceback.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.base.errors import BackendError

# new_thread_unsafe_stream, asarray of host memory; the version that this backend is tested with
MINIMUM = (0, 32, 1)
INSTALL = "pip install -U 'mlx>=0.32.1'"

# float32 is for --exact and for attention scores; on an M5, MLX would multiply it with 10 bits of fraction
os.environ.setdefault("MLX_ENABLE_TF32", "0")

try:
    import mlx.core as _mlx
except ImportError as e:
    raise BackendError(
        f"MLX is not installed or does not load ({e})", where="mlx backend", remedy=INSTALL
    ) from None

mx: Any = _mlx  # MLX has no type hints for methods of its arrays


def check_version(version: str) -> None:
    """Raise BackendError for an MLX older than MINIMUM."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[: len(MINIMUM)])
    if numbers < MINIMUM:
        raise BackendError(f"MLX {version} is too old", where="mlx backend", remedy=INSTALL)


check_version(mx.__version__)

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
MB, GB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Chip:
    """The chip that MLX runs on. generation: 13 is M1, 14 M2, 15 M3, 16 M4; 0 is no Apple GPU."""

    name: str
    metal: bool
    generation: int
    memory: int  # bytes of the machine
    working_set: int  # bytes that Metal recommends as the maximum for a GPU program; 0 without Metal

    @property
    def limit(self) -> int:
        """Bytes that this process may use. Above three quarters macOS swaps, and then panics [mlx-lm#883]."""
        quarters = self.memory * 3 // 4
        return min(quarters, self.working_set) if self.working_set else quarters


def find_chip() -> Chip:
    """Query MLX. Raises BackendError on a Mac without a usable GPU."""
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
    """Return the bytes of RAM if MLX does not report them."""
    import psutil

    return int(psutil.virtual_memory().total)


def choose_dtype(chip: Chip, exact: bool) -> Any:
    """Return float16 on a GPU, float32 in exact mode and on a CPU, where MLX's half is slow and inaccurate.

    TINYCHAT_MLX_DTYPE overrides it. bfloat16 needs an M3: M1 and M2 emulate it, and it loses three bits of
    our float16 scales. Raises BackendError for an unknown or emulated dtype.
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
    """Limit MLX's memory to what macOS tolerates, and wire the weights so that they are not paged out.

    The limits are per process, so they are set when a backend is created, not on import.
    """
    mx.set_memory_limit(chip.limit)
    # Freed buffers kept for reuse: activations of a prefill piece and one attention matrix fit
    mx.set_cache_limit(min(512 * MB, chip.limit // 16))
    if chip.working_set:
        mx.set_wired_limit(chip.limit)
