"""Measure the quality loss of a conversion: perplexity, KL divergence and agreement on held-out text.

The dense model, the result and plain rounding at the same bits process the text layer by layer, one model at
a time (see streamed_logits.py), so measuring needs less memory than converting. The figures equal those of `tinychat
eval -m RESULT --against SOURCE` on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tinychat_mlx.awq.calibration.recorder import window_of
from tinychat_mlx.awq.calibration.tokens import encoded, held_out
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.layer_stream import Ids, Progress, Watch
from tinychat_mlx.awq.quality.evaluate import Quality, Scores, evaluate
from tinychat_mlx.awq.quality.streamed_logits import Rounded, streamed
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Source
from tinychat_mlx.open import capacity_of
from tinychat_mlx.text.tokenizer import Tokenizer
from tinychat_mlx.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class QualityLoss:
    """Quality figures.

    `text` names the text. `of` maps each method to its quality against the dense model.
    """

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
    ids: Ids | None = None,
) -> QualityLoss:
    """Measure a finished conversion with the default settings of a run against the exact dense model.

    For awq+ the published AWQ algorithm is also measured: it converts with the calibration tokens `ids` into
    a temporary folder. `backend(exact)` returns a device. `text` is a file, or None for what calibration left
    unused. Raises UsageError.
    """
    raw = parse_config(source.config)
    window = window_of(raw)
    held = held_out(raw, source, lambda: backend(False), settings, window, text, watch)
    config = parse_config(source.config, capacity_of(None, raw.max_position_embeddings))  # as `load` does
    published = settings.method == "awq+" and ids is not None
    names = ["rtn", *(["awq"] if published else []), settings.method] if settings.method != "rtn" else ["rtn"]
    done, total = 0, (len(names) + 1) * config.num_hidden_layers

    def layer_done() -> None:
        nonlocal done
        done += 1
        watch(Progress("measure", done, total, f"{len(held.ids)} tokens: {held.origin}"))

    def scores(model: Source, exact: bool) -> Scores:
        return streamed(config, model, backend(exact), held.ids, window, layer_done)

    dense = scores(source, True)

    def measured(name: str) -> Quality:
        if name == settings.method:
            return evaluate(held.ids, scores(result, False), dense, window)
        if name == "rtn":
            return evaluate(held.ids, scores(Rounded(source, result), False), dense, window)
        with TemporaryDirectory(dir=result.folder.parent, prefix=f".{result.folder.name}.") as folder:
            plain, target = replace(settings, method=name), Path(folder) / name
            assert ids is not None
            convert(source, target, plain, backend, lambda *_: ids)
            return evaluate(held.ids, scores(Checkpoint.open(target), False), dense, window)

    return QualityLoss(held.origin, {name: measured(name) for name in names})


def check_text(source: Checkpoint, file: str) -> None:
    """Raise UsageError if the text is too short to measure on."""
    if (tokens := len(encoded(file, Tokenizer.load(source.folder)))) < 2:
        raise UsageError(
            f"the text has {tokens} tokens, at least two are needed", where=file, remedy="give a longer text"
        )
