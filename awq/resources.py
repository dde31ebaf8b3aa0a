"""Compute the memory and disk space of a conversion and compare them with the machine, before work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sizes import calibration_tokens, disk_bytes, peaks, result_bytes
from tinychat_mlx.base import limits
from tinychat_mlx.base.wording import size
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion needs.

    peak_bytes: memory. disk_bytes: disk during the run. result_bytes: disk at the end. layer_bytes: float
    weights of one decoder layer. layers_bytes: peak of the layer-by-layer phase. own_text_bytes: memory of
    the whole model at 8 bits while it generates its calibration text (0 if it does not).
    """

    peak_bytes: int
    disk_bytes: int
    result_bytes: int
    calibration_tokens: int = 0
    layer_bytes: int = 0
    layers_bytes: int = 0
    own_text_bytes: int = 0


def needs(config: ModelConfig, source: Checkpoint, settings: Settings) -> Needs:
    """Return the memory and disk space that quantising a dense model needs."""
    held = peaks(config, source, settings)
    return Needs(
        held.most, disk_bytes(config, source, settings), result_bytes(config, source, settings),
        calibration_tokens(config, settings), held.layer, held.layers, held.own_text,
    )  # fmt: skip


def shortage(wanted: Needs, target: Path, kept: int = 0) -> str:
    """Describe what this machine lacks for a conversion to `target`, or "".

    `kept`: bytes already on the disk.
    """
    if wanted.peak_bytes > (free := limits.available()):
        return f"the conversion needs {size(wanted.peak_bytes)} of memory, {size(free)} are free"
    if wanted.disk_bytes - kept > (room := limits.disk_free(target.parent)):
        return (
            f"the conversion needs {size(wanted.disk_bytes - kept)} more on the disk of {target.parent}, "
            f"which has {size(room)} free"
        )
    return ""


def smaller(config: ModelConfig, source: Checkpoint, settings: Settings) -> str:
    """Suggest how the same conversion needs less memory, or ""."""
    if settings.method == "rtn" or settings.calib != "self":
        return ""
    least = needs(config, source, replace(settings, calib="a file")).peak_bytes
    return (
        f"give --calib FILE (needs {size(least)}), "
        if least < 0.9 * needs(config, source, settings).peak_bytes
        else ""
    )
