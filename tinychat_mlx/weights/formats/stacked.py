"""Stacked experts: MLX stores a layer's experts in one tensor (switch_mlp); map them to Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from tinychat_mlx.weights.safetensors import Entry
from tinychat_mlx.weights.weight import Array

_STACK = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(\w+)")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class File(Protocol):
    """The methods of TensorFile that a checkpoint needs."""

    @property
    def path(self) -> Path: ...

    def info(self, name: str) -> tuple[str, tuple[int, ...]]: ...

    def nbytes(self, name: str) -> int: ...

    def read(self, name: str) -> Array: ...


class ExpertFile:
    """One expert of a stacked tensor (E, …). Ignores the requested name."""

    def __init__(self, file: File, stack: str, expert: int) -> None:
        self.path, self._file, self._stack, self._expert = file.path, file, stack, expert

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self._file.info(self._stack)
        return dtype, shape[1:]

    def nbytes(self, name: str) -> int:
        return self._file.nbytes(self._stack) // self._file.info(self._stack)[1][0]

    def read(self, name: str) -> Array:
        expert: Array = self._file.read(self._stack)[self._expert]
        return expert


def unstacked(files: dict[str, File]) -> Iterator[tuple[str, File]]:
    """Yield tensor names and their files, with each stack replaced by its experts."""
    for name, file in files.items():
        match = _STACK.fullmatch(name)
        shape = file.info(name)[1] if match else ()
        if match is None or len(shape) < 2:
            yield name, file
            continue
        block, role, suffix = match.groups()
        role = _MIXTRAL[role] if block.endswith("block_sparse_moe") else role
        for expert in range(shape[0]):
            yield f"{block}.experts.{expert}.{role}.{suffix}", ExpertFile(file, name, expert)


def stack_of(module: str) -> tuple[str, int] | None:
    """Return MLX's name of the stack that holds an expert's linear (by its Hugging Face name), and the expert's index."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    block, expert, role = match.groups()
    role = {theirs: ours for ours, theirs in _MIXTRAL.items()}.get(role, role)
    return f"{block}.switch_mlp.{role}", int(expert)


def stack(experts: Sequence[Entry]) -> Entry:
    """Stack one tensor of every expert, in order, into MLX's tensor (E, …). The data is read when it is written."""
    module, _, suffix = experts[0].name.rpartition(".")
    found = stack_of(module)
    assert found is not None, experts[0].name
    shape = (len(experts), *experts[0].shape)
    return Entry(f"{found[0]}.{suffix}", experts[0].dtype, shape, partial(_stacked, experts))


def _stacked(experts: Sequence[Entry]) -> Array:
    return np.stack([e.data() if callable(e.data) else e.data for e in experts])
