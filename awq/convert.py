"""Convert a model: quantise a dense folder, or rewrite a quantised one in another format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinychat_mlx import __version__
from tinychat_mlx.awq.calibration.recorder import window_of
from tinychat_mlx.awq.calibration.rows import Split
from tinychat_mlx.awq.layer import LayerReport
from tinychat_mlx.awq.layer_stream import Conversion, Ids, Progress, Watch
from tinychat_mlx.awq.output.config_json import model_config
from tinychat_mlx.awq.output.finish import card_text, merged, put_in_place, write_folder
from tinychat_mlx.awq.output.reformat import reformatted
from tinychat_mlx.awq.output_path import check_target
from tinychat_mlx.awq.parallel import limited
from tinychat_mlx.awq.quality.verdict import Rejected, Verdict, verdict, went_wrong
from tinychat_mlx.awq.resources import Needs, needs, shortage, smaller
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.awq.work_folder import WorkFolder, load, save
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.base.paths import disk_bytes
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import Entry

Calibrate = Callable[[ModelConfig, Checkpoint, Callable[[], Backend], Settings, int, Watch], Ids]


FALLBACKS = ("awq", "rtn")  # methods to try in this order when one loses more than plain rounding (rtn)


@dataclass(frozen=True)
class Result:
    """The outcome of a conversion.

    settings: the settings, with the method and group size that were used. layers: measurements per layer.
    verdict: the quality loss, if the method ran the model. rejected: methods that lost more than plain
    rounding. ids: the calibration tokens, if any. moved: the largest change of a weight through a change of
    format, as a fraction of a quantisation step.
    """

    folder: Path
    nbytes: int
    settings: Settings
    layers: tuple[LayerReport, ...] = ()
    verdict: Verdict | None = None
    rejected: tuple[Rejected, ...] = ()
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
    """Convert `source` to `target`. All checks run first. The target appears only with the final rename.

    A method that loses more than plain rounding is replaced by the next one of FALLBACKS. `backend(exact)`
    returns a device; it is called only if the method runs the model. Raises TinychatError with a remedy.
    """
    work = WorkFolder(target)
    # the run was killed after the rename and before it removed the work folder
    finished = resume and target.exists() and work.is_renamed()
    if not finished:
        check_target(source.folder, target, force)
        work.check(resume, force)
    if source.quantization.format != "dense":
        return _reformat(source, target, settings, work, resume, force, finished)
    config, settings = open_dense(source, settings)
    if not (finished or force):
        _check_room(needs(config, source, settings), smaller(config, source, settings), work)
    devices = _Devices(backend)
    runs_on = None if settings.method == "rtn" else devices(True).name
    work.begin(_plan(source, settings, runs_on), resume)
    if finished:
        return _done(work, Result(target, Checkpoint.open(target).nbytes, settings))

    def tokens() -> Ids:
        if not work.calibration.exists():
            window = window_of(config)
            save(work.calibration, calibrate(config, source, lambda: devices(False), settings, window, watch))
        return load(work.calibration)

    try:
        with limited(None):  # the caller's number of threads, and one for BLAS: sums have one order
            result = _attempts(source, config, target, settings, devices, work, tokens, watch)
    except TinychatError:
        if work.is_empty():
            work.remove()
        raise
    return _done(work, result)


class _Devices:
    """Cache of backends: creates each at most once."""

    def __init__(self, make: Callable[[bool], Backend]) -> None:
        self.make, self.made = make, dict[bool, Backend]()

    def __call__(self, exact: bool) -> Backend:
        if exact not in self.made:
            self.made[exact] = self.make(exact)
        return self.made[exact]


def _attempts(
    source: Checkpoint,
    config: ModelConfig,
    target: Path,
    settings: Settings,
    devices: _Devices,
    work: WorkFolder,
    tokens: Callable[[], Ids],
    watch: Watch,
) -> Result:
    """Convert with the requested method. If it loses more than plain rounding, try each of FALLBACKS."""
    rejected: list[Rejected] = []
    while True:
        files = work.files(settings.method if rejected else "")
        run = Conversion(source, config, settings, devices, files, window_of(config))
        layers = run.run(tokens, watch)
        watch(Progress("finish", 1, 2, "writing"))
        done = model_config(source.config, settings, config, source)
        tensors = merged(files.shards(config.num_hidden_layers))
        out = _write(work, source, tensors, done, settings, rejected)
        found = None
        if files.judged.exists():
            ids, rows = tokens(), load(files.judged)
            split = Split.of(len(ids), window_of(config))
            made = Checkpoint.open(out)
            found = verdict(config, source, made, devices(True), devices(False), ids, split, rows)
            if not found.passed:
                rejected.append(Rejected(settings.method, found, went_wrong(layers)))
                after = (
                    FALLBACKS[FALLBACKS.index(settings.method) + 1 :]
                    if settings.method in FALLBACKS
                    else FALLBACKS
                )
                settings = replace(settings, method=after[0])
                watch(Progress("layers", 0, 1, f"{rejected[-1].text()}; trying {settings.method}"))
                continue
        nbytes = _put(work, out, target)
        ids_used = load(work.calibration) if work.calibration.exists() else None
        watch(Progress("finish", 2, 2))
        return Result(target, nbytes, settings, tuple(layers), found, tuple(rejected), ids_used)


def _check_room(wanted: Needs, smaller: str, work: WorkFolder) -> None:
    """Raise TinychatError if memory or disk space is too small.

    Otherwise the run fails after hours of work.
    """
    if lacks := shortage(wanted, work.path, disk_bytes(work.path)):
        way = (
            f"{smaller}close other programs" if "memory" in lacks else "free disk space, choose another disk"
        )
        raise TinychatError(lacks, remedy=f"{way}, or try anyway: `tinychat convert --force`")


def _reformat(
    source: Checkpoint,
    target: Path,
    settings: Settings,
    work: WorkFolder,
    resume: bool,
    force: bool,
    finished: bool,
) -> Result:
    """Write the same codes in another format.

    This takes seconds, so an interrupted run starts from the beginning.
    """
    made = reformatted(source, settings.format)
    if not (finished or force):
        size = sum(tensor.nbytes for tensor in made.tensors)
        _check_room(Needs(0, size, size), "", work)
    work.begin(_plan(source, settings, None), resume)
    if finished:
        return _done(work, Result(target, Checkpoint.open(target).nbytes, settings, moved=made.moved))
    try:
        nbytes = _put(work, _write(work, source, made.tensors, made.config, settings), target)
    except (TinychatError, OSError, KeyboardInterrupt):
        work.remove()
        raise
    return _done(work, Result(target, nbytes, settings, moved=made.moved))


def _plan(source: Checkpoint, settings: Settings, backend: str | None) -> dict[str, Any]:
    """The settings that must be equal for an interrupted run to resume."""
    return settings.fingerprint(source) | {"backend": backend, "version": __version__}


def _write(
    work: WorkFolder,
    source: Checkpoint,
    tensors: list[Entry],
    config: dict[str, Any],
    settings: Settings,
    rejected: Sequence[Rejected] = (),
) -> Path:
    """Write the finished folder inside the work folder. Replaces what an interrupted run left there."""
    out = work.path / "out"
    # remove the marker before `out`: a marker without `out` means that the rename is done
    work.renaming.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    write_folder(out, source, tensors, config, card_text(source, settings, rejected))
    return out


def _put(work: WorkFolder, out: Path, target: Path) -> int:
    """Rename the folder to its final name. Returns the size of its weights in bytes."""
    put_in_place(out, target, work.path, work.renaming)
    return Checkpoint.open(target).nbytes


def _done(work: WorkFolder, result: Result) -> Result:
    work.remove()
    return result
