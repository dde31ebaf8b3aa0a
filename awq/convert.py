"""Convert a model: from a dense folder to codes, or from one quantised format to another."""

from __future__ import annotations

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
from tinychat_mlx.awq.record import window_of
from tinychat_mlx.awq.reformat import reformatted, reformatted_config
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.awq.stream import Conversion, Ids, Progress, Watch, WorkFolder, shards
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig, parse_config
from tinychat_mlx.errors import TinychatError, UsageError

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
    if resume and target.exists() and (work.path / RENAMING).exists() and not (work.path / "out").exists():
        work.remove()  # killed between the last rename and the clean-up: it is finished
        return Result(target, Checkpoint.open(target).nbytes, ())
    if target.exists() and not force:
        raise UsageError(f"{target} exists: choose another name, or add --force to replace it")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder: make it first")
    if source.quantization.format != "dense":
        return _reformat(source, target, settings, work, resume, force)
    config = open_dense(source, settings)
    work.begin(settings.fingerprint(source), resume, force)
    window = window_of(config)
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


def _reformat(
    source: Checkpoint, target: Path, settings: Settings, work: WorkFolder, resume: bool, force: bool
) -> Result:
    """The same codes in another format."""
    spec = parse_config(source.config).spec
    head = spec.name("head")
    config = reformatted_config(source, settings.format, head)
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
