"""Quantise one decoder layer: rtn (rounding), awq (the published algorithm), awq+ (the best there is here)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tinychat_mlx.awq import feedback
from tinychat_mlx.awq.cholesky import solve
from tinychat_mlx.awq.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.parallel import product, trim
from tinychat_mlx.awq.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.search import clip, search_fed_scale, search_scale
from tinychat_mlx.awq.sites import UNCLIPPED, LayerWeights, Site, fold, shared, sites
from tinychat_mlx.formats.mlx import half
from tinychat_mlx.weight import F32, Dense, Packed, Weight

METHODS = ("rtn", "awq", "awq+")
JUDGED = 384  # rows of a site's matrix by which attempts are compared
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
    note: str = ""


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's linears as codes, by part, and what folding made of the rest (in `weights`): a Source for the
    graph's Loader, which gives the layer as it is stored, so as it will run.

    experts: those of a mixture, each by part.
    """

    weights: LayerWeights
    parts: dict[str, Quantized]
    reports: tuple[SiteReport, ...]
    experts: tuple[dict[str, Packed], ...] = ()

    def has(self, name: str) -> bool:
        return self.weights.has(name)

    def vector(self, name: str) -> F32:
        return as_stored(name, self.weights.vector(name))

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A module: its parts' codes one below the other, or its floats in float16; rows as the checkpoint has them."""
        found = self.weights.module(module)
        if not all(part in self.parts for part in found.parts):
            plain = self.weights.weight(module)
            assert isinstance(plain, Dense)
            bias = None if plain.bias is None else as_stored(module, plain.bias)
            return Dense(module, half(module, plain.w), bias)
        order, parts = found.stored_order(self.weights.config), [self.parts[part] for part in found.parts]
        q, scales, zeros = (
            np.concatenate([getattr(p, f) for p in parts])[order] for f in ("q", "scales", "zeros")
        )
        bias = self.weights.bias(found)
        whole = Quantized(q, scales, zeros, parts[0].w_bit, parts[0].group_size)
        return whole.packed(module, None if bias is None else as_stored(module, bias))


def as_stored(name: str, a: F32) -> F32:
    return half(name, a).astype(np.float32)


Moments = BlockMoments | FullMoments


def empty_moments(method: str, weights: LayerWeights, group_size: int) -> dict[str, Moments]:
    """What a method needs to know about the inputs of a layer's sites, by their keys; experts' own are theirs."""
    return {
        site.key: site_moments(method, weights, site, group_size)
        for site in sites(weights.config, weights.layer)
        if not (site.experts and site.absorber == "up")
    }


def site_moments(method: str, weights: LayerWeights, site: Site, group_size: int) -> Moments:
    known = [weights.linears[role] for role in (*site.roles, *site.kept) if role in weights.linears]
    k = known[0].shape[1]
    if method != "awq+":
        return BlockMoments.empty(k, group_size)
    if (
        site.experts and weights.expert is None
    ):  # for the choice of s alone: no linear's correction is asked for
        return FullMoments.empty(k, np.empty((0, k), np.float32))
    ends = site.roles in (("o",), ("down",))  # their rows feed the residual: no folding scales them
    return FullMoments.empty(k, weights.stacked(site) if ends else None)


def round_layer(weights: LayerWeights, form: Form) -> QuantizedLayer:
    """Plain rounding of a layer, its experts apart: needs no tokens."""
    linears = {
        role: weights.linears[role]
        for site in sites(weights.config, weights.layer)
        if not site.experts
        for role in site.roles
    }
    parts = {role: round_to_nearest(w, form.w_bit, form.group_size) for role, w in linears.items()}
    return QuantizedLayer(weights, parts, ())


