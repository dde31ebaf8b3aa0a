"""The conversion, layer by layer: one decoder layer of float weights in memory, each finished one on disk.

A work folder beside the target holds the plan, the calibration tokens, the rows that enter the next layer,
and a shard for each finished layer; every file appears whole or not at all. So a killed run goes on where
it stopped and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.experts import Mixture, add_experts, round_experts
from tinychat_mlx.awq.head import Head, head_form, head_moments, is_site
from tinychat_mlx.awq.layer import (
    Moments,
    QuantizedLayer,
    SiteReport,
    empty_moments,
    quantize_layer,
    round_layer,
)
from tinychat_mlx.awq.moments import FullMoments
from tinychat_mlx.awq.record import LayerRun, Recorder, Routing, embedded_rows, steps
from tinychat_mlx.awq.settings import Settings, plan_text
from tinychat_mlx.awq.sites import LayerWeights
from tinychat_mlx.awq.tensors import layer_entries, rim_entries
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.errors import TinychatError, UsageError
from tinychat_mlx.shards import write_json
from tinychat_mlx.tensorfile import Entry, replacing, write
from tinychat_mlx.weight import F32

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Progress:
    """Said when a phase moves on: calibrate, layers, finish. layer: what was measured at the layer just done."""

    phase: str
    done: int
    total: int
    note: str = ""
    layer: tuple[SiteReport, ...] = ()


Watch = Callable[[Progress], None]


class WorkFolder:
    """What is kept between runs. Files are written beside their place and renamed into it."""

    def __init__(self, target: Path) -> None:
        self.path = target.parent / f".{target.name}.converting"
        self.calibration = self.path / "calibration.npy"
        self.renaming = self.path / "renaming"  # from here on the target may be the finished folder

    def check(self, resume: bool, force: bool) -> None:
        """Raises UsageError where an interrupted conversion would be lost unasked."""
        if self.path.exists() and not (resume or force) and any(self.path.iterdir()):
            raise UsageError(
                f"{self.path} holds an interrupted conversion: add --resume to finish it, --force to begin anew"
            )

    def begin(self, plan: dict[str, Any], resume: bool) -> None:
        """Make the folder, or go on in it if what lies there is the same conversion. Raises TinychatError."""
        text, file = plan_text(plan), self.path / "plan.json"
        try:
            if not resume and self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            found = file.read_text(encoding="utf-8") if file.exists() else text
        except OSError as error:
            raise TinychatError(
                f"{self.path}: cannot be made: {error.strerror or error} — remove it, or choose another place"
            ) from None
        if found != text:
            raise UsageError(
                f"{self.path} was begun with other settings, another model, backend or version: "
                "repeat the first command exactly, or leave out --resume and add --force"
            )
        with replacing(file) as f:
            f.write(text.encode())

    def is_renamed(self) -> bool:
        """Whether the finished folder has got its name."""
        return self.renaming.exists() and not (self.path / "out").exists()

    def shard(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.safetensors"

    def report(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.json"

    def rows(self, layer: int) -> Path:
        return self.path / f"rows-{layer:04}.npy"

    def save(self, path: Path, array: npt.NDArray[Any]) -> None:
        with replacing(path) as file:
            np.save(file, array, allow_pickle=False)

    def load(self, path: Path) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        return array

    def finished(self, layers: int, with_rows: bool, with_head: bool) -> int:
        """-> how many layers need not be done again; the head's number follows theirs."""
        steps, done = layers + with_head, 0
        while done < steps and self.shard(done).exists() and self.report(done).exists():
            done += 1
        while with_rows and 0 < done < steps and not self.rows(done).exists():
            done -= 1
        return done

    def remove(self) -> None:
        """The file that says that all is done goes last."""
        for path in [p for p in self.path.glob("*") if p != self.renaming]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def observe(run: LayerRun, moments: Mapping[str, Moments], x: F32) -> F32:
    """Run one step's rows through a float layer and add up its sites' moments -> what leaves it.

    x (1, T, C): the float model's rows, all that the published algorithm looks at. (2, T, C), for awq+: also what
    the quantised layers before this one make of them, so that this one makes good for those (GPTAQ, Li et al. 2025).
    Where the layer has experts, what leaves it lacks them, and run.routings grows by one for each of the two.
    """
    if len(x) == 1:
        return run.forward(x[0], lambda key, a: moments[key].add(a))
    wanted: dict[str, F32] = {}
    y = run.forward(x[0], wanted.__setitem__)

    def seen(key: str, a: F32) -> None:
        m = moments[key]
        assert isinstance(m, FullMoments)
        m.add(a, wanted.pop(key))

    run.all_inputs(x[1], seen)
    return y


