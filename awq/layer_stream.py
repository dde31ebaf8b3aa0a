"""Run a conversion layer by layer: one decoder layer of float weights in memory, each finished layer on disk.

The work folder contains the plan, the calibration tokens, the rows that enter the next layer, and a shard per
finished layer (see work_folder.py). An interrupted run resumes where it stopped and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.calibration.recorder import LayerRun, Recorder, Routing, embedded_rows, steps
from tinychat_mlx.awq.calibration.rows import HalfRows, Split, Streams, distance
from tinychat_mlx.awq.experts import Mixture, add_experts, round_experts
from tinychat_mlx.awq.head import Head, head_form, head_inputs, is_site
from tinychat_mlx.awq.layer import (
    Factored,
    Form,
    Held,
    LayerReport,
    Moments,
    QuantizedLayer,
    Scales,
    SiteReport,
    dense_sites,
    feed_site,
    quantize_published,
    round_layer,
    scale_layer,
)
from tinychat_mlx.awq.output.tensors import layer_entries, rim_entries
from tinychat_mlx.awq.parallel import trim
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sites import LayerWeights, Site, sites
from tinychat_mlx.awq.work_folder import LayerFiles, load, save
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import Entry, write
from tinychat_mlx.weights.weight import F32

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Progress:
    """Reported when a phase (calibrate, layers, head, finish) advances. layer: report of the finished layer."""

    phase: str
    done: int
    total: int
    note: str = ""
    layer: LayerReport | None = None


Watch = Callable[[Progress], None]


class Stopwatch:
    """Seconds spent inside `running`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