def quantize_layer(
    weights: LayerWeights, moments: dict[str, Moments], form: Form, compare: bool = False
) -> QuantizedLayer:
    """Scale, fold and quantise a layer, its experts apart, whose sites' inputs have these moments.

    From the last site to the first: a site's scales go into rows that an earlier site quantises.
    Takes each site's moments out of `moments`, for they are large.
    compare: with awq+, also measure what the published algorithm would have done.
    """
    weights, parts, reports = weights.copy(), {}, []
    for site in reversed(sites(weights.config, weights.layer)):
        if site.experts:
            continue
        trim()
        kept, report = quantize_site(weights, site, moments.pop(site.key), form, compare)
        weights = kept.weights
        parts.update(kept.parts)
        reports.append(report)
    return QuantizedLayer(weights, parts, tuple(reversed(reports)))


def quantize_site(
    weights: LayerWeights, site: Site, m: Moments, form: Form, compare: bool
) -> tuple[Attempt, SiteReport]:
    """Scale, fold and quantise the linears of one site; plain rounding where that is no worse."""
    plain, others = Attempt(weights, round_site(weights, site, form), np.ones(1, np.float32), 0.0), {}
    if isinstance(m, FullMoments):
        prepared = Prepared.of(weights.stacked(site), m, form)
        judge = Judge(prepared.wanted, m)
        if compare:
            published = _published(weights, site, m.blocks(form.group_size), form)
            others["awq"] = min(judge.error(published, site), judge.error(plain, site))
            del published
        tried = _plus(weights, site, m, prepared, form)
    else:
        judge = Judge(weights.stacked(site), m)
        tried = _published(weights, site, m, form)
    rtn, error = judge.error(plain, site), judge.error(tried, site)
    kept = tried if error < rtn else plain
    report = SiteReport(site.key, site.roles, rtn, min(rtn, error), kept.alpha, not error < rtn, others)
    return kept, report


@dataclass(frozen=True)
class Attempt:
    """The layer with a site's scales folded in, the site's codes, the scale of each input channel."""

    weights: LayerWeights
    parts: dict[str, Quantized]
    s: F32
    alpha: float


