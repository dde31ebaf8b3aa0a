"""Quantise one decoder layer: rtn (rounding), awq (the published algorithm), awq+ (the best there is here)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tinychat_mlx.awq import feedback
from tinychat_mlx.awq.cholesky import solve
from tinychat_mlx.awq.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.search import clip, search_fed_scale, search_scale
from tinychat_mlx.awq.sites import UNCLIPPED, LayerWeights, Site, fold, shared, sites
from tinychat_mlx.weight import F32

METHODS = ("rtn", "awq", "awq+")
JUDGED = 768  # rows of a site's matrix by which attempts are compared
ROUNDS = 1  # of coordinate descent: 5 % less KL at 4 bits; a second gives nothing


@dataclass(frozen=True)
class Form:
    """How weights are stored."""

    w_bit: int
    group_size: int


@dataclass(frozen=True)
class SiteReport:
    """Mean squared output error over mean squared output of a site's linears, on the calibration tokens."""

    key: str
    roles: tuple[str, ...]
    rtn: float
    error: float
    alpha: float
    fell_back: bool  # the error did not fall: plain rounding was kept
    others: Mapping[str, float] = field(
        default_factory=dict
    )  # method -> error, where a comparison was asked for


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's linears as codes, by part, and what folding made of the rest (in `weights`)."""

    weights: LayerWeights
    parts: dict[str, Quantized]
    reports: tuple[SiteReport, ...]

    def dequantized(self) -> LayerWeights:
        """The layer as it will run."""
        made = self.weights.copy()
        made.linears = {role: part.to_float32() for role, part in self.parts.items()}
        return made


Moments = BlockMoments | FullMoments


def empty_moments(method: str, weights: LayerWeights, group_size: int) -> dict[str, Moments]:
    """What a method needs to know about the sites' inputs, by the sites' keys."""
    out: dict[str, Moments] = {}
    for site in sites(weights.config):
        k = weights.linears[site.roles[0]].shape[1]
        if method == "awq+":  # the rows of o and down feed the residual: no folding scales them
            ends = site.roles in (("o",), ("down",))
            out[site.key] = FullMoments.empty(k, weights.stacked(site) if ends else None)
        else:
            out[site.key] = BlockMoments.empty(k, group_size)
    return out


def round_layer(weights: LayerWeights, form: Form) -> QuantizedLayer:
    """Plain rounding: needs no tokens."""
    parts = {role: round_to_nearest(w, form.w_bit, form.group_size) for role, w in weights.linears.items()}
    return QuantizedLayer(weights, parts, ())


def quantize_layer(
    weights: LayerWeights, moments: dict[str, Moments], form: Form, compare: bool = False
) -> QuantizedLayer:
    """Scale, fold and quantise a layer whose sites' inputs have these moments.

    From the last site to the first: a site's scales go into rows that an earlier site quantises.
    Takes each site's moments out of `moments`, for they are large.
    compare: with awq+, also measure what the published algorithm would have done.
    """
    weights, parts, reports = weights.copy(), {}, []
    for site in reversed(sites(weights.config)):
        m = moments.pop(site.key)
        plain = _Attempt(weights, _rounded(weights, site, form), np.ones(1, np.float32), 0.0)
        others = {}
        if isinstance(m, FullMoments):
            prepared = _Prepared.of(weights.stacked(site), m, form)
            judge = _Judge(prepared.wanted, m)
            if compare:
                published = _published(weights, site, m.blocks(form.group_size), form)
                others["awq"] = min(judge.error(published, site), judge.error(plain, site))
                del published
            tried = _plus(weights, site, m, prepared, form)
            del prepared
        else:
            judge = _Judge(weights.stacked(site), m)
            tried = _published(weights, site, m, form)
        rtn, error = judge.error(plain, site), judge.error(tried, site)
        kept = tried if error < rtn else plain
        weights = kept.weights
        parts.update(kept.parts)
        report = SiteReport(site.key, site.roles, rtn, min(rtn, error), kept.alpha, not error < rtn, others)
        reports.append(report)
        del judge  # and with it this site's moments
    return QuantizedLayer(weights, parts, tuple(reversed(reports)))


@dataclass(frozen=True)
class _Attempt:
    """The layer with a site's scales folded in, the site's codes, the scale of each input channel."""

    weights: LayerWeights
    parts: dict[str, Quantized]
    s: F32
    alpha: float