@dataclass
class LayerQuantizer:
    """Quantises one decoder layer and runs the calibration rows through it.

    awq uses only the float model's rows. awq+ proceeds site by site: each site is quantised for the outputs
    of the quantised sites and layers before it, so that no error is corrected twice.
    """

    source: Checkpoint
    config: ModelConfig
    settings: Settings
    split: Split
    backend: Backend  # runs float weights
    running: Backend  # runs codes, with the settings of a later run
    rows_s: Stopwatch = field(default_factory=Stopwatch)  # of the work that grows with the number of rows

    @property
    def form(self) -> Form:
        return self.settings.form

    def run(self, weights: LayerWeights, x: Streams) -> tuple[QuantizedLayer, LayerReport]:
        """Quantise a layer. Replaces the rows x by the layer's outputs."""
        rounded = self._rounded(weights)
        with self.rows_s.running():
            self._through(rounded, x.rounded)
        del rounded
        layer = self._fed(weights, x) if self.settings.method == "awq+" else self._published(weights, x)
        trim()
        if not np.isfinite(x.wanted).all():
            raise TinychatError(
                "its output is not finite on the calibration text: the weights overflow",
                where=f"layer {weights.layer}",
                remedy="use another upload of the model",
            )
        with self.rows_s.running():
            self._through(layer, x.made)
        wanted, made, rounded_rows = x.judged(self.split)
        report = LayerReport(layer.reports, distance(wanted, made), distance(wanted, rounded_rows))
        return layer, report

    def _rounded(self, weights: LayerWeights) -> QuantizedLayer:
        return rounded_layer(weights, self.source, self.form)

    def _published(self, weights: LayerWeights, x: Streams) -> QuantizedLayer:
        size = self.form.group_size
        moments = {s.key: BlockMoments.empty(self._inputs(weights, s), size) for s in self._recorded(weights)}
        held: dict[str, list[F32]] = {key: [] for key in moments}

        def seen(key: str, rows: slice, a: F32) -> None:
            fit, out = self.split.of_step(rows)
            if fit.stop:
                moments[key].add(a[fit])
            held[key].append(a[out].copy())

        routed = self._float_pass(weights, x, set(moments), seen)
        judged = {key: Held(*[np.concatenate(parts)] * 2) for key, parts in held.items()}
        if not routed:
            return quantize_published(weights, moments, judged, self.form)
        weights, codes, reports = self._mixture(weights, routed, routed, moments.pop("mlp_in"), x)
        layer = quantize_published(weights, moments, judged, self.form)
        return replace(layer, experts=codes, reports=layer.reports + reports)

    def _fed(self, weights: LayerWeights, x: Streams) -> QuantizedLayer:
        dense = dense_sites(weights)
        moments = {s.key: FullMoments.empty(self._inputs(weights, s)) for s in dense}
        inputs = {s.key: HalfRows.empty(self.split.seen, self._inputs(weights, s)) for s in dense}

        def seen(key: str, rows: slice, a: F32) -> None:
            fit, out = self.split.of_step(rows)
            if fit.stop:
                moments[key].add(a[fit])
            inputs[key].put(rows.start, a[: out.stop])

        wanted = self._float_pass(weights, x, set(moments), seen)
        weights, scales = scale_layer(weights, moments, self.form)
        layer = QuantizedLayer(weights, {}, ())
        for site in dense:
            trim()
            layer = self._fed_site(layer, site, scales, inputs.pop(site.key), x.made)
        if not wanted:
            return layer
        moments_in = FullMoments.empty(self.config.hidden_size)
        given = self._routed(layer, x.made, moments_in)
        weights, codes, reports = self._mixture(layer.weights, wanted, given, moments_in, x)
        return replace(layer, weights=weights, experts=codes, reports=layer.reports + reports)

    def _fed_site(
        self, layer: QuantizedLayer, site: Site, scales: Scales, inputs: HalfRows, made: F32
    ) -> QuantizedLayer:
        """Quantise the next site of a layer whose earlier sites are codes.

        inputs: the site's inputs in the float model, before scales were folded. made (T, C): the quantised
        stream's rows that enter the layer.
        """
        moments = FullMoments.empty(inputs.width, layer.weights.stacked(site))
        s, alpha = scales[site.key]
        run, held = self._ready(layer, self.running), []
        with self.rows_s.running():
            for rows in steps(self.split.seen, self.split.window):
                given, wanted = run.input_of(site.key, made[rows]), inputs.take(rows, s)
                fit, out = self.split.of_step(rows)
                if fit.stop:
                    moments.add(given[fit], wanted[fit])
                if out.start < out.stop:
                    held.append((given[out].copy(), wanted[out].copy()))
        del run, given, wanted
        rows_held = Held(*(np.concatenate(part) for part in zip(*held, strict=True)))
        trim()
        factored = Factored.of(moments, self.form)
        kept, report = feed_site(layer.weights, site, moments, factored, rows_held, self.form, s, alpha)
        return replace(layer, parts=layer.parts | kept.parts, reports=(*layer.reports, report))

    def _float_pass(
        self, weights: LayerWeights, x: Streams, keys: set[str], seen: Callable[[str, slice, F32], None]
    ) -> list[Routing]:
        """Run the float rows through a float layer in place, without the experts' output.

        seen(key, rows, input) is called at each site in `keys`. Returns the routing of a mixture.
        """
        run = self._ready(weights, self.backend)
        with self.rows_s.running():
            for rows in steps(self.split.tokens, self.split.window):

                def show(key: str, a: F32, rows: slice = rows) -> None:
                    if key in keys:
                        seen(key, rows, a)

                x.wanted[rows] = run.forward(x.wanted[rows], show)
        return run.routings

    def _routed(self, layer: QuantizedLayer, x: F32, moments: FullMoments) -> list[Routing]:
        """Return the routing of the rows x after a quantised attention. Adds the fit rows to `moments`."""
        run = self._ready(layer, self.running)
        with self.rows_s.running():
            for rows in steps(self.split.seen, self.split.window):
                run.forward(x[rows])
                if (fit := self.split.of_step(rows)[0]).stop:
                    moments.add(run.routings[-1].h[fit])
        return run.routings

    def _mixture(
        self,
        weights: LayerWeights,
        wanted: list[Routing],
        given: list[Routing],
        moments: Moments,
        x: Streams,
    ) -> tuple[LayerWeights, Any, tuple[SiteReport, ...]]:
        routings = Routing.joined(wanted), Routing.joined(given)
        device, method = Recorder(self.backend), self.settings.method
        mixture = Mixture(weights, self.source, device, *routings, self.split, self.form, method)
        return mixture.quantize(moments, x.wanted)

    def _through(self, layer: QuantizedLayer, x: F32) -> None:
        """Run the rows x (T, C) through a layer of codes, in place."""
        run = self._ready(layer, self.running)
        for rows in steps(len(x), self.split.window):
            x[rows] = run.forward(x[rows])
        if run.routings:
            add_experts(layer, Routing.joined(run.routings), run.backend, x)

    def _ready(self, weights: LayerWeights | QuantizedLayer, backend: Backend) -> LayerRun:
        layer = weights.layer if isinstance(weights, LayerWeights) else weights.weights.layer
        return LayerRun(self.config, layer, weights, Recorder(backend), self.split.window)

    @staticmethod
    def _inputs(weights: LayerWeights, site: Site) -> int:
        """Return the number of inputs of a site (of the router, if its experts are read one at a time)."""
        known = [weights.linears[role] for role in (*site.roles, *site.kept) if role in weights.linears]
        return int(known[0].shape[1])

    @staticmethod
    def _recorded(weights: LayerWeights) -> list[Site]:
        """Return the sites whose inputs are visible in a pass over the whole layer: all but the experts' own."""
        return [s for s in sites(weights.config, weights.layer) if not (s.experts and s.absorber == "up")]


