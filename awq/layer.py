"""Quantise the linears of one site: rtn (plain rounding), awq (as published), awq+ (error feedback).

The linears of a site read the same input. A result from the calibration rows is evaluated on held-out rows,
against the float model's outputs. Plain rounding is kept if nothing is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.parallel import product, trim
from tinychat_mlx.awq.search import feedback
from tinychat_mlx.awq.search.cholesky import solve
from tinychat_mlx.awq.search.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.search.scale_clip import clip, search_fed_scale, search_scale
from tinychat_mlx.awq.sites import UNCLIPPED, LayerWeights, Site, fold, shared, sites
from tinychat_mlx.weights.formats.mlx import half
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight

METHODS = ("rtn", "awq", "awq+")
JUDGED = 384  # maximum outputs of a site, evenly spread, on which attempts are compared
ROUNDS = 1  # of coordinate descent: 5 % less KL at 4 bits; a second round has no effect
TURN = 0.25  # longest correction of a weight row relative to its norm; it rotates the row by at most 14°


@dataclass(frozen=True)
class Form:
    """The storage form of quantised weights."""

    w_bit: int
    group_size: int


@dataclass(frozen=True)
class SiteReport:
    """The result of one site.

    rtn, error: relative squared error of its outputs against the float model's on held-out rows, with plain
    rounding and with the result. share: part of the correction towards the float model's outputs, chosen on
    the held-out rows. fell_back: nothing was better than plain rounding, which was kept.
    """

    key: str
    roles: tuple[str, ...]
    rtn: float
    error: float
    alpha: float
    share: float
    fell_back: bool
    note: str = ""


@dataclass(frozen=True)
class LayerReport:
    """The result of a layer, or of the head.

    off: distance (see `streams.distance`) of the activations after the quantised layers to the float model's,
    on rows that no search uses. rounded: the same for plain rounding. The head has neither.
    """

    sites: tuple[SiteReport, ...]
    off: float = 0.0
    rounded: float = 0.0


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with codes for the linears in `parts`. `weights` has the others and the folded vectors.

    Implements Source for the graph's Loader: the layer as it is stored, and so as it will run. experts: by
    part.
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
        """Return a module (codes of its parts, stacked, or float16 floats) in the checkpoint's row order."""
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


def dense_sites(weights: LayerWeights) -> tuple[Site, ...]:
    """Return the sites of a layer without its experts', in the order of the forward pass."""
    return tuple(site for site in sites(weights.config, weights.layer) if not site.experts)


def round_layer(weights: LayerWeights, form: Form) -> QuantizedLayer:
    """Quantise a layer without its experts with plain rounding. Needs no tokens."""
    parts: dict[str, Quantized] = {}
    for site in dense_sites(weights):
        parts |= round_site(weights, site, form)
    return QuantizedLayer(weights, parts, ())


def round_site(weights: LayerWeights, site: Site, form: Form) -> dict[str, Quantized]:
    return {r: round_to_nearest(weights.linears[r], form.w_bit, form.group_size) for r in site.roles}


@dataclass(frozen=True)
class Held:
    """Held-out rows at one site: what its linears will read (given) and what the float model's read (wanted).

    Both have the shape (n, K).
    """

    given: F32
    wanted: F32


@dataclass(frozen=True)
class Attempt:
    """A candidate: the layer with scales folded in, the site's codes, the scale of each input channel."""

    weights: LayerWeights
    parts: dict[str, Quantized]
    s: F32
    alpha: float
    share: float = 0.0


