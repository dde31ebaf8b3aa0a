"""Print the quality table of docs/quantising.md: each method at 4 and 3 bits against the dense model.

    python -m tinychat_mlx.awq.quality.table tests/data/demo-fp16 --text tests/data/demo_heldout_text.jsonl \\
        --calib tests/data/demo_calib.jsonl

Each figure is a median over calibration seeds. "self" is text that the model generated. The calibration text
of a seed and the dense model's last rows are computed once and shared. Prints the table, then a table with
all measurements, and JSON on request. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from statistics import median

from tinychat_mlx.awq.calibration.recorder import window_of
from tinychat_mlx.awq.calibration.tokens import calibration_ids, encoded
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.layer_stream import Ids
from tinychat_mlx.awq.parallel import limited
from tinychat_mlx.awq.quality.evaluate import Quality, Scores, evaluate, kl_ratio, scores
from tinychat_mlx.awq.quality.streamed_logits import streamed
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.open import choose, create
from tinychat_mlx.text.tokenizer import Tokenizer
from tinychat_mlx.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Run:
    """One conversion: its quality, its seconds with the calibration text, and the same in forward passes."""

    quality: Quality
    seconds: float
    forwards: float


@dataclass
class Row:
    """One table row: what was converted, and the run of each seed."""

    method: str
    w_bit: int
    calib: str
    runs: list[Run] = field(default_factory=list)

    def middle(self, key: str) -> float:
        own = key in ("seconds", "forwards")
        return float(median(getattr(r if own else r.quality, key) for r in self.runs))

    def share(self, base: Row) -> tuple[float, float]:
        """Return the ratio of median KL to that of `base`, and the standard error of the median seed's ratio."""
        inner = sorted(self.runs, key=lambda r: r.quality.kl_mean or 0)[(len(self.runs) - 1) // 2]
        return self.middle("kl_mean") / base.middle("kl_mean"), kl_ratio(inner.quality, base.runs[0].quality)[
            1
        ]


class Laboratory:
    """A dense model on one device, measured once, against which conversions are measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.source = Checkpoint.open(args.model)
        self.config = parse_config(self.source.config)
        self.backend, self.threads = choose(args.backend)[0], args.threads
        self.device, self.running = self.make(exact=True), self.make(exact=False)
        self.window = window_of(self.config)
        self.ids = encoded(args.text, Tokenizer.load(self.source.folder))[: args.max_tokens]
        self.dense = self.scores(self.source)
        self.texts: dict[tuple[str, int], tuple[Ids, float, float]] = {}

    def make(self, exact: bool) -> Backend:
        return create(self.backend, exact, self.threads)

    def made(self, exact: bool) -> Backend:
        return self.device if exact else self.running

    def scores(self, checkpoint: Checkpoint) -> Scores:
        config = parse_config(checkpoint.config)
        return streamed(config, checkpoint, self.device, self.ids, self.window)

    def text(self, settings: Settings, window: int) -> tuple[Ids, float, float]:
        """Return calibration tokens, the seconds to create them, and the seconds of a forward pass over them."""
        key = (settings.calib, settings.seed)
        if key not in self.texts:
            start = time.perf_counter()
            ids = calibration_ids(
                self.config, self.source, lambda: self.running, settings, window, lambda p: None
            )
            making = time.perf_counter() - start
            self.texts[key] = ids, making, forward_seconds(self.config, self.source, self.device, ids, window)
        return self.texts[key]

    def run(self, settings: Settings) -> Run:
        """Convert with these settings, measure the result and delete it."""
        made = [0.0, nan]  # plain rounding needs no text

        def calibrate(_: object, __: object, ___: object, s: Settings, window: int, ____: object) -> Ids:
            ids, *made[:] = self.text(s, window)
            return ids

        if settings.method != "rtn":
            self.text(settings, self.window)  # not timed here: the time for the text is added below
        with tempfile.TemporaryDirectory() as folder:
            target, start = Path(folder) / "model", time.perf_counter()
            convert(self.source, target, settings, self.made, calibrate)
            seconds = time.perf_counter() - start + made[0]
            quality = evaluate(self.ids, self.scores(Checkpoint.open(target)), self.dense, self.window)
        return Run(quality, seconds, seconds / made[1])


def forward_seconds(
    config: ModelConfig, source: Checkpoint, device: Backend, ids: Sequence[int] | Ids, window: int
) -> float:
    """Time one pass of the whole model with its head over the windows of a text.

    Weights are loaded before.
    """
    of = scores(Decoder(config, source, device), device.to_host)
    text = [int(i) for i in ids]
    for _ in of(text[:window], 0):  # warm-up
        pass
    start = time.perf_counter()
    for at in range(0, len(text), window):
        for _ in of(text[at : at + window], at):
            pass
    return time.perf_counter() - start


def rows(args: argparse.Namespace) -> Iterator[tuple[Row, list[Settings]]]:
    """Yield the empty rows of the table and the conversions that fill them."""
    for w_bit in args.bits:
        plain = Settings(method="rtn", w_bit=w_bit, group_size=args.group_size, tokens=args.calib_tokens)
        yield Row("rtn", w_bit, "none"), [plain]
        for method in ("awq", "awq+"):
            for calib in [args.calib, "self"] if args.calib else ["self"]:
                label = "self" if calib == "self" else Path(calib).name
                done = replace(plain, method=method, calib=calib)
                yield Row(method, w_bit, label), [replace(done, seed=seed) for seed in range(args.seeds)]


def fill(lab: Laboratory, planned: list[tuple[Row, list[Settings]]]) -> None:
    """Run all conversions. Prints each result and the estimated remaining time to stderr."""
    total, start, done = sum(len(s) for _, s in planned), time.perf_counter(), 0
    for row, settings in planned:
        for one in settings:
            run = lab.run(one)
            row.runs.append(run)
            done += 1
            left = (time.perf_counter() - start) / done * (total - done) / 60
            print(
                f"[{done}/{total}] {row.w_bit} bits, {row.method}, {row.calib}, seed {one.seed}: "
                f"KL {run.quality.kl_mean:.5f}, {run.seconds:.1f} s; about {left:.0f} min left",
                file=sys.stderr,
            )


def readme(found: list[Row]) -> str:
    """Format the table of docs/quantising.md: a row per number of bits, a column per method and kind of text."""
    bits = list(dict.fromkeys(row.w_bit for row in found))
    columns = [row for row in found if row.w_bit == bits[0] and row.method != "rtn"]
    heads = [f"{row.method}, {'self' if row.calib == 'self' else 'real text'}" for row in columns]
    lines = [f"| bits | rtn | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
    for w_bit in bits:
        base, *others = (row for row in found if row.w_bit == w_bit)
        cells = [f"{base.middle('kl_mean'):#.3g}"]
        for row in others:
            share, error = row.share(base)
            cells.append(f"{row.middle('kl_mean'):#.3g} ({share:.2f} ± {error:.2f} ×)")
        lines.append(f"| {w_bit} | {' | '.join(cells)} |")
    passes = " | ".join(f"{row.middle('forwards'):.1f}" for row in columns)
    return "\n".join([*lines, f"| forward passes | | {passes} |"])


def markdown(found: list[Row], backend: str) -> str:
    lines = [
        "| bits | method | calibration | perplexity | KL mean | of rtn's | KL 99 % | top-1 | seconds | forwards |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = found[0].runs[0].quality
    lines.append(f"| 16 | dense | none | {first.against_ppl:.3f} | | | | | | |")
    for row in found:
        base = next(r for r in found if r.method == "rtn" and r.w_bit == row.w_bit)
        share, error = row.share(base)
        of_rtn = f"{share:.3f}" if row is base else f"{share:.3f} ± {error:.3f}"
        forwards = "" if row.method == "rtn" else f"{row.middle('forwards'):.1f}"
        lines.append(
            f"| {row.w_bit} | {row.method} | {row.calib} | {row.middle('ppl'):.3f} | {row.middle('kl_mean'):.5f} "
            f"| {of_rtn} | {row.middle('kl_p99'):.4f} | {row.middle('top1'):.2%} | {row.middle('seconds'):.1f} "
            f"| {forwards} |"
        )
    seeds = max(len(row.runs) for row in found)
    return "\n".join([*lines, ""]) + (
        f"\n{first.tokens} held-out tokens in windows of {first.window}; medians over {seeds} calibration seeds; "
        f"standard error of rtn's KL at {found[0].w_bit} bits {first.kl_mean_se:.5f}; that of a ratio pairs the "
        f"windows. Seconds: the whole conversion "
        f"({backend}), including its calibration text. Forwards: the same in passes of the calibration "
        "tokens through the dense model on the same backend."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="the dense model's folder")
    parser.add_argument("--text", required=True, help="held-out text: .txt, .jsonl, …")
    parser.add_argument(
        "--calib", help="calibration text; text that the model generates is always measured too"
    )
    parser.add_argument("--calib-tokens", type=int, default=0, help="0: chosen by the model's size")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=0, help="0: the largest that fits the model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=None, help="measure the first N tokens only")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="also one JSON line with every seed")
    args = parser.parse_args(argv)
    try:
        with limited(args.threads):
            lab, planned = Laboratory(args), list(rows(args))
            fill(lab, planned)
    except (TinychatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = [row for row, _ in planned]
    print(readme(found), end="\n\n")
    print(markdown(found, lab.device.describe().name))
    if args.json:
        print(
            json.dumps(
                [{"method": r.method, "w_bit": r.w_bit, "calib": r.calib, "seeds": seeds(r)} for r in found]
            )
        )
    return 0


def seeds(row: Row) -> list[dict[str, float]]:
    """Return every run of a row, without the values that plain rounding does not have."""
    own = ("seconds", "forwards")
    return [{k: v for k in own if isfinite(v := getattr(r, k))} | r.quality.as_dict() for r in row.runs]


if __name__ == "__main__":
    sys.exit(main())
