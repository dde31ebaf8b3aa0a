"""What a conversion is asked to do, and everything that can be refused before a byte is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat_mlx.awq.layer import METHODS, Form
from tinychat_mlx.awq.sites import modules, shapes, sites
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig, parse_config
from tinychat_mlx.decoder import Source
from tinychat_mlx.errors import ConfigError, FormatError, UsageError
from tinychat_mlx.formats.stored import FLOATS
from tinychat_mlx.weight import to_float32

HEADS = {"int8": 8, "int4": 4, "fp16": 16}
FORMATS = ("mlx", "awq")
WINDOW = 512  # tokens of a calibration conversation, at most
CHECK_ROWS = 1 << 22  # numbers looked at at once for NaN


@dataclass(frozen=True)
class Settings:
    """One conversion. calib: "self", a file, or a hub id; tokens 0: chosen by the model's size."""

    method: str = "awq+"
    w_bit: int = 4
    group_size: int = 128
    format: str = "mlx"
    head: str = "int8"
    calib: str = "self"
    tokens: int = 0
    seed: int = 0
    compare: bool = False  # measure the published algorithm beside awq+, for the report

    def __post_init__(self) -> None:
        """Raises UsageError."""
        allowed: dict[str, tuple[Any, ...]] = {
            "method": METHODS, "w_bit": (3, 4, 8), "group_size": (32, 64, 128), "format": FORMATS, "head": tuple(HEADS),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise UsageError(f"{name} is {getattr(self, name)!r}; known are {known}")
        if self.format == "awq" and self.w_bit != 4:
            raise UsageError(f"the AutoAWQ format holds 4 bits, not {self.w_bit}: use --format mlx")

    @property
    def form(self) -> Form:
        return Form(self.w_bit, self.group_size)

    @property
    def head_bits(self) -> int:
        """Bits of embedding and head; the AutoAWQ format keeps them in 16."""
        return 16 if self.format == "awq" else HEADS[self.head]

    def fingerprint(self, source: Checkpoint) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on: the settings, and the files read."""
        files = sorted(source.folder.glob("*.safetensors"))
        sizes = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        calib = Path(self.calib)
        text = hashlib.sha256(calib.read_bytes()).hexdigest() if calib.is_file() else self.calib
        return {"settings": asdict(self), "config": source.config, "files": sizes, "calibration": text}


def default_tokens(config: ModelConfig) -> int:
    """Calibration tokens: many where a forward pass is cheap; 8192 give every channel of a large model its due."""
    size = sum(n * k for n, k in shapes(config).values()) * config.num_hidden_layers
    return 32768 if size < 100e6 else 8192


def open_dense(source: Checkpoint, settings: Settings) -> ModelConfig:
    """Check a dense checkpoint against the settings -> its config. Raises ConfigError or FormatError."""
    config = parse_config(source.config)
    sites(config)
    for module in modules(config):
        parts = [shapes(config)[part] for part in module.parts]
        n, k = sum(p[0] for p in parts), parts[0][1]
        name = config.spec.name(module.role, 0)
        if k % settings.group_size:
            fits = [str(g) for g in (128, 64, 32) if k % g == 0]
            hint = f"use --group-size {fits[0]}" if fits else "it cannot be stored in groups of 32, 64 or 128"
            raise FormatError(
                f"{name}: {k} inputs are no multiple of the group size {settings.group_size}: {hint}"
            )
        if settings.format == "awq" and n % 8:
            raise FormatError(
                f"{name}: {n} outputs are no multiple of 8, which AutoAWQ needs: use --format mlx"
            )
    if settings.head_bits < 16 and config.hidden_size % 32:
        raise FormatError(f"hidden_size {config.hidden_size} is no multiple of 32: use --head fp16")
    check_complete(config, source)
    check_finite(source)
    return config


def check_complete(config: ModelConfig, source: Source) -> None:
    """Find every tensor the graph needs, without reading it. Raises FormatError naming the first missing."""
    spec = config.spec
    needed = [spec.name("embed"), f"{spec.name('final_norm')}.weight"]
    for layer in range(config.num_hidden_layers):
        needed += [spec.name(module.role, layer) for module in modules(config)]
        needed += [f"{spec.name(role, layer)}.weight" for role in spec.norms]
    for name in needed:
        if not source.has(name):
            raise FormatError(f"no tensor {name!r}, which config.json asks for — is the model complete?")


def check_finite(source: Checkpoint) -> None:
    """Look at every weight once. Raises FormatError naming the first tensor with a NaN or an infinity."""
    for name in sorted(n for n in source.names() if n in source and source.info(n)[0] in FLOATS):
        flat = source.read(name).reshape(-1)
        for at in range(0, flat.size, CHECK_ROWS):
            piece = flat[at : at + CHECK_ROWS]
            if not np.isfinite(to_float32(piece) if piece.dtype == np.uint16 else piece).all():
                raise FormatError(
                    f"{source.where(name)}: {name!r} holds a NaN or an infinity — "
                    "the weights are damaged: download the model again"
                )


def plan_text(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, sort_keys=True, default=str)


def refuse_quantised(source: Checkpoint) -> None:
    if source.quantization.format != "dense":
        raise ConfigError(
            f"{source.folder}: already quantised ({source.quantization.describe()}): it can only change its format"
        )
