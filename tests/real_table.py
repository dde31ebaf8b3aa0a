"""python tests/real_table.py: measure every method at 4 and 3 bits on a trained model and real English.

Prints the quality table of the documents: KL to the float model in nats, in total and relative to plain
rounding per kind of text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import real_quality as rq
import real_text

from tinychat_mlx.awq.evaluate import Quality, kl_ratio

METHODS = [("rtn", "none"), ("awq", "file"), ("awq", "self"), ("awq+", "file"), ("awq+", "self")]


@dataclass
class Row:
    """One method at one number of bits, with a quality and conversion seconds per seed."""

    w_bit: int
    method: str
    calib: str
    found: list[Quality] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def middle(self, key: str) -> float:
        return mean(getattr(q, key) for q in self.found)

    def shares(self, base: Row) -> list[dict[str, float]]:
        """KL relative to plain rounding per kind, for each seed."""
        return [rq.shares(q, base.found[0]) for q in self.found]


def measure(row: Row, bench: rq.Bench, seeds: int) -> None:
    """Convert and compare for each seed. Plain rounding has no seeds."""
    for seed in range(1 if row.method == "rtn" else seeds):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            calib = "self" if row.method == "rtn" else row.calib  # plain rounding reads no text
            with contextlib.redirect_stdout(sys.stderr):
                row.seconds.append(rq.convert(target, row.method, row.w_bit, calib, seed))
            row.found.append(bench.quality(target))
        kl = row.found[-1].kl_mean
        print(f"{row.w_bit} bits, {row.method}, {row.calib}, seed {seed}: KL {kl:.4f}", file=sys.stderr)


def line(row: Row, base: Row) -> str:
    """Format means over seeds: the mean share of the kinds, its standard error, and its range over seeds."""
    of_seeds = row.shares(base)
    means = [rq.mean(s) for s in of_seeds]
    share = "1"
    if row is not base:
        share = f"{mean(means):.3f} ± {kl_ratio(row.found[0], base.found[0])[1]:.3f}"
        share += f" ({min(means):.3f} to {max(means):.3f})" if len(means) > 1 else ""
    kinds = (
        f"{mean(rq.of_kinds(q)[kind] for q in row.found):.3f} ({mean(s[kind] for s in of_seeds):.2f} ×)"
        for kind in real_text.KINDS
    )
    cells = [
        str(row.w_bit), row.method, row.calib, f"{row.middle('kl_mean'):.4f}", share, *kinds,
        f"{row.middle('ppl'):.2f}", f"{row.middle('top1'):.1%}", f"{mean(row.seconds):.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def markdown(rows: list[Row]) -> str:
    heads = [
        "bits",
        "method",
        "calibration",
        "KL",
        "of rtn's",
        *real_text.KINDS,
        "perplexity",
        "top-1",
        "seconds",
    ]
    first = rows[0].found[0]
    float_cells = ["16", "float", *[""] * (len(heads) - 5), f"{first.against_ppl:.2f}", "", ""]
    lines = [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        "| " + " | ".join(float_cells) + " |",
    ]
    for row in rows:
        lines.append(line(row, next(r for r in rows if r.method == "rtn" and r.w_bit == row.w_bit)))
    return "\n".join([*lines, "", f"{first.tokens} tokens in windows of {first.window}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", nargs="+", help="rtn is always measured", default=["awq", "awq+"])
    parser.add_argument("--calib", nargs="+", choices=["file", "self"], default=["file", "self"])
    parser.add_argument("--seeds", type=int, default=1, help="of the calibration text")
    parser.add_argument("--windows", type=int, default=rq.MOST, help=f"of each kind, at most {rq.MOST}")
    parser.add_argument("--json", action="store_true", help="also one JSON line with every seed")
    args = parser.parse_args()
    rows = [
        Row(bits, method, calib)
        for bits in args.bits
        for method, calib in METHODS
        if method == "rtn" or (method in args.methods and calib in args.calib)
    ]
    bench = rq.Bench(args.windows)
    for row in rows:
        measure(row, bench, args.seeds)
    print(markdown(rows))
    if args.json:
        keys = ("w_bit", "method", "calib", "seconds")
        every = [{k: getattr(r, k) for k in keys} | {"found": [q.as_dict() for q in r.found]} for r in rows]
        print(json.dumps(every))


if __name__ == "__main__":
    main()
