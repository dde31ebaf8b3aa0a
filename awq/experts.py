"""Quantise the mixture of experts of a layer, with one expert in memory at a time.

An expert is a small gated MLP. Its codes are chosen for the tokens routed to it. All experts and the routers
read the output of one norm, so the scales that this norm absorbs are the same for all experts. Each expert is
therefore processed twice. The first pass quantises its down projection and records the loss of each candidate
scale. The second pass quantises gate and up with the chosen scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.calibration.recorder import STEP_ROWS, ExpertRun, Recorder, Routing
from tinychat_mlx.awq.calibration.rows import Split
from tinychat_mlx.awq.layer import (
    Attempt,
    Factored,
    Form,
    Held,
    Judge,
    Moments,
    QuantizedLayer,
    SiteReport,
    better,
    clipped,
    fed_codes,
    publish_site,
    round_site,
)
from tinychat_mlx.awq.search.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.search.scale_clip import best, candidates, fed_losses, losses, search_fed_scale
from tinychat_mlx.awq.sites import Index, LayerWeights, Site, experts, fold, sites
from tinychat_mlx.model.decoder import Source
from tinychat_mlx.weights.weight import F32, Packed

LEAST = 512  # tokens per expert; an expert with fewer also gets other tokens, evenly spread

Codes = tuple[dict[str, Packed], ...]  # per expert: role -> codes


def round_experts(weights: LayerWeights, source: Source, form: Form) -> Codes:
    """Quantise the experts of a layer with plain rounding."""

    def rounded_one(e: int) -> dict[str, Packed]:
        w = LayerWeights.read(weights.config, weights.layer, source, e)
        parts = {r: round_to_nearest(a, form.w_bit, form.group_size) for r, a in w.linears.items()}
        return _packed(w, parts)

    return tuple(rounded_one(e) for e in experts(weights.config, weights.layer))


def add_experts(layer: QuantizedLayer, routing: Routing, backend: Recorder, y: F32) -> None:
    """Add the output of the quantised experts for their routed rows to y (T, C), in place."""
    for e, codes in enumerate(layer.experts):
        parts = codes["gate"], codes["up"], codes["down"]
        run, share = ExpertRun(layer.weights.config.act, *parts, backend), routing.weight(e)
        for rows in _pieces(np.flatnonzero(share)):
            y[rows] += share[rows, None] * run.forward(routing.h[rows])[1]


class Mixture:
    """The experts of one float layer and the calibration rows routed to them.

    wanted: the routing of the float model. given: the routing of the rows that the quantised layers before
    produce (equal to `wanted` for awq). An expert is quantised for `given`. It is not corrected towards
    `wanted`, because too few held-out rows reach an expert to measure whether that helps.
    """

    def __init__(
        self,
        weights: LayerWeights,
        source: Source,
        backend: Recorder,
        wanted: Routing,
        given: Routing,
        split: Split,
        form: Form,
        method: str,
        only: Sequence[int] = (),
    ) -> None:
        self.weights, self.source, self.backend, self.form = weights, source, backend, form
        self.wanted, self.given, self.split, self.method = wanted, given, split, method
        self.first, self.down = (s for s in sites(weights.config, weights.layer) if s.experts)
        self.experts = only or experts(weights.config, weights.layer)
        sent = {e: np.flatnonzero(given.weight(e)[: split.seen]) for e in self.experts}
        fit = {e: rows[rows < split.fit] for e, rows in sent.items()}
        self.tokens = {e: len(rows) for e, rows in fit.items()}
        self.rows = {e: _enough(rows, 0, split.fit, LEAST) for e, rows in fit.items()}
        self.held = {
            e: _enough(rows[rows >= split.fit], split.fit, split.seen, LEAST // 8) for e, rows in sent.items()
        }

    def quantize(self, moments: Moments, y: F32) -> tuple[LayerWeights, Codes, tuple[SiteReport, ...]]:
        """Return the layer with the experts' scales folded into norm and routers, the codes and the reports.

        moments: moments of all tokens at the norm's output. y (T, C): the float experts' output is added in
        place.
        """
        search = _Search(moments, self.form)
        downs = [self._down(e, search, y) for e in self.experts]
        chosen, alpha = best(search.total, search.scales)
        folded, s = self.weights.copy(), np.ones_like(chosen)
        if alpha:
            s = fold(folded, self.first, chosen, None)
        pairs = list(zip(self.experts, downs, strict=True))
        firsts = [self._gate_up(e, down.s, s, alpha) for e, down in pairs]
        report = self._merged([kept for _, kept in firsts])
        codes = [parts for parts, _ in firsts]
        if not report.error < report.rtn:
            report = replace(report, error=report.rtn, alpha=0.0, fell_back=True)
            folded = self.weights
            codes = [self._plain(e, down.s) for e, down in pairs]
        whole = tuple(down.codes | first for down, first in zip(downs, codes, strict=True))
        return folded, whole, (report, self._merged([down.report for down in downs]))

    def _down(self, e: int, search: _Search, y: F32) -> _Down:
        """Quantise an expert's down projection and record the loss of each candidate scale for gate and up."""
        w = LayerWeights.read(self.weights.config, self.weights.layer, self.source, e)
        moments, held = self._run(e, w, y)
        if isinstance(moments, BlockMoments):
            kept, report = publish_site(w, self.down, moments, held, self.form)
        else:
            kept, report = self._fed_down(w, moments, held)
        search.add(kept.weights.stacked(self.first), self.given.h[self.rows[e]], self.tokens[e])
        return _Down(_packed(w, kept.parts), kept.s, report)

    def _fed_down(self, w: LayerWeights, moments: FullMoments, held: Held) -> tuple[Attempt, SiteReport]:
        site, form, found = self.down, self.form, None
        made = Factored.of(moments, form)
        if site.absorber is not None:
            found = search_fed_scale(w.stacked(site), moments.mean_abs, made.weights(), None, form.group_size)
        scaled, s, alpha = w.copy(), np.ones(len(moments.magnitude), np.float32), 0.0
        if found is not None and found[1]:
            s, alpha = fold(scaled, site, found[0], None), found[1]
        tried = Attempt(scaled, fed(scaled, site, made, s, form), s, alpha)
        plain = Attempt(w, round_site(w, site, form), np.ones(1, np.float32), 0.0)
        return better(Judge(w.stacked(site), held), tried, plain, site)

    def _run(self, e: int, w: LayerWeights, y: F32) -> tuple[Moments, Held]:
        """Run a float expert and add its output to y. Returns moments and held-out rows of down's input."""
        k = w.stacked(self.down).shape[1]
        moments: Moments = (
            FullMoments.empty(k) if self.method == "awq+" else BlockMoments.empty(k, self.form.group_size)
        )
        run, share = ExpertRun.of(w, self.backend), self.wanted.weight(e)
        for rows in _pieces(np.flatnonzero(share)):
            y[rows] += share[rows, None] * run.forward(self.wanted.h[rows])[1]
        for rows in _pieces(self.rows[e]):
            moments.add(run.forward(self.given.h[rows])[0])
        given, wanted = (run.forward(routed.h[self.held[e]])[0] for routed in (self.given, self.wanted))
        return moments, Held(given, wanted)

    def _reread(self, e: int, s: F32) -> LayerWeights:
        """Read an expert's gate and up. The rows of up are divided by the scales of down's inputs."""
        w = LayerWeights.read(self.weights.config, self.weights.layer, self.source, e)
        del w.linears["down"]
        w.linears["up"] = w.linears["up"] / s[:, None]
        return w

    def _plain(self, e: int, down_s: F32) -> dict[str, Packed]:
        w = self._reread(e, down_s)
        return _packed(w, round_site(w, self.first, self.form))

    def _gate_up(self, e: int, down_s: F32, s: F32, alpha: float) -> tuple[dict[str, Packed], SiteReport]:
        """Quantise an expert's gate and up for its tokens, with the scales that all experts share."""
        site, form, w, rows = self.first, self.form, self._reread(e, down_s), self.rows[e]
        judge = Judge(w.stacked(site), Held(self.given.h[self.held[e]], self.wanted.h[self.held[e]]))
        scaled, ones = multiplied(w, site, s), np.ones(1, np.float32)
        tries = [round_site(scaled, site, form)]
        if self.method == "awq+":
            m = FullMoments.empty(len(s))
            for piece in _pieces(rows):
                m.add(self.given.h[piece])
            tries.append(fed(scaled, site, Factored.of(m, form), s, form))
        else:
            own = BlockMoments.empty(len(s), form.group_size)
            own.add(self.given.h[rows])
            tries.append(clipped(scaled, site, own, s, form))
        plain = judge.error(round_site(w, site, form), ones, site)
        errors = [judge.error(parts, s, site) for parts in tries]
        least = int(np.argmin(errors))
        report = SiteReport(site.key, site.roles, plain, errors[least], alpha, 0.0, least == 0)
        return _packed(w, tries[least]), report

    def _merged(self, reports: Sequence[SiteReport]) -> SiteReport:
        """Merge the reports of all experts for one site, as means weighted by tokens."""
        tokens = np.array(list(self.tokens.values()))
        share = tokens / max(tokens.sum(), 1)
        rtn, error, alpha = (
            float(share @ np.array([getattr(r, field) for r in reports]))
            for field in ("rtn", "error", "alpha")
        )
        few = int((tokens < LEAST).sum())
        note = f"{few} of {len(tokens)} experts were sent fewer than {LEAST} tokens" if few else ""
        kept = all(r.fell_back for r in reports)
        return SiteReport(reports[0].key, reports[0].roles, rtn, error, alpha, 0.0, kept, note)


