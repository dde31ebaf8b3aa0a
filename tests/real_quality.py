"""Measure the quality loss of a trained model's conversions on real English: KL per kind of text."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import real_model
import real_text

from tinychat_mlx.apps.cli import main as tinychat
from tinychat_mlx.awq.calibrate import encoded
from tinychat_mlx.awq.evaluate import Quality, Scores, evaluate
from tinychat_mlx.awq.whole import streamed
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.loading import create
from tinychat_mlx.tokenizer import Tokenizer

WINDOW = 512  # tokens
MOST = 10  # maximum windows per kind of text


def convert(
    target: Path, method: str = "awq+", w_bit: int = 4, calib: str = "self", seed: int = 0, tokens: int = 0
) -> float:
    """Run `tinychat convert` on the trained model.

    Returns seconds. calib: "self", or "file" for the mixed text. tokens 0: the default number.
    """
    text = str(real_text.calibration()) if calib == "file" else calib
    chosen = ["--method", method, "--w-bit", str(w_bit), "--calib", text, "--seed", str(seed)]
    if tokens:
        chosen += ["--calib-tokens", str(tokens)]
    start = time.perf_counter()
    code = tinychat(["convert", str(real_model.folder()), "-o", str(target), *chosen])
    if code:
        raise RuntimeError(f"tinychat convert ended with exit code {code}")
    return time.perf_counter() - start


class Bench:
    """The float model's predictions on evenly spaced windows of each kind, computed once."""

    def __init__(self, windows: int = MOST) -> None:
        """windows: per kind, at most MOST."""
        self.device = create("cpu", True, None)
        tokenizer = Tokenizer.load(real_model.folder())
        self.ids: list[int] = []
        for kind in real_text.KINDS:
            ids = encoded(str(real_text.evaluation(kind)), tokenizer)
            for i in range(windows):
                at = MOST * i // windows * WINDOW
                self.ids += ids[at : at + WINDOW]
        if len(self.ids) != len(real_text.KINDS) * windows * WINDOW:
            raise RuntimeError(
                f"{len(self.ids)} tokens: the text is too short for {windows} windows of each kind"
            )
        self.dense = self.scores(real_model.folder())

    def scores(self, folder: Path) -> Scores:
        checkpoint = Checkpoint.open(folder)
        return streamed(parse_config(checkpoint.config), checkpoint, self.device, self.ids, WINDOW)

    def quality(self, folder: Path) -> Quality:
        """Quality of a converted folder over all kinds."""
        return evaluate(self.ids, self.scores(folder), self.dense, WINDOW)


def of_kinds(quality: Quality) -> dict[str, float]:
    """Mean KL in nats per kind of text."""
    sums = np.array(quality.kl_sums).reshape(len(real_text.KINDS), -1)
    means = sums.sum(1) / (sums.shape[1] * (WINDOW - 1))
    return dict(zip(real_text.KINDS, means.tolist(), strict=True))


def shares(quality: Quality, base: Quality) -> dict[str, float]:
    """KL relative to plain rounding, per kind."""
    ours, theirs = of_kinds(quality), of_kinds(base)
    return {kind: ours[kind] / theirs[kind] for kind in ours}


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