class _Judge:
    """Measures attempts at one site by what its linears then give for the calibration tokens.

    At most JUDGED rows, spread evenly, are looked at: a product with H for all costs as much as quantising.
    """

    def __init__(self, w: F32, moments: Moments) -> None:
        self.rows = slice(0, None, -(-len(w) // JUDGED))
        self.w = w[self.rows].copy()
        self.loss: Callable[[F32], float]
        if isinstance(moments, FullMoments):
            sums = moments.sums  # not its mean: at K = 8192 a copy is 268 MB
            self.loss = lambda d: float(np.einsum("nk,nk->", d @ sums, d, dtype=np.float64))
        else:
            self.loss = lambda d: float(moments.loss(d).sum(dtype=np.float64))
        self.signal = max(self.loss(self.w), 1e-30)

    def error(self, attempt: _Attempt, site: Site) -> float:
        w_hat = np.concatenate([attempt.parts[role].to_float32() for role in site.roles])[self.rows]
        w_hat /= attempt.s
        w_hat -= self.w
        return self.loss(w_hat) / self.signal


def _rounded(weights: LayerWeights, site: Site, form: Form) -> dict[str, Quantized]:
    return {r: round_to_nearest(weights.linears[r], form.w_bit, form.group_size) for r in site.roles}


def _scaled(
    weights: LayerWeights, site: Site, found: tuple[F32, float] | None
) -> tuple[LayerWeights, F32, float]:
    """-> a copy with the found scales folded in, the scale of each input channel, alpha."""
    copy = weights.copy()
    if found is None or found[1] == 0:
        return copy, np.ones(weights.linears[site.roles[0]].shape[1], np.float32), 0.0
    return copy, fold(copy, site, found[0], shared(site, weights.config)), found[1]


def _published(weights: LayerWeights, site: Site, moments: BlockMoments, form: Form) -> _Attempt:
    """Scale search, clip search, rounding (Lin et al. 2024)."""
    found = None
    if site.absorber is not None:
        at = shared(site, weights.config)
        found = search_scale(weights.stacked(site), moments, at, form.w_bit, form.group_size)
    scaled, s, alpha = _scaled(weights, site, found)
    moments, parts = moments.divided(s), {}
    for role in site.roles:
        w = scaled.linears[role]
        if role not in UNCLIPPED:
            w = clip(w, moments, form.w_bit, form.group_size)
        parts[role] = round_to_nearest(w, form.w_bit, form.group_size)
    return _Attempt(scaled, parts, s, alpha)


@dataclass
class _Prepared:
    """A site made ready for error feedback. h and f are in the order of quantisation, wanted (N, K) is not.

    wanted: the weights that would give, from what the quantised layers feed this site, what the float model
    computes here (least squares, damped): the site's own plus a correction.
    """

    wanted: F32
    correction: F32  # (K, N), in the order of quantisation
    order: feedback.Order
    h: F32
    f: feedback.Factor

    @classmethod
    def of(cls, w: F32, moments: FullMoments, form: Form) -> _Prepared:
        order = feedback.by_importance(np.diagonal(moments.sums), form.group_size)
        h = feedback.damped(moments.sums[np.ix_(order, order)], 1 / max(moments.tokens, 1))
        f = feedback.factor(h)
        correction = moments.correction(w)[order]
        solve(f.u, f.d, correction)
        wanted = w.copy()
        wanted[:, order] += correction.T
        return cls(wanted, correction, order, h, f)


def _plus(
    weights: LayerWeights, site: Site, moments: FullMoments, prepared: _Prepared, form: Form
) -> _Attempt:
    """Scales by the error that feedback will leave, then feedback with joint clip, refit and descent.

    Changes what is prepared: a copy of H for K = 8192 takes 268 MB.
    """
    order, h, f = prepared.order, prepared.h, prepared.f
    found = None
    if site.absorber is not None:
        d = np.empty_like(f.d)
        d[order] = f.d
        at = shared(site, weights.config)
        mean_abs = moments.magnitude / np.float32(max(moments.tokens, 1))
        found = search_fed_scale(prepared.wanted, mean_abs, d, at, form.group_size)
    scaled, s, alpha = _scaled(weights, site, found)
    # Dividing the inputs by s divides rows and columns of H: U and D follow without another factorisation.
    so = s[order, None]
    f.u[:] *= so.T
    f.u[:] /= so
    h /= so.T
    h /= so
    wt = np.ascontiguousarray(scaled.stacked(site).T[order])
    wt += prepared.correction * so
    del prepared.wanted, prepared.correction
    codes = _fed_codes(
        wt, order, feedback.Factor(f.u, (f.d / np.square(so[:, 0])).astype(np.float32)), h, form
    )
    return _Attempt(scaled, dict(scaled.unstack_codes(site, codes)), s, alpha)


def _fed_codes(wt: F32, order: feedback.Order, f: feedback.Factor, h: F32, form: Form) -> Quantized:
    """wt (K, N), in `order` as f and h are -> its codes, in the checkpoint's order."""
    codes = feedback.feed_back(wt, f, form.w_bit, form.group_size)
    feedback.refine(wt, codes, h, ROUNDS)
    back = np.argsort(order)
    groups = np.argsort(order[:: form.group_size] // form.group_size)
    q = np.ascontiguousarray(codes.q[back].T.astype(np.uint8))
    scales, zeros = (np.ascontiguousarray(a[groups].T) for a in (codes.scales, codes.zeros))
    return Quantized(q, scales, zeros, form.w_bit, form.group_size)
