"""The README's quality table: every method at 4 and 3 bits, against the dense model, on held-out text.

    python -m tinychat_mlx.awq.table tests/data/demo-fp16 --text tests/data/demo_heldout_text.jsonl \\
        --calib tests/data/demo_calib.jsonl

A median over calibration seeds for each; "self" is text the model wrote itself. Prints Markdown, and JSON
on request.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tinychat_mlx.awq.calibrate import calibration_ids, encoded
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.evaluate import Quality, evaluate, scores
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.loading import choose, create, load


@dataclass(frozen=True)
class Row:
    """One line: what was done, and the quality at each seed."""

    method: str
    w_bit: int
    calib: str
    qualities: list[Quality]

    def middle(self, key: str) -> float:
        return float(median(getattr(q, key) for q in self.qualities))


def measured(args: argparse.Namespace, settings: Settings, make: Callable[[bool], Backend]) -> Quality:
    """Convert with these settings, measure, throw the result away."""
    source = Checkpoint.open(args.model)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        convert(
            source, target, settings, lambda: make(True),
            lambda config, src, _, s, window, watch: calibration_ids(
                config, src, lambda: make(False), s, window, watch
            ),
        )  # fmt: skip
        dense, small = (
            load(p, backend=args.backend, exact=True, threads=args.threads) for p in (args.model, target)
        )
        ids = encoded(args.text, dense.tokenizer)[: args.max_tokens]
        parts = [scores(m.engine.decoder, m.backend.to_host) for m in (small, dense)]
        return evaluate(ids, parts[0], parts[1])


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure everything, plain rounding first (it needs no calibration)."""
    name = choose(args.backend)[0]

    def make(exact: bool) -> Backend:
        return create(name, exact, args.threads)

    for w_bit in args.bits:
        plain = Settings(method="rtn", w_bit=w_bit, group_size=args.group_size)
        yield Row("rtn", w_bit, "none", [measured(args, plain, make)])
        for method in ("awq", "awq+"):
            for calib in [args.calib, "self"] if args.calib else ["self"]:
                done = replace(plain, method=method, calib=calib)
                seeds = [replace(done, seed=seed) for seed in range(args.seeds)]
                label = "self" if calib == "self" else Path(calib).name
                yield Row(method, w_bit, label, [measured(args, s, make) for s in seeds])


def markdown(found: list[Row]) -> str:
    lines = [
        "| bits | method | calibration | perplexity | KL mean | of rtn's | KL 99 % | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        base = next(r for r in found if r.method == "rtn" and r.w_bit == row.w_bit)
        share = row.middle("kl_mean") / base.middle("kl_mean")
        lines.append(
            f"| {row.w_bit} | {row.method} | {row.calib} | {row.middle('ppl'):.3f} | {row.middle('kl_mean'):.5f} "
            f"| {share:.2f} | {row.middle('kl_p99'):.4f} | {row.middle('top1'):.2%} |"
        )
    q = found[0].qualities[0]
    lines += ["", f"{q.tokens} held-out tokens in windows of {q.window}; medians over seeds."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="the dense model's folder")
    parser.add_argument("--text", required=True, help="held-out text: .txt or .jsonl")
    parser.add_argument("--calib", help="calibration text; self-written text is measured in any case")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="also one JSON line with every seed")
    args = parser.parse_args()
    found = []
    for row in rows(args):
        found.append(row)
        print(f"{row.w_bit} bits, {row.method}, {row.calib}: KL {row.middle('kl_mean'):.5f}", file=sys.stderr)
    print(markdown(found))
    if args.json:
        keys = ("method", "w_bit", "calib")
        print(
            json.dumps(
                [
                    {k: getattr(r, k) for k in keys} | {"seeds": [q.as_dict() for q in r.qualities]}
                    for r in found
                ]
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
