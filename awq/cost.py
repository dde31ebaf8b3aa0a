"""What a conversion cost the whole model: perplexity, KL and agreement on text that it was not calibrated on.

The dense model, the result and plain rounding at the same bits go through the text layer by layer, one at a
time (see whole.py), so that measuring takes less memory than converting. The figures are those of
`tinychat eval -m RESULT --against SOURCE` on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.awq.calibrate import held_out
from tinychat_mlx.awq.evaluate import Quality, Scores, evaluate
from tinychat_mlx.awq.record import window_of
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.stream import Progress, Watch
from tinychat_mlx.awq.whole import Rounded, streamed
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Source
from tinychat_mlx.loading import capacity_of


@dataclass(frozen=True)
class Cost:
    """text: which it was. of: method -> quality against the dense model; its perplexity is in each."""

    text: str
    of: dict[str, Quality]

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "of": {name: q.as_dict() for name, q in self.of.items()}}


def cost(
    source: Checkpoint,
    result: Checkpoint,
    settings: Settings,
    backend: Callable[[bool], Backend],
    text: str | None,
    watch: Watch,
) -> Cost:
    """Measure a finished conversion as it runs by default, the dense model exactly.

    backend: exact? -> a device. text: a file, or None for what calibration left. Raises UsageError.
    """
    raw = parse_config(source.config)
    window = window_of(raw)
    held = held_out(raw, source, lambda: backend(False), settings, window, text, watch)
    config = parse_config(source.config, capacity_of(None, raw.max_position_embeddings))  # as `load` does
    models: dict[str, Source] = {settings.method: result}
    if settings.method != "rtn":
        models = {"rtn": Rounded(source, result)} | models
    done, total = 0, (len(models) + 1) * config.num_hidden_layers

    def layer_done() -> None:
        nonlocal done
        done += 1
        watch(Progress("measure", done, total, f"{len(held.ids)} tokens: {held.origin}"))

    def scores(model: Source, exact: bool) -> Scores:
        return streamed(config, model, backend(exact), held.ids, window, layer_done)

    dense = scores(source, True)
    found = {name: evaluate(held.ids, scores(model, False), dense, window) for name, model in models.items()}
    return Cost(held.origin, found)
