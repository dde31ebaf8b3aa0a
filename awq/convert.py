"""Convert a model: from a dense folder to codes, or from one quantised format to another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_mlx import __version__
from tinychat_mlx.awq.configjson import model_config
from tinychat_mlx.awq.finish import card_text, merged, put_in_place, write_folder
from tinychat_mlx.awq.layer import SiteReport
from tinychat_mlx.awq.needs import Needs, needs, shortage, smaller
from tinychat_mlx.awq.record import window_of
from tinychat_mlx.awq.reformat import reformatted
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.awq.stream import Conversion, Ids, Progress, Watch, WorkFolder, shards
from tinychat_mlx.awq.target import check_target
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.errors import TinychatError
from tinychat_mlx.places import disk_bytes
from tinychat_mlx.tensorfile import Entry

Calibrate = Callable[[ModelConfig, Checkpoint, Callable[[], Backend], Settings, int, Watch], Ids]


@dataclass(frozen=True)
class Result:
    """What was written, and what was measured layer by layer (nothing with rtn or a change of format).

    ids: the calibration tokens, where there were any. moved: by how much of a step between codes a change of format
    moved a weight at most.
    """

    folder: Path
    nbytes: int
    layers: tuple[tuple[SiteReport, ...], ...] = ()
    ids: Ids | None = None
    moved: float | None = None


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
    finished = resume and target.exists() and work.is_renamed()  # and killed before the work folder was gone
    if not finished:
        check_target(source.folder, target, force)
        work.check(resume, force)
    if source.quantization.format != "dense":
        return _reformat(source, target, settings, work, resume, force, finished)
    config, settings = open_dense(source, settings)
    if not (finished or force):
        _check_room(needs(config, source, settings), smaller(config, source, settings), work)
    run = Conversion(source, config, settings, backend, work, window_of(config))
    runs_on = None if settings.method == "rtn" else run.backend.name
    work.begin(_plan(source, settings, runs_on), resume)
    if finished:
        return _done(work, Result(target, Checkpoint.open(target).nbytes))
    try:
        layers = run.run(
            lambda w: calibrate(config, source, lambda: backend(False), settings, run.window, w), watch
        )
    except TinychatError:
        if not work.calibration.exists() and not work.shard(0).exists():
            work.remove()  # there is nothing to go on from
        raise
    watch(Progress("finish", 1, 2, "writing"))
    done = model_config(source.config, settings, config, source)
    nbytes = _put(work, source, target, merged(shards(work, config.num_hidden_layers)), done, settings)
    ids = work.load(work.calibration) if work.calibration.exists() else None
    watch(Progress("finish", 2, 2))
    return _done(work, Result(target, nbytes, tuple(layers), ids))


def _check_room(wanted: Needs, smaller: str, work: WorkFolder) -> None:
    """Raises TinychatError where memory or disk do not suffice: it would die of that after hours."""
    if lacks := shortage(wanted, work.path, disk_bytes(work.path)):
        way = f"{smaller}close other programs" if "memory" in lacks else "make room, choose another disk"
        raise TinychatError(f"{lacks}: {way}, or try all the same: `tinychat convert --force`")


def _reformat(
    source: Checkpoint,
    target: Path,
    settings: Settings,
    work: WorkFolder,
    resume: bool,
    force: bool,
    finished: bool,
) -> Result:
    """The same codes in another format. It takes seconds: what is interrupted begins anew."""
    made = reformatted(source, settings.format)
    if not (finished or force):
        size = sum(tensor.nbytes for tensor in made.tensors)
        _check_room(Needs(0, size, size), "", work)
    work.begin(_plan(source, settings, None), resume)
    if finished:
        return _done(work, Result(target, Checkpoint.open(target).nbytes, moved=made.moved))
    try:
        nbytes = _put(work, source, target, made.tensors, made.config, settings)
    except (TinychatError, OSError, KeyboardInterrupt):
        work.remove()
        raise
    return _done(work, Result(target, nbytes, moved=made.moved))


def _plan(source: Checkpoint, settings: Settings, backend: str | None) -> dict[str, Any]:
    """What must be the same for an interrupted run to go on."""
    return settings.fingerprint(source) | {"backend": backend, "version": __version__}


def _put(
    work: WorkFolder,
    source: Checkpoint,
    target: Path,
    tensors: list[Entry],
    config: dict[str, Any],
    settings: Settings,
) -> int:
    """Write the folder and give it its name -> bytes of its weights. What a killed run left of it goes."""
    out = work.path / "out"
    work.renaming.unlink(missing_ok=True)  # before out goes: together they would say that it got its name
    shutil.rmtree(out, ignore_errors=True)
    write_folder(out, source, tensors, config, card_text(source, settings))
    put_in_place(out, target, work.path, work.renaming)
    return Checkpoint.open(target).nbytes


def _done(work: WorkFolder, result: Result) -> Result:
    work.remove()
    return result
