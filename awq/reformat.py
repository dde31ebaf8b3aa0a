"""A quantised model in another format, its codes unchanged: AutoAWQ to MLX, MLX to AutoAWQ."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.errors import ConfigError
from tinychat_mlx.formats.awq_gemm import awq_config, awq_entries
from tinychat_mlx.formats.mlx import float_entry, half, mlx_entries
from tinychat_mlx.formats.stored import FLOATS
from tinychat_mlx.tensorfile import Entry
from tinychat_mlx.weight import Array, Packed


def reformatted(source: Checkpoint, format: str, keep: frozenset[str]) -> Iterator[Entry]:
    """Every tensor of a quantised checkpoint in `format`, floats in float16. Raises FormatError.

    keep: modules that the AutoAWQ format holds in float16 (embedding and head).
    """
    owned = set()
    for module in sorted(source.modules):
        weight = source.weight(module)
        assert isinstance(weight, Packed)
        if format == "awq" and module in keep:
            yield float_entry(f"{module}.weight", weight.to_float32(), "F16")
        else:
            yield from awq_entries(weight) if format == "awq" else mlx_entries(weight)
        owned.add(f"{module}.bias")
    for name in sorted(n for n in source.names() if n in source and n not in owned):
        dtype, shape = source.info(name)
        if not _is_part(source, name):
            stored = "F16" if dtype in FLOATS else dtype
            yield Entry(name, stored, shape, partial(_stored, source, name, dtype))


def _is_part(source: Checkpoint, name: str) -> bool:
    return name.rpartition(".")[0] in source.modules


def _stored(source: Checkpoint, name: str, dtype: str) -> Array:
    array = source.read(name)
    return half(name, array) if dtype in FLOATS else array


def reformatted_config(source: Checkpoint, format: str, head: str | None) -> dict[str, Any]:
    """config.json of the same model in another format. Raises ConfigError where that cannot hold it."""
    blocks = ("quantization", "quantization_config", "compression_config")
    raw = {key: value for key, value in source.config.items() if key not in blocks}
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = "float16"
    bits, size = source.quantization.w_bit, source.quantization.group_size
    if format == "awq":
        if bits != 4:
            raise ConfigError(f"{source.folder}: {bits} bits a weight: AutoAWQ holds 4, use --format mlx")
        kept = [head] if head is not None and source.has(head) else None
        return raw | {"quantization_config": awq_config(size, kept)}
    block: dict[str, Any] = {"group_size": size, "bits": bits, "mode": "affine"}
    for module in sorted(source.modules):
        weight = source.weight(module)
        assert isinstance(weight, Packed)
        block["group_size"] = min(128, size) if size > 0 else weight.group_size
        if (weight.w_bit, weight.group_size) != (bits, block["group_size"]):
            block[module] = {"group_size": weight.group_size, "bits": weight.w_bit}
    return raw | {"quantization": block, "quantization_config": block}
