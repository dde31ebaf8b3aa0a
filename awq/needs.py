"""What does a conversion need, and has this machine got it? So that it can be refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tinychat_mlx import limits
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sizes import calibration_tokens, disk_bytes, peaks, result_bytes
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.words import size


@dataclass(frozen=True)
class Needs:
    """peak_bytes of memory; disk while it runs, and in the end.

    Of the memory: layer_bytes are one decoder layer of float weights; layers_bytes the most held while layer after
    layer is done; own_text_bytes while the model, whole and at 8 bits, writes its own text (0: it does not).
    """

    peak_bytes: int
    disk_bytes: int
    result_bytes: int
    calibration_tokens: int = 0
    layer_bytes: int = 0
    layers_bytes: int = 0
    own_text_bytes: int = 0


def needs(config: ModelConfig, source: Checkpoint, settings: Settings) -> Needs:
    """What the conversion of a dense model takes."""
    held = peaks(config, source, settings)
    return Needs(
        held.most, disk_bytes(config, source, settings), result_bytes(config, source, settings),
        calibration_tokens(config, settings), held.layer, held.layers, held.own_text,
    )  # fmt: skip


def shortage(wanted: Needs, target: Path, kept: int = 0) -> str:
    """What this machine lacks for a conversion to `target`, or "". kept: bytes of it that are on the disk already."""
    if wanted.peak_bytes > (free := limits.available()):
        return f"the conversion needs {size(wanted.peak_bytes)} of memory, {size(free)} are free"
    if wanted.disk_bytes - kept > (room := limits.disk_free(target.parent)):
        return (
            f"the conversion needs {size(wanted.disk_bytes - kept)} more on the disk of {target.parent}, "
            f"which has {size(room)} free"
        )
    return ""


def smaller(config: ModelConfig, source: Checkpoint, settings: Settings) -> str:
    """How the same conversion would take less memory, or ""."""
    if settings.method == "rtn" or settings.calib != "self":
        return ""
    least = needs(config, source, replace(settings, calib="a file")).peak_bytes
    return (
        f"give --calib FILE (then {size(least)} do), "
        if least < 0.9 * needs(config, source, settings).peak_bytes
        else ""
    )
