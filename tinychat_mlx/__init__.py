"""TinyChat: quantise a language model to int4 with AWQ and chat with it on any device.

import tinychat_mlx
model = tinychat_mlx.load("demo")
for event in model.chat([{"role": "user", "content": "who are you?"}]):
    print(event.text, end="")
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout apps/, awq/ and backends/ are next to this folder; in a wheel they are inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "backends").exists() and (_here.parent / "backends").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from tinychat_mlx.base.errors import TinychatError
    from tinychat_mlx.loaded_model import Model
    from tinychat_mlx.open import load

__all__ = ["Model", "TinychatError", "__version__", "load"]
_HOME = {"load": "open", "Model": "loaded_model", "TinychatError": "base.errors"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `tinychat --help` does not import NumPy."""
    if name not in _HOME:
        raise AttributeError(f"module 'tinychat_mlx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tinychat_mlx.{_HOME[name]}"), name)
