"""Rewrite a quantised model in another format (AutoAWQ to MLX or MLX to AutoAWQ) with unchanged codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from tinychat_mlx.awq.output.config_json import carried, dense_linears
from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats import awq_gemm
from tinychat_mlx.weights.formats.awq_gemm import awq_config, awq_entries
from tinychat_mlx.weights.formats.mlx import half, mlx_entries
from tinychat_mlx.weights.formats.stacked import stack, stack_of
from tinychat_mlx.weights.formats.stored import FLOATS
from tinychat_mlx.weights.safetensors import Entry
from tinychat_mlx.weights.weight import Array, Packed

ROWS = 4096  # embedding rows dequantised at once


@dataclass(frozen=True)
class Reformatted:
    """A converted model: config.json and tensors, each computed when it is written.

    moved: the largest change of a weight as a fraction of a quantisation step. The formats store scales and
    zero points differently.
    """

    config: dict[str, Any]
    tensors: list[Entry]
    moved: float


def reformatted(source: Checkpoint, format: str) -> Reformatted:
    """Prepare a quantised checkpoint in another format. Float tensors become float16.

    Raises FormatError if the format cannot represent the model.
    """
    awq, config = format == "awq", parse_config(source.config)
    spec = config.spec
    rim = {spec.name("embed"), spec.name("head")} if awq else set()  # AutoAWQ stores them in float16
    codes = sorted(source.modules - rim)
    if not codes:
        raise FormatError(
            "only embedding and head are quantised, and AutoAWQ stores these in float16",
            where=source.folder,
            remedy="use --format mlx",
        )
    found = {module: _form(source, module, awq) for module in codes}
    # AutoAWQ has one group size for all modules
    group = min(size for _, size, _ in found.values()) if awq else 0
    made = lru_cache(1)(partial(_entries, source, awq, group))
    tensors = [_later(made, module) for module in codes]
    kept = dense_linears(config, source, set(codes))
    if awq:
        block = {"quantization_config": awq_config(group, kept or None)}
    else:
        tensors = _stacked(codes, tensors)
        kept += [name for name in (spec.name("embed"),) if name not in source.modules]
        whole = _mlx_block({module: form[:2] for module, form in found.items()}) | dict.fromkeys(kept, False)
        block = {"quantization": whole, "quantization_config": whole}
    floats = [_float(source, module) for module in sorted(rim & source.modules)]
    floats += _others(source, {f"{module}.bias" for module in codes})
    moved = max(part for _, _, part in found.values())
    return Reformatted(
        carried(source.config, spec) | block, [t for own in tensors for t in own] + floats, moved
    )


def _packed(source: Checkpoint, module: str) -> Packed:
    weight = source.weight(module)
    assert isinstance(weight, Packed)
    return weight


def _form(source: Checkpoint, module: str, awq: bool) -> tuple[int, int, float]:
    """Return bits, group size and the largest change of a weight for a module."""
    weight = _packed(source, module)
    moved = awq_gemm.moved(weight) if awq else _moved_by_float16(weight)
    return weight.w_bit, weight.group_size, moved


def _moved_by_float16(weight: Packed) -> float:
    scales, biases = (a.astype(np.float32) for a in (weight.scales, weight.biases))
    s, b = (half(weight.name, a).astype(np.float32) for a in (scales, biases))
    top = 2**weight.w_bit - 1
    off = np.maximum(np.abs(b - biases), np.abs(top * (s - scales) + b - biases))
    moved = np.divide(off, np.abs(scales), out=np.zeros_like(off), where=off > 0)
    return float(moved.max(initial=0))


def _entries(source: Checkpoint, awq: bool, group: int, module: str) -> list[Entry]:
    weight = _packed(source, module)
    return awq_entries(_split(weight, group)) if awq else mlx_entries(weight)


def _split(weight: Packed, group: int) -> Packed:
    """Split groups into equal smaller ones with the same scale. No weight changes."""
    times = weight.group_size // group
    scales, biases = (np.repeat(a, times, axis=1) if times > 1 else a for a in (weight.scales, weight.biases))
    return replace(weight, scales=scales, biases=biases, group_size=group)


def _later(made: Any, module: str) -> list[Entry]:
    """Return a module's tensors with deferred data.

    They are built here for their shapes, and again when they are written: one module is in memory at a time.
    """
    return [entry._replace(data=partial(_made, made, module, i)) for i, entry in enumerate(made(module))]


def _made(made: Any, module: str, i: int) -> Array:
    data: Array = made(module)[i].data
    return data


def _stacked(modules: list[str], tensors: list[list[Entry]]) -> list[list[Entry]]:
    """Stack the tensors of a layer's experts as mlx-lm stores them. Raises FormatError."""
    out: list[list[Entry]] = []
    stacks: dict[str, dict[int, list[Entry]]] = {}
    for module, own in zip(modules, tensors, strict=True):
        if (found := stack_of(module)) is None:
            out.append(own)
        else:
            stacks.setdefault(found[0], {})[found[1]] = own
    for name, experts in stacks.items():
        each = [experts[e] for e in sorted(experts)]
        forms = {tuple((e.dtype, e.shape) for e in own) for own in each}
        if len(forms) > 1 or sorted(experts) != list(range(len(experts))):
            raise FormatError(
                "its experts are not all stored in the same form",
                where=name,
                remedy="quantise the original model",
            )
        out.append([stack(same) for same in zip(*each, strict=True)])
    return out


def _mlx_block(forms: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Build `quantization` from module -> (bits, group): the most common form as default, the others by name."""
    (bits, size), _ = Counter(forms.values()).most_common(1)[0]
    block: dict[str, Any] = {"group_size": size, "bits": bits, "mode": "affine"}
    for module, form in forms.items():
        if form != (bits, size):
            found = stack_of(module)
            block[found[0] if found else module] = {"group_size": form[1], "bits": form[0]}
    return block


def _float(source: Checkpoint, module: str) -> Entry:
    """Return a quantised embedding or head as float16."""
    shape = _packed(source, module).shape
    return Entry(f"{module}.weight", "F16", shape, partial(_dequantised, source, module))


def _dequantised(source: Checkpoint, module: str) -> Array:
    weight = _packed(source, module)
    out = np.empty(weight.shape, np.float16)
    for at in range(0, len(out), ROWS):
        rows = slice(at, at + ROWS)
        parts = weight.qweight[rows], weight.scales[rows], weight.biases[rows]
        piece = Packed(module, *parts, weight.w_bit, weight.group_size)
        out[rows] = half(f"{module}.weight", piece.to_float32())
    return out


def _others(source: Checkpoint, written: set[str]) -> Iterator[Entry]:
    """Yield the tensors that do not belong to a quantised module."""
    for name in sorted(source.names() - written):
        module, _, part = name.rpartition(".")
        if name in source and (part == "bias" or module not in source.modules):
            dtype, shape = source.info(name)
            stored = "F16" if dtype in FLOATS else dtype
            yield Entry(name, stored, shape, partial(_plain, source, name, dtype))


def _plain(source: Checkpoint, name: str, dtype: str) -> Array:
    array = source.read(name)
    return half(name, array) if dtype in FLOATS else array
