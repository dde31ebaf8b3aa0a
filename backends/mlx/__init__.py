"""Apple silicon backend: MLX arrays, mx.fast operations, and Metal kernels that are measured to be faster.

Imports are lazy, because `cost` must work without MLX.
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
