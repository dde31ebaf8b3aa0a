"""Convert a model: from a dense folder to codes, or from one quantised format to another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinychat_mlx.awq.finish import (
    RENAMING,
    card_text,
    merged,
    model_config,
    put_in_place,
    write_folder,
)
from tinychat_mlx.awq.layer import SiteReport
from tinychat_mlx.awq.needs import needs, shortage, smaller
from tinychat_mlx.awq.reformat import reformatted, reformatted_config
from tinychat_mlx.awq.settings import FORMATS, WINDOW, Settings, open_dense
from tinychat_mlx.awq.stream import Conversion, Ids, Progress, Watch, WorkFolder, shards
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig, parse_config
from tinychat_mlx.errors import TinychatError, UsageError
from tinychat_mlx.limits import disk_free
from tinychat_mlx.places import disk_bytes
from tinychat_mlx.words import size

Calibrate = Callable[[ModelConfig, Checkpoint, Callable[[], Backend], Settings, int, Watch], Ids]


@dataclass(frozen=True)
class Result:
    """What was written, and what was measured layer by layer (nothing with rtn or a change of format)."""

    folder: Path
    nbytes: int
    layers: tuple[tuple[SiteReport, ...], ...]


def convert(
    source: Checkpoint,
    target: Path,
    settings: Settings,
    backend: Callable[[bool], Backend],
    calibrate: Calibrate,
    watch: Watch = lambda p: None,
    resume: bool = False,
    force: bool = False,
) -> Result:
    """Write `target`. Everything is checked first; until the last rename nothing is there.

    backend: exact? -> a device; made only if the method runs the model. Raises a TinychatError that says what to do.
    """
    work = WorkFolder(target)
    if resume and _is_finished(target, work):
        work.remove()
        return Result(target, Checkpoint.open(target).nbytes, ())
    check_target(target, resume, force)
    if source.quantization.format != "dense":
        return _reformat(source, target, settings, work, resume, force)
    config = open_dense(source, settings)
    if not force:
        _check_room(config, source, settings, target, work)
    work.begin(settings.fingerprint(source), resume, force)
    window = min(WINDOW, config.max_position_embeddings)
    run = Conversion(source, config, settings, backend, work, window)
    try:
        layers = run.run(
            lambda w: calibrate(config, source, lambda: backend(False), settings, window, w), watch
        )
    except TinychatError:
        if not (work.path / "calibration.npy").exists() and not work.shard(0).exists():
            work.remove()  # there is nothing to go on from
        raise
    watch(Progress("finish", 1, 2, "writing"))
    out = _fresh(work)
    done = model_config(source.config, settings, config, source)
    tensors = merged(shards(work, config.num_hidden_layers))
    write_folder(out, source, tensors, done, card_text(source, settings))
    put_in_place(out, target, work.path)
    work.remove()
    watch(Progress("finish", 2, 2))
    return Result(target, Checkpoint.open(target).nbytes, tuple(layers))


def _is_finished(target: Path, work: WorkFolder) -> bool:
    """Whether a run was killed between the last rename and the clean-up."""
    return target.exists() and (work.path / RENAMING).exists() and not (work.path / "out").exists()


def check_target(target: Path, resume: bool, force: bool) -> None:
    """Raises UsageError if nothing may be written there."""
    if target.exists() and not force and not (resume and _is_finished(target, WorkFolder(target))):
        raise UsageError(f"{target} exists: choose another name, or add --force to replace it")
    if not target.parent.is_dir():
        if os.path.lexists(target.parent):
            raise UsageError(f"{target.parent} is a file, not a folder: choose another place")
        raise UsageError(f"{target.parent} is no folder: make it first")


def _check_room(
    config: ModelConfig, source: Checkpoint, settings: Settings, target: Path, work: WorkFolder
) -> None:
    """Raises TinychatError where memory or disk do not suffice: it would die of that after hours."""
    if lacks := shortage(needs(config, source, settings), target, disk_bytes(work.path)):
        way = f"{smaller(config, source, settings)}close other programs" if "memory" in lacks else "make room"
        raise TinychatError(f"{lacks}: {way}, or try all the same: `tinychat convert --force`")


def _reformat(
    source: Checkpoint, target: Path, settings: Settings, work: WorkFolder, resume: bool, force: bool
) -> Result:
    """The same codes in another format."""
    if source.quantization.format.partition("-gemm")[0] == settings.format:
        other = next(f for f in FORMATS if f != settings.format)
        raise UsageError(
            f"{source.folder} is {source.quantization.describe()} already, in the {settings.format} format: use it as it "
            f"is, convert the model that it was made of, or change its format with --format {other}"
        )
    spec = parse_config(source.config).spec
    head = spec.name("head")
    config = reformatted_config(source, settings.format, head)
    if not force and source.nbytes > (room := disk_free(target.parent)):
        raise TinychatError(
            f"{target} needs {size(source.nbytes)} on a disk that has {size(room)} free: make room, or choose another"
        )
    work.begin(settings.fingerprint(source), resume, force)
    out = _fresh(work)
    tensors = list(reformatted(source, settings.format, frozenset({spec.name("embed"), head})))
    write_folder(out, source, tensors, config, card_text(source, settings))
    put_in_place(out, target, work.path)
    work.remove()
    return Result(target, Checkpoint.open(target).nbytes, ())


def _fresh(work: WorkFolder) -> Path:
    """The folder in which the result is put together; what a killed run left there goes."""
    out = work.path / "out"
    shutil.rmtree(out, ignore_errors=True)
    return out
