"""The settings of a conversion and all checks that run before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from tinychat_mlx.awq.layer import METHODS, Form
from tinychat_mlx.awq.sites import experts, layer_shapes, mixture, module_name, modules, routers, shapes
from tinychat_mlx.base.errors import FormatError, UsageError
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.model.decoder import Source
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats.stored import FLOATS
from tinychat_mlx.weights.model_identity import weight_files

HEADS = {"int8": 8, "int4": 4, "fp16": 16}
FORMATS = ("mlx", "awq")
GROUPS = (128, 64, 32)  # inputs per scale
LEAST = 128  # calibration tokens; fewer are not enough for inputs of hundreds of channels
CHECK_ROWS = 1 << 22  # values checked at once
# Bits of infinity, and of the first number that rounds to infinity in float16 (65520; in bfloat16, 65536
# follows).
BEYOND = {"F16": (0x7C00, 0x7C00), "BF16": (0x7F80, 0x4780), "F32": (0x7F800000, 0x477FF000)}


@dataclass(frozen=True)
class Settings:
    """The settings of one conversion.

    calib: "self", a file, or a hub id. tokens: 0 chooses by model size. group_size: 0 ("auto") is the largest
    of GROUPS that fits the model; `resolved` replaces it.
    """

    method: str = "awq+"
    w_bit: int = 4
    group_size: int = 0
    format: str = "mlx"
    head: str = "int8"
    calib: str = "self"
    tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises UsageError."""
        allowed: dict[str, tuple[Any, ...]] = {
            "method": METHODS, "w_bit": (3, 4, 8), "group_size": (0, *GROUPS), "format": FORMATS, "head": tuple(HEADS),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise UsageError(
                    f"unknown value {getattr(self, name)!r} of {name}", remedy=f"use one of {known}"
                )
        if 0 < self.tokens < LEAST:
            raise UsageError(
                f"{self.tokens} calibration tokens are too few",
                where="--calib-tokens",
                remedy=f"give at least {LEAST}, or 0 to choose automatically",
            )
        if self.format == "awq" and self.w_bit != 4:
            raise UsageError(f"the AutoAWQ format has 4 bits, not {self.w_bit}", remedy="use --format mlx")

    def resolved(self, config: ModelConfig) -> Settings:
        """Return the settings with the model's group size.

        Raises FormatError naming a matrix that does not fit.
        """
        named: dict[int, str] = {}
        for name, _, k in quantised_shapes(config):
            named.setdefault(k, name)
        fits = fitting_group(named)
        for k, name in named.items():
            if not fits and k % GROUPS[-1]:
                raise FormatError(
                    f"{k} inputs cannot be stored in groups of 32, 64 or 128",
                    where=name,
                    remedy="choose another model",
                )
            if self.group_size and k % self.group_size:
                raise FormatError(
                    f"{k} inputs are not a multiple of the group size {self.group_size}",
                    where=name,
                    remedy=f"use --group-size {fits}",
                )
        return replace(self, group_size=self.group_size or fits)

    @property
    def form(self) -> Form:
        return Form(self.w_bit, self.group_size)

    @property
    def form_text(self) -> str:
        return f"{self.w_bit} bits in groups of {self.group_size}"

    @property
    def head_bits(self) -> int:
        """Bits of embedding and head. The AutoAWQ format stores them in 16 bits."""
        return 16 if self.format == "awq" else HEADS[self.head]

    def fingerprint(self, source: Checkpoint) -> dict[str, Any]:
        """Return what must be equal to resume a run: the settings and the files read."""
        calib = Path(self.calib)
        text = hashlib.sha256(calib.read_bytes()).hexdigest() if calib.is_file() else self.calib
        files = weight_files(source.folder)
        return {"settings": asdict(self), "config": source.config, "files": files, "calibration": text}


def default_tokens(config: ModelConfig) -> int:
    """Return the default number of calibration tokens.

    Small models, whose forward pass is cheap, use 32768. For large models 8192 tokens are enough for every
    channel.
    """
    layers = [active_size(config, layer) for layer in range(config.num_hidden_layers)]
    if sum(layers) < 100e6:
        return 32768
    moe = config.moe  # an expert gets a share of the tokens: aim at 2048 each, up to 32768 in all
    return 8192 if moe is None else min(32768, max(8192, 2048 * moe.num_experts // moe.num_experts_per_tok))


def active_size(config: ModelConfig, layer: int) -> int:
    """Number of weights of a layer that one token uses."""
    sizes = [sum(n * k for n, k in part.values()) for part in layer_shapes(config, layer)]
    moe = mixture(config, layer)
    if moe is None:
        return sum(sizes)
    routed = sizes[1 : 1 + moe.num_experts_per_tok]
    return sizes[0] + sum(routed) + sum(sizes[1 + moe.num_experts :])


def fitting_group(inputs: Iterable[int]) -> int:
    """Return the largest group size that divides all input sizes, or 0."""
    return next((g for g in GROUPS if gcd(*inputs) % g == 0), 0)


def open_dense(source: Checkpoint, settings: Settings) -> tuple[ModelConfig, Settings]:
    """Check a dense checkpoint against the settings. Returns its config and the settings with a group size.

    Raises ConfigError and FormatError.
    """
    config = parse_config(source.config)
    settings = settings.resolved(config)
    for name, n, _ in quantised_shapes(config):
        if settings.format == "awq" and n % 8:
            raise FormatError(
                f"{n} outputs are not a multiple of 8, which AutoAWQ needs",
                where=name,
                remedy="use --format mlx",
            )
    check_complete(config, source)
    check_numbers(source)
    return config, settings


def quantised_shapes(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield (name, outputs, inputs) of every matrix that is quantised, layer by layer."""
    for layer in range(config.num_hidden_layers):
        moe = mixture(config, layer)
        kept = () if moe is None else routers(moe)
        for expert in (None, *experts(config, layer)):
            sizes = shapes(config, layer, expert)
            for module in modules(config, layer, expert):
                if module.role not in kept:
                    n = sum(sizes[part][0] for part in module.parts)
                    yield module_name(config, layer, module.role, expert), n, sizes[module.parts[0]][1]


def check_complete(config: ModelConfig, source: Source) -> None:
    """Check that every tensor of the graph exists, without reading it.

    Raises FormatError for the first missing one.
    """
    spec = config.spec
    needed = [spec.name("embed"), f"{spec.name('final_norm')}.weight"]
    for layer in range(config.num_hidden_layers):
        for expert in (None, *experts(config, layer)):
            parts = modules(config, layer, expert)
            needed += [module_name(config, layer, module.role, expert) for module in parts]
        needed += [f"{spec.name(role, layer)}.weight" for role in spec.norms]
    for name in needed:
        if not source.has(name):
            raise FormatError(f"tensor {name!r} is missing, but config.json requires it")


def check_numbers(source: Checkpoint) -> None:
    """Check every weight once.

    Raises FormatError for the first tensor with a NaN, an infinity, or a number too large for float16, the
    dtype of results.
    """
    for name in sorted(n for n in source.names() if n in source and source.info(n)[0] in FLOATS):
        flat, (damaged, large) = source.read(name).reshape(-1), BEYOND[source.info(name)[0]]
        bits = flat.view(np.uint32 if flat.dtype == np.float32 else np.uint16)
        # without the sign bit, integer order is the order of magnitude
        positive = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        for at in range(0, bits.size, CHECK_ROWS):
            largest = (bits[at : at + CHECK_ROWS] & positive).max()
            if largest >= damaged:
                raise FormatError(
                    f"{name!r} has a NaN or an infinity: the weights are damaged",
                    where=source.where(name),
                    remedy="download the model again",
                )
            if largest >= large:
                raise FormatError(
                    f"{name!r} has a number beyond 65504, the largest float16 number; results are stored in float16",
                    where=source.where(name),
                    remedy="use another upload of the model",
                )


def plan_text(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, sort_keys=True, default=str)