class Judge:
    """Measures codes of a site by its outputs on held-out rows, against those of the float weights w (N, K).

    At most JUDGED outputs, evenly spread, are computed. The error is the geometric mean of two: the mean over rows
    of |error|² / |output|², in which every row of the text has the same weight, and Σ|error|² / Σ|output|². The
    second is decided by a few rows, such as a text's first, whose outputs are a thousand times the others': all
    later rows attend to them.
    """

    def __init__(self, w: F32, held: Held) -> None:
        self.rows = np.arange(0, len(w), -(-len(w) // JUDGED))
        self.held = held
        self.wanted = product(held.wanted, w[self.rows].T)
        self.size = np.einsum("tn,tn->t", self.wanted, self.wanted)
        self.weight = 1 / np.maximum(self.size, np.float32(1e-6) * self.size.mean() + np.float32(1e-30))

    def error(self, parts: dict[str, Quantized], s: F32, site: Site) -> float:
        """Return the error of codes whose columns are multiplied by s."""
        pieces, at = [], 0
        for part in (parts[role] for role in site.roles):
            end = at + len(part.q)
            pieces.append(part.take(self.rows[(self.rows >= at) & (self.rows < end)] - at).to_float32())
            at = end
        w_hat = np.concatenate(pieces)
        w_hat /= s
        off = product(self.held.given, w_hat.T) - self.wanted
        squares = np.einsum("tn,tn->t", off, off)
        of_rows, of_all = np.mean(squares * self.weight), squares.sum() / max(self.size.sum(), 1e-30)
        return float(np.sqrt(of_rows * of_all))


def better(
    judge: Judge, tried: Attempt, plain: Attempt, site: Site, note: str = ""
) -> tuple[Attempt, SiteReport]:
    """Keep the attempt only if its error is below that of plain rounding."""
    rtn, error = (judge.error(a.parts, a.s, site) for a in (plain, tried))
    kept = tried if error < rtn else plain
    fell_back = kept is plain
    report = SiteReport(site.key, site.roles, rtn, min(rtn, error), kept.alpha, kept.share, fell_back, note)
    return kept, report


# The published algorithm (Lin et al. 2024) ------------------------------------------------------------------


def quantize_published(
    weights: LayerWeights, moments: dict[str, BlockMoments], held: dict[str, Held], form: Form
) -> QuantizedLayer:
    """Quantise a layer without its experts, from the last site to the first.

    A site's scales are folded into rows that an earlier site quantises, so the last site comes first. Removes
    each site's moments from `moments`, because they are large.
    """
    weights, parts, reports = weights.copy(), {}, []
    for site in reversed(dense_sites(weights)):
        trim()
        kept, report = publish_site(weights, site, moments.pop(site.key), held.pop(site.key), form)
        weights = kept.weights
        parts.update(kept.parts)
        reports.append(report)
    return QuantizedLayer(weights, parts, tuple(reversed(reports)))


def publish_site(
    weights: LayerWeights, site: Site, moments: BlockMoments, held: Held, form: Form
) -> tuple[Attempt, SiteReport]:
    """Quantise a site with scale search, clip search and rounding."""
    found = None
    if site.absorber is not None:
        at = shared(site, weights.config)
        found = search_scale(weights.stacked(site), moments, at, form.w_bit, form.group_size)
    scaled, s, alpha = scaled_by(weights, site, found)
    tried = Attempt(scaled, clipped(scaled, site, moments, s, form), s, alpha)
    plain = Attempt(weights, round_site(weights, site, form), np.ones(1, np.float32), 0.0)
    return better(Judge(weights.stacked(site), held), tried, plain, site)


def scaled_by(
    weights: LayerWeights, site: Site, found: tuple[F32, float] | None
) -> tuple[LayerWeights, F32, float]:
    """Return a copy with the given scales folded in, the scale of each input channel, and alpha."""
    copy = weights.copy()
    if found is None or found[1] == 0:
        return copy, np.ones(weights.linears[site.roles[0]].shape[1], np.float32), 0.0
    return copy, fold(copy, site, found[0], shared(site, weights.config)), found[1]


def clipped(
    scaled: LayerWeights, site: Site, moments: BlockMoments, s: F32, form: Form
) -> dict[str, Quantized]:
    """Search clips and round linears whose columns are multiplied by s. moments: of the unscaled inputs."""
    moments, parts = moments.divided(s), {}
    for role in site.roles:
        w = scaled.linears[role]
        if role not in UNCLIPPED:
            w = clip(w, moments, form.w_bit, form.group_size)
        parts[role] = round_to_nearest(w, form.w_bit, form.group_size)
    return parts


# Error feedback ------------------------------------------------------------------------------------------------


@dataclass
class Factored:
    """The damped mean of x xᵀ in the order of quantisation, and its factors U D Uᵀ."""

    order: feedback.Order
    h: F32
    f: feedback.Factor

    @classmethod
    def of(cls, moments: FullMoments, form: Form) -> Factored:
        """Factor moments. Frees their sums."""
        order = feedback.by_importance(np.diagonal(moments.sums), form.group_size)
        h = feedback.damped(moments.take_sums(order), 1 / max(moments.tokens, 1))
        return cls(order, h, feedback.factor(h))

    def weights(self) -> F32:
        """Return D (K,) in the checkpoint's order: the weight of each column's rounding error."""
        stored = np.empty_like(self.f.d)
        stored[self.order] = self.f.d
        return stored


Scales = dict[str, tuple[F32, float]]  # site -> (scale of each input channel, alpha)


def scale_layer(
    weights: LayerWeights, moments: dict[str, FullMoments], form: Form
) -> tuple[LayerWeights, Scales]:
    """Choose and fold the scales of all sites without experts, by the error left after feedback.

    moments: of the float model's inputs. The order is from the last site to the first, as in
    `quantize_published`.
    """
    found: Scales = {}
    for site in reversed(dense_sites(weights)):
        trim()
        m, chosen = moments.pop(site.key), None
        if site.absorber is not None:
            d, at = Factored.of(m, form).weights(), shared(site, weights.config)
            chosen = search_fed_scale(weights.stacked(site), m.mean_abs, d, at, form.group_size)
        weights, s, alpha = scaled_by(weights, site, chosen)
        found[site.key] = s, alpha
    return weights, found


def feed_site(
    weights: LayerWeights,
    site: Site,
    moments: FullMoments,
    made: Factored,
    held: Held,
    form: Form,
    s: F32,
    alpha: float,
) -> tuple[Attempt, SiteReport]:
    """Quantise a site with error feedback.

    The site's columns are multiplied by s, and the inputs in `moments` and `held` are divided by s.
    made: the factors of `moments`.
    """
    w = weights.stacked(site)
    judge = Judge(w, held)
    plain = {r: round_to_nearest(weights.linears[r] / s, form.w_bit, form.group_size) for r in site.roles}
    rtn = judge.error(plain, np.float32(1) / s, site)
    del plain
    change, share = corrected(w, moments, made, judge)
    wt = np.ascontiguousarray(w.T[made.order])
    if share:
        wt += change.T[made.order]
    del change
    codes = fed_codes(wt, made, form)
    parts = dict(weights.unstack_codes(site, codes))
    error, ones = judge.error(parts, np.ones(1, np.float32), site), np.ones_like(s)
    if error < rtn:
        report = SiteReport(site.key, site.roles, rtn, error, alpha, share, False)
        return Attempt(weights, parts, ones, alpha, share), report
    # The scales are kept: the rows of an earlier site already include them.
    parts = round_site(weights, site, form)
    report = SiteReport(site.key, site.roles, rtn, judge.error(parts, ones, site), alpha, 0.0, True)
    return Attempt(weights, parts, ones, alpha), report


def corrected(w: F32, moments: FullMoments, made: Factored, judge: Judge) -> tuple[F32, float]:
    """Return a change of w (N, K) towards the float model's outputs, and the share of it that is applied.

    The change is the least-squares solution for the part that the site's inputs lack. The change of a row is
    at most TURN of the row's norm. A regression on inputs with errors is biased, so a gain on the rows of the
    fit proves nothing. The share minimises the error on held-out rows. It is 0 if the gain there is within
    one standard error.
    """
    if not moments.has_cross:
        return np.zeros_like(w), 0.0
    turned = moments.correction(w)[made.order]
    solve(made.f.u, made.f.d, turned)
    change = np.empty_like(w)
    change[:, made.order] = turned.T
    del turned
    length, most = (np.sqrt(np.einsum("nk,nk->n", a, a)) for a in (change, w))
    change *= np.minimum(1, TURN * most / np.maximum(length, 1e-30))[:, None]
    given = judge.held.given
    lacks, gives = judge.wanted - product(given, w[judge.rows].T), product(given, change[judge.rows].T)
    along, across = (np.einsum("tn,tn->t", a, gives) * judge.weight for a in (lacks, gives))
    share = float(np.clip(along.sum() / max(across.sum(), 1e-30), 0, 1))
    gain = share * (2 * along - share * across)
    if not gain.mean() > gain.std() / np.sqrt(len(gain)):
        return change, 0.0
    change *= np.float32(share)
    return change, share


def fed_codes(wt: F32, made: Factored, form: Form) -> Quantized:
    """Quantise wt (K, N), in the order of quantisation. Returns codes in the checkpoint's order."""
    order = made.order
    codes = feedback.quantised(wt, made.f, made.h, form.w_bit, form.group_size, ROUNDS)
    back = np.argsort(order)
    groups = np.argsort(order[:: form.group_size] // form.group_size)
    q = np.ascontiguousarray(codes.q[back].T.astype(np.uint8))
    scales, zeros = (np.ascontiguousarray(a[groups].T) for a in (codes.scales, codes.zeros))
    return Quantized(q, scales, zeros, form.w_bit, form.group_size)