class Judge:
    """Measures attempts at one site by what its linears then give for the calibration tokens.

    At most JUDGED rows, spread evenly, are looked at: a product with H for all costs as much as quantising.
    """

    def __init__(self, w: F32, moments: Moments) -> None:
        self.rows = np.arange(0, len(w), -(-len(w) // JUDGED))
        self.w = w[self.rows]
        self.loss: Callable[[F32], float]
        if isinstance(moments, FullMoments):
            sums = moments.whole()  # not its mean: at K = 8192 a copy is 268 MB
            self.loss = lambda d: float(np.einsum("nk,nk->n", product(d, sums), d).sum(dtype=np.float64))
        else:
            self.loss = lambda d: float(moments.loss(d).sum(dtype=np.float64))
        self.signal = max(self.loss(self.w), 1e-30)

    def error(self, attempt: Attempt, site: Site) -> float:
        pieces, at = [], 0
        for part in (attempt.parts[role] for role in site.roles):
            end = at + len(part.q)
            pieces.append(part.take(self.rows[(self.rows >= at) & (self.rows < end)] - at).to_float32())
            at = end
        w_hat = np.concatenate(pieces)
        w_hat /= attempt.s
        w_hat -= self.w
        return self.loss(w_hat) / self.signal


def round_site(weights: LayerWeights, site: Site, form: Form) -> dict[str, Quantized]:
    return {r: round_to_nearest(weights.linears[r], form.w_bit, form.group_size) for r in site.roles}


def _scaled(
    weights: LayerWeights, site: Site, found: tuple[F32, float] | None
) -> tuple[LayerWeights, F32, float]:
    """-> a copy with the found scales folded in, the scale of each input channel, alpha."""
    copy = weights.copy()
    if found is None or found[1] == 0:
        return copy, np.ones(weights.linears[site.roles[0]].shape[1], np.float32), 0.0
    return copy, fold(copy, site, found[0], shared(site, weights.config)), found[1]


def _published(weights: LayerWeights, site: Site, moments: BlockMoments, form: Form) -> Attempt:
    """Scale search, clip search, rounding (Lin et al. 2024)."""
    found = None
    if site.absorber is not None:
        at = shared(site, weights.config)
        found = search_scale(weights.stacked(site), moments, at, form.w_bit, form.group_size)
    scaled, s, alpha = _scaled(weights, site, found)
    return Attempt(scaled, clipped(scaled, site, moments, s, form), s, alpha)


def clipped(
    scaled: LayerWeights, site: Site, moments: BlockMoments, s: F32, form: Form
) -> dict[str, Quantized]:
    """Clip search and rounding of linears whose columns carry s; moments: of the unscaled inputs."""
    moments, parts = moments.divided(s), {}
    for role in site.roles:
        w = scaled.linears[role]
        if role not in UNCLIPPED:
            w = clip(w, moments, form.w_bit, form.group_size)
        parts[role] = round_to_nearest(w, form.w_bit, form.group_size)
    return parts


@dataclass
class Prepared:
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
    def of(cls, w: F32, moments: FullMoments, form: Form) -> Prepared:
        order, h, f = factored(moments, form)
        correction = moments.correction(w)[order]
        solve(f.u, f.d, correction)
        wanted = w.copy()
        wanted[:, order] += correction.T
        return cls(wanted, correction, order, h, f)


def factored(moments: FullMoments, form: Form) -> tuple[feedback.Order, F32, feedback.Factor]:
    """-> the order of quantisation, the damped mean of H in that order, its factors."""
    order = feedback.by_importance(np.diagonal(moments.sums), form.group_size)
    h = feedback.damped(moments.whole()[np.ix_(order, order)], 1 / max(moments.tokens, 1))
    return order, h, feedback.factor(h)


def _stored_order(order: feedback.Order, d: F32) -> F32:
    stored = np.empty_like(d)
    stored[order] = d
    return stored


def feedback_weights(moments: FullMoments, form: Form) -> F32:
    """-> D (K,) of inputs with these moments: how much the rounding of each column will count."""
    order, _, f = factored(moments, form)
    return _stored_order(order, f.d)


def _plus(weights: LayerWeights, site: Site, moments: FullMoments, prepared: Prepared, form: Form) -> Attempt:
    """Scales by the error that feedback will leave, then feedback with joint clip, refit and descent."""
    found = None
    # The head is left unscaled: feedback alone leaves 0.35 of rounding's KL on the demo's, after scaling 0.41.
    if site.absorber not in (None, "final_norm"):
        at = shared(site, weights.config)
        d = _stored_order(prepared.order, prepared.f.d)
        found = search_fed_scale(prepared.wanted, moments.mean_abs, d, at, form.group_size)
    scaled, s, alpha = _scaled(weights, site, found)
    return Attempt(scaled, fed(scaled, site, prepared, s, form), s, alpha)


def fed(scaled: LayerWeights, site: Site, prepared: Prepared, s: F32, form: Form) -> dict[str, Quantized]:
    """Error feedback over linears whose columns carry s.

    Changes what is prepared: a copy of H for K = 8192 takes 268 MB.
    """
    order, h, f = prepared.order, prepared.h, prepared.f
    # Dividing the inputs by s divides rows and columns of H: U and D follow without another factorisation.
    so = s[order, None]
    f.u[:] *= so.T
    f.u[:] /= so
    h /= so.T
    h /= so
    wt = prepared.correction
    wt *= so
    wt += scaled.stacked(site).T[order]
    del prepared.wanted, prepared.correction
    codes = fed_codes(
        wt, order, feedback.Factor(f.u, (f.d / np.square(so[:, 0])).astype(np.float32)), h, form
    )
    return dict(scaled.unstack_codes(site, codes))


def fed_codes(wt: F32, order: feedback.Order, f: feedback.Factor, h: F32, form: Form) -> Quantized:
    """wt (K, N), in `order` as f and h are -> its codes, in the checkpoint's order."""
    codes = feedback.quantised(wt, f, h, form.w_bit, form.group_size, ROUNDS)
    back = np.argsort(order)
    groups = np.argsort(order[:: form.group_size] // form.group_size)
    q = np.ascontiguousarray(codes.q[back].T.astype(np.uint8))
    scales, zeros = (np.ascontiguousarray(a[groups].T) for a in (codes.scales, codes.zeros))
    return Quantized(q, scales, zeros, form.w_bit, form.group_size)
