"""Compare our quantiser with mlx-lm's AWQ on the same calibration tokens, bits, groups and text.

    python -m tinychat_mlx.awq.quality.versus tests/data/demo-fp16 --text tests/data/demo_heldout_text.jsonl \\
        --calib tests/data/demo_calib.jsonl --tokens 2048

mlx-lm's command always uses its own calibration text, so its functions are called with our tokens, and with
our bits and groups for embedding and head (its defaults are 4 bits in groups of 32). Both are timed from the
dense folder to the finished one. On MLX's CPU the model is loaded in float32, because 16-bit arithmetic is
slow there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tinychat_mlx.awq.layer_stream import Ids
from tinychat_mlx.awq.parallel import limited
from tinychat_mlx.awq.quality.evaluate import evaluate
from tinychat_mlx.awq.quality.table import Laboratory, Row, Run
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.base.errors import BackendError, ConfigError, TinychatError, UsageError
from tinychat_mlx.weights.checkpoint import Checkpoint

MINE = ("rtn", "awq", "awq+")


def mlx_lm_awq(source: Path, target: Path, ids: Ids, window: int, settings: Settings) -> float:
    """Quantise with mlx_lm.quant.awq.

    Returns the seconds. Raises BackendError without mlx-lm, and ConfigError.
    """
    try:
        mx, awq, utils = (import_module(name) for name in ("mlx.core", "mlx_lm.quant.awq", "mlx_lm.utils"))
    except ImportError as error:
        raise BackendError(
            f"this comparison needs mlx-lm ({error})", remedy="pip install mlx-lm 'mlx[cpu]'"
        ) from None
    start = time.perf_counter()
    model, tokenizer, config = utils.load(str(source), lazy=True, return_config=True)
    if config["model_type"] not in awq.AWQ_MODEL_CONFIGS:
        raise ConfigError(f"mlx_lm.awq does not support {config['model_type']}", where=source)
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    text: Any = mx.array(ids.reshape(-1, window))
    with redirect_stdout(sys.stderr):  # mlx-lm prints its progress to stdout
        awq.awq_quantize(
            model, text, awq.AWQ_MODEL_CONFIGS[config["model_type"]], bits=settings.w_bit,
            group_size=settings.group_size, embed_bits=settings.head_bits, embed_group_size=settings.group_size,
        )  # fmt: skip
    utils.save(target, str(source), model, tokenizer, awq.update_config(model, config))
    return time.perf_counter() - start


def compare(lab: Laboratory, settings: Settings) -> list[Row]:
    """Return one row for mlx_lm.awq and one for each of our methods."""
    window = lab.window
    made, *seconds = lab.text(settings, window)
    ids = made[: len(made) // window * window]
    if not len(ids):
        raise UsageError(
            f"{len(made)} tokens are fewer than one window of {window}",
            where="--tokens",
            remedy="give a larger number",
        )
    lab.texts[settings.calib, settings.seed] = ids, 0.0, seconds[1] * len(ids) / len(made)
    found = [Row("mlx_lm.awq", settings.w_bit, settings.calib)]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "theirs"
        say(f"mlx_lm.awq: {len(ids)} tokens in windows of {window}; this may take minutes")
        spent = mlx_lm_awq(lab.source.folder, target, ids, window, settings)
        quality = evaluate(lab.ids, lab.scores(Checkpoint.open(target)), lab.dense, window)
    found[0].runs.append(Run(quality, spent, spent / lab.texts[settings.calib, settings.seed][2]))
    say(f"mlx_lm.awq: {spent:.1f} s")
    for method in MINE:
        found.append(Row(method, settings.w_bit, settings.calib, [lab.run(replace(settings, method=method))]))
        say(f"{method}: {found[-1].middle('seconds'):.1f} s")
    return found


def markdown(found: list[Row], settings: Settings, tokens: int) -> str:
    theirs = found[0].runs[0]
    what = f"{settings.w_bit} bits, groups of {settings.group_size}"
    lines = [
        f"| {what} | seconds | mlx_lm.awq's / its | perplexity | KL mean | of mlx_lm.awq's | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        run, q = row.runs[0], row.runs[0].quality
        assert q.kl_mean is not None and theirs.quality.kl_mean is not None
        lines.append(
            f"| {row.method} | {run.seconds:.1f} | {theirs.seconds / run.seconds:.1f} × | {q.ppl:.3f} ± {q.ppl_se:.3f} "
            f"| {q.kl_mean:.5f} ± {q.kl_mean_se:.5f} | {q.kl_mean / theirs.quality.kl_mean:.2f} | {q.top1:.2%} |"
        )
    edges = f"embedding and head {settings.head_bits} bits in all of them"
    q = theirs.quality
    return "\n".join(lines) + (
        f"\n\n{tokens} calibration tokens, {edges}; {q.tokens} measured tokens in windows of {q.window}, "
        f"perplexity of the dense model {q.against_ppl:.3f}."
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="the dense model's folder")
    parser.add_argument("--text", required=True, help="held-out text: .txt, .jsonl, …")
    parser.add_argument("--calib", required=True, help="calibration text: a file, or self")
    parser.add_argument("--tokens", type=int, default=2048, help="number of calibration tokens")
    parser.add_argument("--w-bit", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=0, help="0: the largest that fits the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=None, help="measure the first N tokens only")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    try:
        settings = Settings(
            w_bit=args.w_bit, group_size=args.group_size, calib=args.calib, tokens=args.tokens, seed=args.seed
        )
        with limited(args.threads):
            lab = Laboratory(args)
            settings = settings.resolved(lab.config)
            found = compare(lab, settings)
    except (TinychatError, OSError) as error:
        say(f"error: {error}")
        return 1
    print(markdown(found, settings, len(lab.texts[settings.calib, settings.seed][0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
