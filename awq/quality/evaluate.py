"""Measure quantisation loss: perplexity, KL divergence and top-1 agreement, with standard errors.

The text is cut into windows of W tokens. Each window starts at position 0, and every token except its first
is predicted. Standard errors treat windows as independent, but not the tokens inside a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.calibration.recorder import WINDOW
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.contract import Cache, Tensor
from tinychat_mlx.weights.weight import F32

F64 = npt.NDArray[np.float64]
ROWS = 128  # rows of logits per model in memory at once
RESAMPLES = 200  # bootstrap samples for the standard error of a percentile


class Decoding(Protocol):
    """The decoder methods that the measurement uses."""

    def new_cache(self, capacity: int) -> Cache: ...

    def forward(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> Tensor: ...


# (tokens of a window, its start in the text) -> logits (rows, V), chunk by chunk
Scores = Callable[[Sequence[int], int], Iterator[F32]]


@dataclass(frozen=True)
class Quality:
    """Quality of a model on a text.

    kl: KL(against ‖ model) in nats per token. top1: share of tokens for which both models choose the same
    token. Fields with suffix _se are standard errors. against_ppl: perplexity of the other model.
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
    kl_sums: tuple[float, ...] = ()  # sum over the tokens of each window, for `kl_ratio`

    def as_dict(self) -> dict[str, float]:
        """Return the measured values.

        Omits what was not measured and the standard errors of a single window.
        """
        found = {key: v for key, v in asdict(self).items() if key != "kl_sums"}
        return {key: v for key, v in found.items() if v is not None and np.isfinite(v)}

    def told(self, key: str, form: str) -> str:
        """Format a value with its standard error, if the error is known."""
        value, error = getattr(self, key), getattr(self, f"{key}_se")
        return f"{value:{form}} ± {error:{form}}" if np.isfinite(error) else f"{value:{form}}"


def scores(decoder: Decoding, to_host: Callable[[Tensor], F32]) -> Scores:
    """Wrap a decoder as a function from a window to its logits."""

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
    """Measure a model on tokens (T,). Raises UsageError for fewer than two tokens."""
    return evaluate_all(ids, [model], against, window, watch)[0]


def evaluate_all(
    ids: Sequence[int],
    models: Sequence[Scores],
    against: Scores | None = None,
    window: int = WINDOW,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Quality]:
    """Measure models on the same tokens (T,), with one pass of the model they are compared with.

    Raises UsageError for fewer than two tokens.
    """
    starts = [at for at in range(0, len(ids), window) if len(ids) - at > 1]
    if not starts:
        raise UsageError(
            f"the text has {len(ids)} tokens, at least two are needed", remedy="give a longer text"
        )
    windows = []
    for i, at in enumerate(starts):
        windows.append(_window(ids[at : at + window], at, models, against))
        watch(i + 1, len(starts))
    return [_quality(found, window, against is not None) for found in zip(*windows, strict=True)]


def _quality(windows: Sequence[list[F64]], window: int, compared: bool) -> Quality:
    """Summarise what `_window` measured in each window of one model."""
    nll, kl, same, other = zip(*windows, strict=True)
    quality = Quality(*perplexity(nll), sum(map(len, nll)), window)
    if not compared:
        return quality
    p99 = float(np.percentile(np.concatenate(kl), 99))
    measured = (*clustered(kl), p99, percentile_error(kl, 99), *clustered(same), *perplexity(other))
    sums = tuple(float(w.sum()) for w in kl)
    return Quality(quality.ppl, quality.ppl_se, quality.tokens, window, *measured, sums)


def kl_ratio(model: Quality, base: Quality) -> tuple[float, float]:
    """Return the ratio of two models' KL on the same text and its standard error.

    Windows are paired (ratio estimator). A window that is hard for one model is hard for the other, so the
    ratio has a smaller relative error than either KL.
    """
    a, b = np.array(model.kl_sums), np.array(base.kl_sums)
    ratio, count = float(a.sum() / b.sum()), len(a)
    if count < 2:
        return ratio, float("nan")
    off = a - ratio * b
    return ratio, float(np.sqrt(count / (count - 1) * np.square(off).sum()) / b.sum())


def perplexity(nll: Sequence[F64]) -> tuple[float, float]:
    """Return perplexity and its standard error from negative log-likelihoods per window."""
    mean, se = clustered(nll)
    ppl = float(np.exp(mean))
    return ppl, ppl * se


def _window(
    ids: Sequence[int], start: int, models: Sequence[Scores], against: Scores | None
) -> list[list[F64]]:
    """Measure one window.

    Returns for each model four arrays with one value per predicted token: -log likelihood, KL, whether the
    top-1 tokens agree, and the other model's -log likelihood.
    """
    out: list[tuple[list[F64], ...]] = [([], [], [], []) for _ in models]
    wanted = np.asarray(ids[1:], np.intp)
    others = against(ids, start) if against is not None else None
    at = 0
    for pieces in zip(*(model(ids, start) for model in models), strict=True):
        rows = np.arange(min(len(pieces[0]), len(wanted) - at))
        next_ids = wanted[at : at + len(rows)]
        if others is not None:
            log_p = log_softmax(next(others)[: len(rows)])
            p, top, likely = np.exp(log_p), log_p.argmax(-1), -log_p[rows, next_ids]
        for columns, logits in zip(out, pieces, strict=True):
            log_q = log_softmax(logits[: len(rows)])
            columns[0].append(-log_q[rows, next_ids])
            if others is not None:
                columns[1].append(np.einsum("tv,tv->t", p, log_p - log_q))
                columns[2].append((top == log_q.argmax(-1)).astype(np.float64))
                columns[3].append(likely)
        at += len(rows)
    return [[np.concatenate(column) if column else np.empty(0) for column in columns] for columns in out]


def log_softmax(logits: F32) -> F64:
    """Return log probabilities (T, V) in float64. A KL of 1e-5 is a difference of nearly equal numbers."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def clustered(windows: Sequence[F64]) -> tuple[float, float]:
    """Return the mean over all tokens and its standard error with each window as one draw (ratio estimator)."""
    total, count = sum(map(len, windows)), len(windows)
    mean = float(sum(w.sum() for w in windows) / total)
    if count < 2:
        return mean, float("nan")
    off = np.array([w.sum() - mean * len(w) for w in windows])
    return mean, float(np.sqrt(count / (count - 1) * np.square(off).sum()) / total)


def percentile_error(windows: Sequence[F64], at: float) -> float:
    """Return the standard error of a percentile over tokens, by a seeded bootstrap over windows."""
    rng, n = np.random.default_rng(0), len(windows)
    drawn = [np.concatenate([windows[i] for i in rng.integers(n, size=n)]) for _ in range(RESAMPLES)]
    return float(np.std([np.percentile(d, at) for d in drawn])) if n > 1 else float("nan")
