"""What quantising lost: perplexity, and how far a model's predictions lie from another's, with standard errors.

Text is cut into windows of W consecutive tokens, each read by itself from position 0; within one, every token
but the first is predicted. Standard errors take windows as independent, tokens inside one not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.record import WINDOW
from tinychat_mlx.backend import Cache, Tensor
from tinychat_mlx.errors import UsageError
from tinychat_mlx.weight import F32

F64 = npt.NDArray[np.float64]
ROWS = 128  # logits (ROWS, V) of two models are in memory at once
RESAMPLES = 200  # of windows, for the standard error of a percentile


class Decoding(Protocol):
    """The part of a decoder that is measured."""

    def new_cache(self, capacity: int) -> Cache: ...

    def forward(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> Tensor: ...


# Tokens of a window, and where it begins in the text -> logits (rows, V), piece after piece.
Scores = Callable[[Sequence[int], int], Iterator[F32]]


@dataclass(frozen=True)
class Quality:
    """kl: mean over tokens of KL(against ‖ model) in nats; top1: share of tokens where both choose the same.

    _se: standard error. against_ppl: the other model's perplexity.
    """

    ppl: float
    ppl_se: float
    tokens: int
    window: int
    kl_mean: float | None = None
    kl_mean_se: float | None = None
    kl_p99: float | None = None
    kl_p99_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    against_ppl: float | None = None
    against_ppl_se: float | None = None
    kl_sums: tuple[float, ...] = ()  # over the tokens of each window, for `kl_ratio`

    def as_dict(self) -> dict[str, float]:
        """Without what was not measured, as the standard errors of a single window."""
        found = {key: v for key, v in asdict(self).items() if key != "kl_sums"}
        return {key: v for key, v in found.items() if v is not None and np.isfinite(v)}

    def told(self, key: str, form: str) -> str:
        """A measure with its standard error, where one is known."""
        value, error = getattr(self, key), getattr(self, f"{key}_se")
        return f"{value:{form}} ± {error:{form}}" if np.isfinite(error) else f"{value:{form}}"


def scores(decoder: Decoding, to_host: Callable[[Tensor], F32]) -> Scores:
    """A model as a function from a window to its logits."""

    def of(ids: Sequence[int], _: int) -> Iterator[F32]:
        cache = decoder.new_cache(len(ids))
        for at in range(0, len(ids), ROWS):
            yield to_host(decoder.forward(ids[at : at + ROWS], cache, last_only=False))

    return of


def evaluate(
    ids: Sequence[int],
    model: Scores,
    against: Scores | None = None,
    window: int = WINDOW,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Measure a model on tokens (T,). Raises UsageError for fewer than two."""
    starts = [at for at in range(0, len(ids), window) if len(ids) - at > 1]
    if not starts:
        raise UsageError(
            f"the text has {len(ids)} tokens, at least two are needed", remedy="give a longer text"
        )
    windows = []
    for i, at in enumerate(starts):
        windows.append(_window(ids[at : at + window], at, model, against))
        watch(i + 1, len(starts))
    nll, kl, same, other = zip(*windows, strict=True)
    quality = Quality(*perplexity(nll), sum(map(len, nll)), window)
    if against is None:
        return quality
    p99 = float(np.percentile(np.concatenate(kl), 99))
    measured = (*clustered(kl), p99, percentile_error(kl, 99), *clustered(same), *perplexity(other))
    sums = tuple(float(w.sum()) for w in kl)
    return Quality(quality.ppl, quality.ppl_se, quality.tokens, window, *measured, sums)


def kl_ratio(model: Quality, base: Quality) -> tuple[float, float]:
    """KL of one model over another's on the same text -> the ratio, its standard error.

    Windows are taken in pairs: one that is hard for a model is hard for the other, so the ratio is known better
    than either (ratio estimator).
    """
    a, b = np.array(model.kl_sums), np.array(base.kl_sums)
    ratio, count = float(a.sum() / b.sum()), len(a)
    if count < 2:
        return ratio, float("nan")
    off = a - ratio * b
    return ratio, float(np.sqrt(count / (count - 1) * np.square(off).sum()) / b.sum())


def perplexity(nll: Sequence[F64]) -> tuple[float, float]:
    """Negative log-likelihoods, window by window -> perplexity and its standard error."""
    mean, se = clustered(nll)
    ppl = float(np.exp(mean))
    return ppl, ppl * se


def _window(ids: Sequence[int], start: int, model: Scores, against: Scores | None) -> list[F64]:
    """-> for each token but the first its -log likelihood, the KL there, whether the choices agree, and the
    other model's -log likelihood."""
    out: tuple[list[F64], ...] = ([], [], [], [])
    wanted = np.asarray(ids[1:], np.intp)
    others = against(ids, start) if against is not None else None
    at = 0
    for logits in model(ids, start):
        rows = np.arange(min(len(logits), len(wanted) - at))
        log_q, next_ids = log_softmax(logits[: len(rows)]), wanted[at : at + len(rows)]
        out[0].append(-log_q[rows, next_ids])
        if others is not None:
            log_p = log_softmax(next(others)[: len(rows)])
            out[1].append(np.einsum("tv,tv->t", np.exp(log_p), log_p - log_q))
            out[2].append((log_p.argmax(-1) == log_q.argmax(-1)).astype(np.float64))
            out[3].append(-log_p[rows, next_ids])
        at += len(rows)
    return [np.concatenate(column) if column else np.empty(0) for column in out]


def log_softmax(logits: F32) -> F64:
    """(T, V) -> log probabilities in float64: a KL of 1e-5 is a difference of nearly equal numbers."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def clustered(windows: Sequence[F64]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error with each window as one draw (ratio estimator)."""
    total, count = sum(map(len, windows)), len(windows)
    mean = float(sum(w.sum() for w in windows) / total)
    if count < 2:
        return mean, float("nan")
    off = np.array([w.sum() - mean * len(w) for w in windows])
    return mean, float(np.sqrt(count / (count - 1) * np.square(off).sum()) / total)


def percentile_error(windows: Sequence[F64], at: float) -> float:
    """Standard error of a percentile over tokens, by drawing windows again (bootstrap, seeded)."""
    rng, n = np.random.default_rng(0), len(windows)
    drawn = [np.concatenate([windows[i] for i in rng.integers(n, size=n)]) for _ in range(RESAMPLES)]
    return float(np.std([np.percentile(d, at) for d in drawn])) if n > 1 else float("nan")
