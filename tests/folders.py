"""Small model folders for the tests of checkpoints, their formats and their writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest

from tinychat_mlx.apps.bench.shapes import SHAPES
from tinychat_mlx.checkpoint import SINGLE, Checkpoint
from tinychat_mlx.errors import FormatError, TinychatError
from tinychat_mlx.shards import write_sharded
from tinychat_mlx.tensorfile import Entry, entry, write

UP = "model.layers.0.mlp.up_proj"
_rng = np.random.default_rng(0)
W = _rng.standard_normal((8, 128)).astype(np.float16)
B = _rng.standard_normal(8).astype(np.float16)


def dense() -> list[Entry]:
    names = ["model.embed_tokens", UP]
    tensors = [entry(f"{name}.weight", W) for name in names]
    return [*tensors, entry(f"{UP}.bias", B), entry("model.norm.weight", np.ones(128, np.float32))]


def folder(path: Path, config: Any = None, tensors: list[Entry] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config or {"model_type": "llama"})
    (path / "config.json").write_text(text)
    write(path / SINGLE, dense() if tensors is None else tensors)
    return path


def sharded(path: Path) -> Path:
    """Write three shards with one, two and one tensors."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    write_sharded(path, dense(), max_bytes=W.nbytes + 100)
    assert len(list(path.glob("*.safetensors"))) == 3
    return path


def quantised(path: Path, layout: str = "awq-gemm", group: int = 64) -> Path:
    tensors = layouts.WRITERS[layout](*layouts.sample(64, 128, group))
    return folder(path, layouts.config(layout, group), dense_and(tensors))


def dense_and(tensors: layouts.Tensors, module: str = "model.layers.0.mlp.down_proj") -> list[Entry]:
    return dense() + [entry(f"{module}.{suffix}", array) for suffix, array in tensors.items()]


def refused(path: Path, message: str, error: type[TinychatError] = FormatError) -> None:
    with pytest.raises(error) as caught:
        Checkpoint.open(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def huge(path: Path) -> Path:
    """Write a sparse model file of 4.4 TB."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES["tiny"] | {"vocab_size": 1 << 33}))
    rows = {"dtype": "F16", "shape": [1 << 33, 256], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"model.embed_tokens.weight": rows}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 42))
    return path
