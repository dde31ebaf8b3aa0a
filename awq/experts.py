"""A layer's mixture of experts, one expert in memory at a time: what each one sees, gives, and becomes.

An expert is a small gated MLP that sees the tokens routed to it, and its codes are chosen for those. But all
experts and the routers read one norm, so the scales that it absorbs are one choice for all of them. So each
expert is looked at twice: first its down projection is quantised and each candidate's loss noted, then, with
the scales known, its gate and up are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat_mlx.awq.layer import (
    Attempt,
    Form,
    Judge,
    Moments,
    Prepared,
    QuantizedLayer,
    SiteReport,
    clipped,
    fed,
    feedback_weights,
    quantize_site,
    round_site,
    site_moments,
)
from tinychat_mlx.awq.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.record import STEP_ROWS, ExpertRun, Recorder, Routing
from tinychat_mlx.awq.search import best, candidates, fed_losses, losses
from tinychat_mlx.awq.sites import Index, LayerWeights, Site, experts, fold, sites
from tinychat_mlx.decoder import Source
from tinychat_mlx.weight import F32, Packed

LEAST = 512  # tokens an expert is quantised for: one that was sent fewer also takes others, evenly spread

Codes = tuple[dict[str, Packed], ...]  # of each expert, by role


def round_experts(weights: LayerWeights, source: Source, form: Form) -> Codes:
    """Plain rounding of a layer's experts."""

    def rounded_one(e: int) -> dict[str, Packed]:
        w = LayerWeights.read(weights.config, weights.layer, source, e)
        parts = {r: round_to_nearest(a, form.w_bit, form.group_size) for r, a in w.linears.items()}
        return _packed(w, parts)

    return tuple(rounded_one(e) for e in experts(weights.config, weights.layer))


def add_experts(layer: QuantizedLayer, routing: Routing, backend: Recorder, y: F32) -> None:
    """Add what the quantised experts make of the rows routed to them to y (T, C), in place."""
    for e, codes in enumerate(layer.experts):
        parts = codes["gate"], codes["up"], codes["down"]
        run, share = ExpertRun(layer.weights.config.act, *parts, backend), routing.weight(e)
        for rows in _pieces(np.flatnonzero(share)):
            y[rows] += share[rows, None] * run.forward(routing.h[rows])[1]


class Mixture:
    """The experts of one float layer and what the calibration rows bring to them.

    routed: what the float model routes, and for awq+ also what the layer routes of the rows that quantised
    layers feed it; an expert is quantised for the latter and corrected towards the former.
    """

    def __init__(
        self,
        weights: LayerWeights,
        source: Source,
        backend: Recorder,
        routed: Sequence[Routing],
        form: Form,
        only: Sequence[int] = (),
    ) -> None:
        self.weights, self.source, self.backend, self.form = weights, source, backend, form
        self.wanted, self.routed = routed[0], routed[-1]
        self.method = "awq+" if len(routed) == 2 else "awq"
        self.first, self.down = (s for s in sites(weights.config, weights.layer) if s.experts)
        self.experts = only or experts(weights.config, weights.layer)
        sent = {e: np.flatnonzero(self.routed.weight(e)) for e in self.experts}
        self.tokens = {e: len(rows) for e, rows in sent.items()}
        self.rows = {e: _enough(rows, len(self.routed.h)) for e, rows in sent.items()}

    def quantize(
        self, moments: Moments, compare: bool, y: F32
    ) -> tuple[LayerWeights, Codes, tuple[SiteReport, ...]]:
        """-> the layer with the experts' scales folded into norm and routers, their codes, what was measured.

        moments: of what all tokens bring to the norm's readers. y (T, C): the float experts' share is added.
        """
        search = _Search(moments, self.form, compare)
        downs = [self._down(e, search, compare, y) for e in self.experts]
        published = best(search.published, search.scales)[0] if compare else None
        chosen, alpha = best(search.total, search.scales)
        folded, s = self.weights.copy(), np.ones_like(chosen)
        if alpha:
            s = fold(folded, self.first, chosen, None)
        pairs = list(zip(self.experts, downs, strict=True))
        firsts = [self._gate_up(e, down.s, s, alpha, published) for e, down in pairs]
        report = self._merged([kept for _, kept in firsts])
        codes = [parts for parts, _ in firsts]
        if not report.error < report.rtn:
            report = replace(report, error=report.rtn, alpha=0.0, fell_back=True)
            folded = self.weights
            codes = [self._plain(e, down.s) for e, down in pairs]
        whole = tuple(down.codes | first for down, first in zip(downs, codes, strict=True))
        return folded, whole, (report, self._merged([down.report for down in downs]))

    def _down(self, e: int, search: _Search, compare: bool, y: F32) -> _Down:
        """Quantise an expert's down projection, and note what each scale of its inputs would cost gate and up."""
        w = LayerWeights.read(self.weights.config, self.weights.layer, self.source, e)
        kept, report = quantize_site(w, self.down, self._run(e, w, y), self.form, compare)
        search.add(kept.weights.stacked(self.first), self.routed.h[self.rows[e]], self.tokens[e])
        return _Down(_packed(w, kept.parts), kept.s, report)

    def _run(self, e: int, w: LayerWeights, y: F32) -> Moments:
        """Run a float expert: its share is added to y -> the moments of its down projection's input."""
        moments = site_moments(self.method, w, self.down, self.form.group_size)
        run, share = ExpertRun.of(w, self.backend), self.wanted.weight(e)
        learnt = np.zeros(len(y), bool)
        learnt[self.rows[e]] = True
        for rows in _pieces(np.flatnonzero(learnt | (share != 0))):
            a, out = run.forward(self.wanted.h[rows])
            y[rows] += share[rows, None] * out
            own = learnt[rows]
            if isinstance(moments, BlockMoments):
                moments.add(a[own])
            elif own.any():
                moments.add(run.forward(self.routed.h[rows[own]])[0], a[own])
        return moments

    def _reread(self, e: int, s: F32) -> LayerWeights:
        """An expert's gate and up, up's rows divided by the scales of down's inputs."""
        w = LayerWeights.read(self.weights.config, self.weights.layer, self.source, e)
        del w.linears["down"]
        w.linears["up"] = w.linears["up"] / s[:, None]
        return w

    def _plain(self, e: int, down_s: F32) -> dict[str, Packed]:
        w = self._reread(e, down_s)
        return _packed(w, round_site(w, self.first, self.form))

    def _gate_up(
        self, e: int, down_s: F32, s: F32, alpha: float, published: F32 | None
    ) -> tuple[dict[str, Packed], SiteReport]:
        """Quantise an expert's gate and up for the tokens it sees, with the scales that all share."""
        site, form, w, rows = self.first, self.form, self._reread(e, down_s), self.rows[e]
        scaled, others = multiplied(w, site, s), {}
        tries = [Attempt(scaled, round_site(scaled, site, form), s, alpha)]
        if self.method == "awq+":
            m = FullMoments.empty(len(s))
            for piece in _pieces(rows):
                m.add(self.routed.h[piece], self.wanted.h[piece])
            prepared = Prepared.of(w.stacked(site), m, form)
            judge = Judge(prepared.wanted, m)
            if published is not None:
                other, blocks = multiplied(w, site, published), m.blocks(form.group_size)
                parts = clipped(other, site, blocks, published, form)
                others["awq"] = judge.error(Attempt(other, parts, published, 0.0), site)
            tries.append(Attempt(scaled, fed(scaled, site, prepared, s, form), s, alpha))
        else:
            own = BlockMoments.empty(len(s), form.group_size)
            own.add(self.routed.h[rows])
            judge = Judge(w.stacked(site), own)
            tries.append(Attempt(scaled, clipped(scaled, site, own, s, form), s, alpha))
        plain = judge.error(Attempt(w, round_site(w, site, form), np.ones(1, np.float32), 0.0), site)
        errors = [judge.error(attempt, site) for attempt in tries]
        least = int(np.argmin(errors))
        report = SiteReport(site.key, site.roles, plain, errors[least], alpha, least == 0, others)
        return _packed(w, tries[least].parts), report

    def _merged(self, reports: Sequence[SiteReport]) -> SiteReport:
        """One report for a site of all experts: means over the tokens sent to them."""
        tokens = np.array(list(self.tokens.values()))
        share = tokens / tokens.sum()

        def mean(values: Sequence[float]) -> float:
            return float(share @ np.array(values))

        rtn, error, alpha = (
            mean([getattr(r, field) for r in reports]) for field in ("rtn", "error", "alpha")
        )
        others = {key: mean([r.others[key] for r in reports]) for key in reports[0].others}
        few = int((tokens < LEAST).sum())
        note = f"{few} of {len(tokens)} experts were sent fewer than {LEAST} tokens" if few else ""
        kept = all(r.fell_back for r in reports)
        return SiteReport(reports[0].key, reports[0].roles, rtn, error, alpha, kept, others, note)


