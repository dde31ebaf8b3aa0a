"""Compare the loss of a conversion with that of plain rounding, on calibration tokens that no search used."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log
from typing import Any

from tinychat_mlx.awq.calibration.rows import Split
from tinychat_mlx.awq.layer import LayerReport
from tinychat_mlx.awq.layer_stream import Ids
from tinychat_mlx.awq.quality.evaluate import Quality, Scores, evaluate_all, kl_ratio
from tinychat_mlx.awq.quality.streamed_logits import Rounded, scores_of
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Graph, Loader, Source
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import F32


@dataclass(frozen=True)
class Verdict:
    """The loss of the method (`made`) and of plain rounding (`rounded`) on the same tokens."""

    made: Quality
    rounded: Quality

    @property
    def passed(self) -> bool:
        """Whether the method lost no more than plain rounding, within one standard error of their ratio."""
        if not self.rounded.kl_mean:
            return not self.made.kl_mean
        ratio, error = kl_ratio(self.made, self.rounded)
        return ratio - (error if isfinite(error) else 0.0) <= 1

    def as_dict(self) -> dict[str, Any]:
        return {"made": self.made.as_dict(), "rtn": self.rounded.as_dict()}

    def text(self) -> str:
        """Format the verdict as one line."""
        made, rounded = self.made, self.rounded
        return (
            f"KL {made.kl_mean:.4f}, plain rounding {rounded.kl_mean:.4f}; top-1 agreement {made.top1:.1%}, plain "
            f"rounding {rounded.top1:.1%}; on {made.tokens} calibration tokens that no search used"
        )


@dataclass(frozen=True)
class Rejected:
    """A method that lost more than plain rounding. layer: index of the layer where its error grew most."""

    method: str
    verdict: Verdict
    layer: int

    def text(self) -> str:
        """Format the rejection as one line."""
        made, rounded = self.verdict.made, self.verdict.rounded
        return (
            f"{self.method} lost more than plain rounding (KL {made.kl_mean:.4f} against {rounded.kl_mean:.4f}): its "
            f"error grew most at layer {self.layer + 1}"
        )


def verdict(
    config: ModelConfig,
    source: Checkpoint,
    result: Checkpoint,
    exact: Backend,
    running: Backend,
    ids: Ids,
    split: Split,
    rows: F32,
) -> Verdict:
    """Compare the logits of the rows (3, J, C) of the float model, the result and plain rounding."""
    judged = [int(i) for i in ids[split.seen :]]

    def scores(weights: Source, backend: Backend, x: F32) -> Scores:
        return scores_of(Graph(config, backend), Loader(config, weights, backend), x)

    wanted = scores(source, exact, rows[0])
    made, rounded = scores(result, running, rows[1]), scores(Rounded(source, result), running, rows[2])
    return Verdict(*evaluate_all(judged, (made, rounded), wanted, split.window))


def went_wrong(layers: list[LayerReport]) -> int:
    """Return the layer at which the distance to the float model grew most, relative to plain rounding."""
    ratios = [log(max(r.off, 1e-12) / max(r.rounded, 1e-12)) for r in layers if r.rounded]
    steps = [ratio - before for ratio, before in zip(ratios, [0.0, *ratios], strict=False)]
    return max(range(len(steps)), key=steps.__getitem__) if steps else 0
