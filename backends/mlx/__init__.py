"""Apple silicon: MLX arrays, mx.fast operations, and our own Metal kernels where they are measured to win.

Nothing is imported until asked for: `cost` must work where MLX is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinychat_mlx.backends.mlx.backend import MlxBackend

__all__ = ["MlxBackend"]


def __getattr__(name: str) -> Any:
    if name != "MlxBackend":
        raise AttributeError(f"module 'tinychat_mlx.backends.mlx' has no attribute {name!r}")
    from tinychat_mlx.backends.mlx.backend import MlxBackend

    return MlxBackend