def rounded_layer(weights: LayerWeights, source: Checkpoint, form: Form) -> QuantizedLayer:
    """Quantise a layer and its experts with plain rounding."""
    return replace(round_layer(weights, form), experts=round_experts(weights, source, form))


@dataclass
class Conversion:
    """The quantisation of a dense model."""

    source: Checkpoint
    config: ModelConfig
    settings: Settings
    make: Callable[[bool], Backend]  # make(exact) returns a device
    files: LayerFiles
    window: int

    @cached_property
    def backend(self) -> Backend:
        """The device that runs the float model."""
        return self.make(True)

    @cached_property
    def running(self) -> Backend:
        """The device that runs codes, with the settings of a later run."""
        return self.make(False)

    def run(self, ids: Callable[[], Ids], watch: Watch) -> list[LayerReport]:
        """Quantise all layers into the work folder. Returns a report per layer, the head's last.

        ids: returns the calibration tokens; not called for rtn.
        """
        config, layers, files = self.config, self.config.num_hidden_layers, self.files
        needs_rows, head = self.settings.method != "rtn", is_site(self.config, self.source, self.settings)
        steps = layers + head
        done = files.finished(steps, needs_rows)
        reports = [files.read_report(i) for i in range(done)]
        x, quantizer = None, None
        if needs_rows and done < steps:
            tokens = ids()
            split = Split.of(len(tokens), self.window)
            quantizer = LayerQuantizer(self.source, config, self.settings, split, self.backend, self.running)
            x = self._rows(tokens, split, done)
        for i, report in enumerate(reports):
            watch(Progress("layers", min(i + 1, layers), layers, "kept", report))
        watch(Progress("layers", min(done, layers), layers))
        for layer in range(done, layers):
            weights = LayerWeights.read(config, layer, self.source)
            if quantizer is None or x is None:
                quantized = rounded_layer(weights, self.source, self.settings.form)
                report = LayerReport(())
            else:
                quantized, report = quantizer.run(weights, x)
                if layer + 1 == layers:
                    save(files.judged, np.stack(x.judged(quantizer.split)))
                if layer + 1 < steps:
                    save(files.rows(layer + 1), x.pack())
            self._keep(layer, report, layer_entries(quantized, self.settings.format))
            reports.append(report)
            del weights, quantized
            watch(Progress("layers", layer + 1, layers, "", report))
        if head and done < steps:
            assert x is not None and quantizer is not None
            reports.append(self._head(x.wanted, quantizer.split, watch))
            watch(Progress("layers", layers, layers, "", reports[-1]))
        self._rim(watch, head)
        return reports

    def _keep(self, step: int, report: LayerReport, tensors: Iterable[Entry]) -> None:
        """Write the codes and the report of a layer or the head, and delete its input rows."""
        self.files.write_report(step, report)
        write(self.files.shard(step), tensors, {"format": "mlx"})
        self.files.rows(step).unlink(missing_ok=True)

    def _head(self, x: F32, split: Split, watch: Watch) -> LayerReport:
        """Quantise a separate head, with the final norm, on the float model's rows x (T, C)."""
        config, source, form = self.config, self.source, head_form(self.settings)
        moments, held = head_inputs(config, source, self.backend, x, split, form, self.settings.method)
        head = Head.chosen_by(config, source, moments, held, form)
        tensors = head.entries(lambda done, total: watch(Progress("head", done, total)))
        report = LayerReport((head.report,))
        self._keep(config.num_hidden_layers, report, tensors)
        return report

    def _rows(self, ids: Ids, split: Split, done: int) -> Streams:
        """Return the rows that enter the first unfinished layer."""
        if done:
            return Streams.unpack(np.asarray(load(self.files.rows(done)), np.float32), split)
        x = embedded_rows(self.config, self.source, self.backend, ids, split.window)
        return Streams.begin(x, split, self.settings.method == "awq+")

    def _rim(self, watch: Watch, head_done: bool) -> None:
        if not self.files.rim.exists():
            watch(Progress("finish", 0, 2, "embedding and head"))
            bits, size = self.settings.head_bits, self.settings.group_size
            tensors = rim_entries(self.config, self.source, bits, size, not head_done)
            write(self.files.rim, tensors, {"format": "mlx"})
