"""Sample the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.base.errors import ConfigError, UsageError
from tinychat_mlx.contract import Choice
from tinychat_mlx.weights.weight import F32


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 disable each."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None  # None: until the context is full
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError naming the parameter."""
        _check("temperature", self.temperature, 0, math.inf)
        _check("top_k", self.top_k, 0, math.inf)
        _check("top_p", self.top_p, 1e-9, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 1e-9, math.inf)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, math.inf)
        if any(not s for s in self.stop):
            raise UsageError(
                "an empty stop string would end every answer at once", where="stop", remedy="leave it out"
            )

    def updated(self, **given: Any) -> SamplingParams:
        """Return a copy with the keywords that are not None replaced. Raises UsageError for an unknown keyword."""
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(given) - known):
            raise UsageError(
                f"unknown sampling parameter {unknown[0]!r}", remedy=f"use one of {', '.join(sorted(known))}"
            )
        return replace(self, **{k: v for k, v in given.items() if v is not None})


def _check(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = f"of {low:g} or more" if high == math.inf else f"between {low:g} and {high:g}"
        raise UsageError(f"{value!r} is not valid", where=name, remedy=f"give a number {bounds}")


def from_generation_config(config: Mapping[str, Any]) -> SamplingParams:
    """Merge generation_config.json over the built-in defaults. Raises ConfigError.

    do_sample false is greedy. With do_sample true, a missing key has transformers' default (temperature 1, top_k 50,
    top_p 1), because the model's author tested with those.
    """
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {k: config[k] for k in keys if config.get(k) is not None}
    try:
        if config.get("do_sample") is False:
            penalty = {k: v for k, v in given.items() if k == "repetition_penalty"}
            return SamplingParams(temperature=0.0, top_p=1.0).updated(**penalty)
        if config.get("do_sample"):
            given = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | given
        return SamplingParams().updated(**given)
    except UsageError as e:
        raise ConfigError(
            e.problem, where="generation_config.json", remedy=f"{e.remedy} in this file"
        ) from None


TAIL = 0.001  # largest total probability of approximate logits: far below the error of int4 weights


def choice_of(p: SamplingParams) -> Choice | None:
    """Return the precision that sampling needs. With top_p, half of the cut mass may be approximate. None: exact."""
    if p.repetition_penalty != 1:  # can raise the rank of any token
        return None
    return Choice(p.temperature, max(TAIL, (1 - p.top_p) / 2))


class Sampler:
    """Samples tokens with one set of parameters. The same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.rng = np.random.default_rng(params.seed)

    def __call__(self, logits: F32, seen: Iterable[int] = ()) -> int:
        """Sample a token from logits (V,). seen: the tokens so far, for repetition_penalty. Raises ConfigError."""
        p = self.params
        if not np.isfinite(logits).all():
            raise ConfigError(
                "the model's logits are not finite: its weights are damaged or overflow",
                remedy="download the model again, or choose another one",
            )
        if p.repetition_penalty != 1:
            logits = penalised(logits, seen, p.repetition_penalty)
        if p.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = distribution(logits, p)
        at = np.searchsorted(np.cumsum(probabilities), self.rng.random(), side="right")
        return int(ids[min(int(at), len(ids) - 1)])  # rounding can leave the sum below 1


def penalised(logits: F32, seen: Iterable[int], penalty: float) -> F32:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019, §4.1)."""
    at = np.unique(np.fromiter(seen, np.int64))
    logits = logits.copy()
    old = logits[at]
    logits[at] = np.where(old > 0, old / penalty, old * penalty)
    return logits


def distribution(logits: F32, p: SamplingParams) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return (token ids, probabilities), most likely first, after temperature, top-k, top-p and min-p."""
    ids = np.arange(logits.size)
    if 0 < p.top_k < logits.size:  # ties with the k-th are kept, as in transformers
        ids = ids[logits >= np.partition(logits, -p.top_k)[-p.top_k]]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = logits[ids].astype(np.float64) / p.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    if p.top_p < 1:  # the smallest set with a total probability of top_p
        before = np.cumsum(probabilities) - probabilities
        keep = before < p.top_p
        ids, probabilities = ids[keep], probabilities[keep]
    if p.min_p > 0:
        keep = probabilities >= p.min_p * probabilities[0]
        ids, probabilities = ids[keep], probabilities[keep]
    return ids, probabilities / probabilities.sum()