@dataclass
class Conversion:
    """A dense model on its way into codes."""

    source: Checkpoint
    config: ModelConfig
    settings: Settings
    make: Callable[[bool], Backend]  # exact? -> a device
    work: WorkFolder
    window: int

    @cached_property
    def backend(self) -> Backend:
        """Runs the float model."""
        return self.make(True)

    @cached_property
    def running(self) -> Backend:
        """Runs what has become codes, as it will run."""
        return self.make(False)

    def run(self, calibration: Callable[[Watch], Ids], watch: Watch) -> list[tuple[SiteReport, ...]]:
        """Quantise all layers into the work folder -> what was measured, layer by layer, the head's last."""
        config, layers = self.config, self.config.num_hidden_layers
        needs_rows, head = self.settings.method != "rtn", is_site(self.config, self.source, self.settings)
        steps = layers + head
        done = self.work.finished(layers, needs_rows, head)
        x = self._first_rows(calibration, watch, done) if needs_rows and done < steps else None
        reports = [_read_report(self.work.report(i)) for i in range(done)]
        for i, report in enumerate(reports):
            watch(Progress("layers", min(i + 1, layers), layers, "kept", report))
        watch(Progress("layers", min(done, layers), layers))
        for layer in range(done, layers):
            weights = LayerWeights.read(config, layer, self.source)
            quantized = self._rounded(weights) if x is None else self._quantized(weights, x)
            if x is not None and layer + 1 < steps:
                if layer + 1 == layers:
                    x = x[:1]  # the head looks at the float model's rows alone
                elif len(x) == 2:
                    self._through(quantized, x[1])
                self.work.save(self.work.rows(layer + 1), x)
            self._keep(layer, quantized.reports, layer_entries(quantized, self.settings.format))
            reports.append(quantized.reports)
            del weights, quantized
            watch(Progress("layers", layer + 1, layers, "", reports[-1]))
        if head and done < steps:
            assert x is not None
            reports.append(self._head(x[0], watch))
            watch(Progress("layers", layers, layers, "", reports[-1]))
        self._rim(watch, head)
        return reports

    def _keep(self, step: int, report: tuple[SiteReport, ...], tensors: Iterable[Entry]) -> None:
        """What a layer, or the head, has become; the rows that entered it go."""
        write_json(self.work.report(step), {"sites": [asdict(r) for r in report]})
        write(self.work.shard(step), tensors, {"format": "mlx"})
        self.work.rows(step).unlink(missing_ok=True)

    def _head(self, x: F32, watch: Watch) -> tuple[SiteReport, ...]:
        """Quantise a head of its own, and the final norm with it, by the rows x (T, C) that reach them."""
        config, source, form = self.config, self.source, head_form(self.settings)
        moments = head_moments(config, source, self.backend, x, form, self.settings.method)
        head = Head.chosen_by(config, source, moments, form, self.settings.compare)
        tensors = head.entries(lambda done, total: watch(Progress("head", done, total)))
        self._keep(config.num_hidden_layers, (head.report,), tensors)
        return (head.report,)

    def _first_rows(self, calibration: Callable[[Watch], Ids], watch: Watch, done: int) -> F32:
        """The rows (streams, T, C) that enter the first unfinished layer; see `_record`."""
        tokens = self.work.calibration
        if not tokens.exists():
            self.work.save(tokens, calibration(watch))
        if done:
            return np.asarray(self.work.load(self.work.rows(done)), np.float32)
        ids = self.work.load(tokens)
        x = embedded_rows(self.config, self.source, self.backend, ids, self.window)
        return np.stack([x] * (2 if self.settings.method == "awq+" else 1))

    def _rounded(self, weights: LayerWeights) -> QuantizedLayer:
        form = self.settings.form
        return replace(round_layer(weights, form), experts=round_experts(weights, self.source, form))

    def _quantized(self, weights: LayerWeights, x: F32) -> QuantizedLayer:
        """Run the rows x (streams, T, C) through a float layer and quantise it. x[0] leaves it in its place."""
        form, compare = self.settings.form, self.settings.compare
        moments, routed = self._record(weights, x)
        mixture = None
        if routed:
            experts = Mixture(weights, self.source, Recorder(self.backend), routed, form)
            mixture = experts.quantize(moments.pop("mlp_in"), compare, x[0])
            weights = mixture[0]
            del experts, routed
        if not np.isfinite(x[0]).all():
            raise TinychatError(
                f"layer {weights.layer}: its output is not finite on the calibration text: the weights overflow — take another upload of the model"
            )
        layer = quantize_layer(weights, moments, form, compare)
        if mixture is None:
            return layer
        return replace(layer, experts=mixture[1], reports=layer.reports + mixture[2])

    def _record(self, weights: LayerWeights, x: F32) -> tuple[dict[str, Moments], list[Routing]]:
        """Run the rows through a float layer -> its sites' moments, and what comes to its experts from each stream.

        x[0] leaves in its place (without the experts' share), x[1] later.
        """
        moments = empty_moments(self.settings.method, weights, self.settings.group_size)
        run = LayerRun(self.config, weights.layer, weights, Recorder(self.backend), self.window)
        for rows in steps(x.shape[1], self.window):
            x[0, rows] = observe(run, moments, x[:, rows])
        streams = len(x) if run.routings else 0
        return moments, [Routing.joined(run.routings[i::streams]) for i in range(streams)]

    def _through(self, layer: QuantizedLayer, x: F32) -> None:
        """Run the rows x (T, C) through a quantised layer, in their place."""
        device = Recorder(self.running)
        run = LayerRun(self.config, layer.weights.layer, layer, device, self.window)
        for rows in steps(len(x), self.window):
            x[rows] = run.forward(x[rows])
        if run.routings:
            add_experts(layer, Routing.joined(run.routings), device, x)

    def _rim(self, watch: Watch, head_done: bool) -> None:
        path = self.work.path / "rim.safetensors"
        if not path.exists():
            watch(Progress("finish", 0, 2, "embedding and head"))
            bits, size = self.settings.head_bits, self.settings.group_size
            tensors = rim_entries(self.config, self.source, bits, size, not head_done)
            write(path, tensors, {"format": "mlx"})


def _read_report(path: Path) -> tuple[SiteReport, ...]:
    found = json.loads(path.read_text(encoding="utf-8"))["sites"]
    return tuple(SiteReport(**{**site, "roles": tuple(site["roles"])}) for site in found)


def shards(work: WorkFolder, layers: int) -> Iterator[Path]:
    """The finished files, in the order in which a model is read."""
    yield work.path / "rim.safetensors"
    for layer in range(layers):
        yield work.shard(layer)
    if work.shard(layers).exists():  # the head, where it was more than rounded
        yield work.shard(layers)