@dataclass(frozen=True)
class _Down:
    """An expert's down projection, done: its codes, what divided the rows of up, what was measured."""

    codes: dict[str, Packed]
    s: F32
    report: SiteReport


class _Search:
    """The losses of each candidate for the experts' common scales, added up over the experts.

    awq+ weighs channels by the D of all tokens' moments, one factor instead of one for each expert; the
    published search by the moments of the expert's own tokens.
    """

    def __init__(self, moments: Moments, form: Form, compare: bool) -> None:
        self.form, self.scales = form, candidates(moments.mean_abs, None)
        self.d = feedback_weights(moments, form) if isinstance(moments, FullMoments) else None
        self.by_blocks = compare or self.d is None
        self.total, self.published = (np.zeros(len(self.scales)) for _ in range(2))

    def add(self, w: F32, h: F32, tokens: int) -> None:
        """Take in an expert's gate and up w (N, K), stacked, and the rows h (n, K) it is quantised for."""
        if self.by_blocks:
            own = BlockMoments.empty(w.shape[1], self.form.group_size)
            own.add(h)
            found = losses(w, own, self.scales, None, self.form.w_bit, self.form.group_size)
            self.published += tokens * found
        if self.d is None:
            self.total = self.published
        else:
            self.total += tokens * fed_losses(w, self.d, self.scales, None, self.form.group_size)


def multiplied(w: LayerWeights, site: Site, s: F32) -> LayerWeights:
    """A copy whose columns carry s."""
    copy = w.copy()
    for role in site.roles:
        copy.linears[role] = copy.linears[role] * s
    return copy


def _enough(rows: Index, total: int) -> Index:
    """The rows sent to an expert; where they are fewer than LEAST, with others, evenly spread."""
    if len(rows) >= LEAST:
        return rows
    spare = np.setdiff1d(np.arange(total), rows)
    take = min(LEAST - len(rows), len(spare))
    return np.union1d(rows, spare[np.arange(take) * len(spare) // max(take, 1)])


def _pieces(rows: Index) -> Iterator[Index]:
    """Rows, as many at a time as a step has."""
    for at in range(0, len(rows), STEP_ROWS):
        yield rows[at : at + STEP_ROWS]


def _packed(w: LayerWeights, parts: dict[str, Quantized]) -> dict[str, Packed]:
    names = {module.role: w.name(module) for module in w.modules()}
    return {role: part.packed(names[role], w.biases.get(role)) for role, part in parts.items()}
