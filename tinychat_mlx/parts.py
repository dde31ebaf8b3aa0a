"""The parts of a model and the form of each, from the names, dtypes and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats.detect import Layout
from tinychat_mlx.weights.formats.llm_awq import LlmAwq
from tinychat_mlx.weights.formats.mlx import Mlx
from tinychat_mlx.weights.formats.stored import Shape, Stored
from tinychat_mlx.weights.weight import Array, Dense, Packed, Weight

ITEM = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
FLOATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
SKETCH_ROWS = 64


@dataclass(frozen=True)
class Part:
    """Weights of one kind stored in one form: the layers' matrices in int4 g128, the head in int8 g64, …

    sample: a small matrix of that form, for the costs of a backend; None for vectors.
    """

    name: str
    form: str
    tensors: int
    parameters: int
    nbytes: int
    sample: Weight | None = field(default=None, compare=False, repr=False)


class Module(NamedTuple):
    """A matrix, or another tensor (flat)."""

    name: str
    form: str
    parameters: int
    nbytes: int
    flat: bool = False


class Listing:
    """The tensors of a model by name, from their headers."""

    def __init__(self, tensors: Mapping[str, tuple[str, Shape]]) -> None:
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> tuple[str, Shape]:
        return self.tensors[name]

    def read(self, name: str) -> Array:
        raise NotImplementedError

    def where(self, name: str) -> str:
        return "the model"

    def size(self, name: str) -> tuple[int, int]:
        """Return the number of values in a tensor, and its bytes."""
        dtype, shape = self.tensors[name]
        return math.prod(shape), math.prod(shape) * ITEM.get(dtype, 1)


def modules_of(listing: Listing, layout: Layout | None) -> Iterator[Module]:
    """Yield each quantised module, then each plain tensor."""
    packed: set[str] = set()
    if layout is not None:
        for module in [n[: -len(layout.key) - 1] for n in listing.tensors if n.endswith(f".{layout.key}")]:
            mine = [f"{module}.{s}" for s in layout.suffixes if f"{module}.{s}" in listing]
            packed.update(mine)
            bits, group = _form(Stored(listing, module), layout)
            codes = max(mine, key=lambda n: listing.size(n)[1])
            form = f"int{bits} {'per channel' if group < 0 else f'g{group}'}"
            nbytes = sum(listing.size(n)[1] for n in mine)
            yield Module(module, form, listing.size(codes)[1] * 8 // bits, nbytes)
    for name, (dtype, shape) in listing.tensors.items():
        if name not in packed:
            form = FLOATS.get(dtype, dtype.lower())
            yield Module(name.removesuffix(".weight"), form, *listing.size(name), len(shape) < 2)


def _form(stored: Stored, layout: Layout) -> tuple[int, int]:
    if not isinstance(layout, Mlx):
        return layout.w_bit, layout.group_size
    words, groups = stored.info("weight")[1][-1], stored.info("scales")[1][-1]
    return layout.form(stored, words, groups)


def parts_of(
    modules: Sequence[Module],
    listing: Listing,
    layout: Layout | None,
    config: ModelConfig | None,
    checkpoint: Checkpoint | None,
) -> tuple[Part, ...]:
    """Group modules by role and form, the largest group first."""
    rows: dict[tuple[str, str], list[Module]] = {}
    odd = _odd(modules, config)
    for module in modules:
        role = _role(module, listing, config)
        role += f": {odd[module.name]}" if role == "layers" and module.name in odd else ""
        rows.setdefault((role, module.form), []).append(module)
    made = [
        Part(*key, len(each), sum(m.parameters for m in each), sum(m.nbytes for m in each),
             None if each[0].flat else _sample(each, layout, checkpoint))
        for key, each in rows.items()
    ]  # fmt: skip
    return tuple(sorted(made, key=lambda p: -p.nbytes))


def _odd(modules: Sequence[Module], config: ModelConfig | None) -> dict[str, str]:
    """Return name -> projection for projections whose form, in some layer, differs from that of most."""
    if config is None:
        return {}
    layer = re.compile(rf"{re.escape(config.spec.name('layers'))}\.\d+\.(.+)")
    found = {m.name: re.sub(r"\.\d+\.", ".*.", f[1])
             for m in modules if not m.flat and (f := layer.fullmatch(m.name))}  # fmt: skip
    total: dict[str, int] = {}
    for m in modules:
        if m.name in found:
            total[m.form] = total.get(m.form, 0) + m.parameters
    most = max(total, key=lambda form: total[form], default="")
    others = {found[m.name] for m in modules if m.name in found and m.form != most}
    return {name: projection for name, projection in found.items() if projection in others}


def _role(module: Module, listing: Listing, config: ModelConfig | None) -> str:
    """Return the name of the part that a module belongs to."""
    if config is None:
        return "weights"
    if module.name == config.spec.name("embed"):
        head = config.spec.name("head")
        apart = f"{head}.weight" in listing or f"{head}.qweight" in listing
        return "embedding" if apart else "embedding and head"
    if module.name == config.spec.name("head"):
        return "head"
    if module.flat:
        return "norms and biases"
    return "layers" if re.match(rf"{re.escape(config.spec.name('layers'))}\.\d", module.name) else "other"


def _sample(modules: Sequence[Module], layout: Layout | None, checkpoint: Checkpoint | None) -> Weight:
    """Return the smallest of these modules if its scales affect the stored form, else a sketch of the form."""
    form = modules[0].form
    here = [m for m in modules if checkpoint and m.name in checkpoint.modules]
    if checkpoint and here and isinstance(layout, Mlx) and not form.startswith("int8"):
        return checkpoint.weight(min(here, key=lambda m: m.parameters).name)
    return sketch(form, isinstance(layout, (Mlx, LlmAwq)))


def sketch(form: str, half: bool = True, zeros: bool = False) -> Weight:
    """Return a small weight of a form. half: the offsets are float16. zeros: they are multiples of the scales."""
    if not (found := re.fullmatch(r"int(\d) (?:g(\d+)|per channel)", form)):
        dtype = {"fp64": np.float32, "fp32": np.float32, "bf16": np.uint16}.get(form, np.float16)
        return Dense("sketch", np.zeros((SKETCH_ROWS, 1024), dtype))
    bits, group = int(found[1]), int(found[2] or 4096)
    k = -(-1024 // group) * group
    scales = np.ones((SKETCH_ROWS, k // group), np.float16)
    biases = np.full(scales.shape, -1 if zeros else -1 / 3, np.float16 if half else np.float32)
    return Packed("sketch", np.zeros((SKETCH_ROWS, k * bits // 32), np.uint32), scales, biases, bits, group)