@dataclass(frozen=True)
class _Down:
    """A quantised down projection: its codes, the scales that divide the rows of up, and its report."""

    codes: dict[str, Packed]
    s: F32
    report: SiteReport


class _Search:
    """The loss of each candidate for the experts' common scales, summed over the experts.

    awq+ weights channels by D of all tokens' moments: one factorisation instead of one per expert. The
    published search uses the moments of the expert's own tokens.
    """

    def __init__(self, moments: Moments, form: Form) -> None:
        self.form, self.scales = form, candidates(moments.mean_abs, None)
        self.d = Factored.of(moments, form).weights() if isinstance(moments, FullMoments) else None
        self.total = np.zeros(len(self.scales))

    def add(self, w: F32, h: F32, tokens: int) -> None:
        """Add the losses of an expert with gate and up w (N, K), stacked, on its rows h (n, K)."""
        size, bits = self.form.group_size, self.form.w_bit
        if self.d is None:
            own = BlockMoments.empty(w.shape[1], size)
            own.add(h)
            self.total += tokens * losses(w, own, self.scales, None, bits, size)
        else:
            self.total += tokens * fed_losses(w, self.d, self.scales, None, size)


def fed(scaled: LayerWeights, site: Site, made: Factored, s: F32, form: Form) -> dict[str, Quantized]:
    """Apply error feedback to linears whose columns are multiplied by s.

    `made` is for the unscaled inputs and changes.
    """
    # Dividing the inputs by s divides rows and columns of H, so U and D follow without another factorisation.
    so = s[made.order, None]
    made.f.u[:] *= so.T
    made.f.u[:] /= so
    made.h /= so.T
    made.h /= so
    made.f = replace(made.f, d=(made.f.d / np.square(so[:, 0])).astype(np.float32))
    codes = fed_codes(np.ascontiguousarray(scaled.stacked(site).T[made.order]), made, form)
    return dict(scaled.unstack_codes(site, codes))


def multiplied(w: LayerWeights, site: Site, s: F32) -> LayerWeights:
    """Return a copy whose columns are multiplied by s."""
    copy = w.copy()
    for role in site.roles:
        copy.linears[role] = copy.linears[role] * s
    return copy


def _enough(rows: Index, start: int, stop: int, least: int) -> Index:
    """Return the rows routed to an expert.

    Adds evenly spread rows of start … stop if there are fewer than `least`.
    """
    if len(rows) >= least:
        return rows
    spare = np.setdiff1d(np.arange(start, stop), rows)
    take = min(least - len(rows), len(spare))
    return np.union1d(rows, spare[np.arange(take) * len(spare) // max(take, 1)])


def _pieces(rows: Index) -> Iterator[Index]:
    """Split rows into chunks of the size of a step."""
    for at in range(0, len(rows), STEP_ROWS):
        yield rows[at : at + STEP_ROWS]


def _packed(w: LayerWeights, parts: dict[str, Quantized]) -> dict[str, Packed]:
    names = {module.role: w.name(module) for module in w.modules()}
    return {role: part.packed(names[role], w.biases.get(role)) for role, part in parts.items()}
