"""`tinychat bench`: measure the speed of a model on this machine, and its share of the memory bandwidth.

    tinychat bench                                     llama-3.2-1b's shape with random weights: no download
    tinychat bench -m MODEL --depth 4096 --json
    tinychat bench -m MODEL --kernels                  on a Mac: select the fastest Metal kernels for this model
    tinychat bench --shape qwen2.5-0.5b --head int4 --against llama.cpp

A decoded token reads every weight once, so tokens/s = bandwidth / bytes per token is the upper bound. The table prints
the share of it that is reached. Results are medians of alternating repetitions after one warm-up. stdout has a table
or, with --json, one object; progress goes to stderr.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx.apps.setting_table import BACKENDS
from tinychat_mlx.base.errors import UsageError

if TYPE_CHECKING:
    from tinychat_mlx.apps.bench.measure import Plan

DEFAULT_SHAPE = "llama-3.2-1b"


@click.command()
@click.option("-m", "--model", metavar="MODEL", help="A folder, a Hugging Face id, or demo.")
@click.option("--shape", metavar="NAME", help=f"Random weights in a known model's sizes [{DEFAULT_SHAPE}].")
@click.option(
    "--head", type=click.Choice(["int4", "int8", "fp16"]), help="A shape's embedding and head [int8]."
)
@click.option(
    "--pp", type=click.IntRange(2), default=512, show_default=True, metavar="N", help="Prompt tokens."
)
@click.option(
    "--tg", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Decoded tokens."
)
@click.option("--depth", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Tokens in the cache before decoding.")  # fmt: skip
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Device backend."
)
@click.option("--exact", is_flag=True, help="Activations in full precision, not int8.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads, also of a peer.")
@click.option("--threads-sweep", is_flag=True, help="Measure with 1, 2, 4 … threads.")
@click.option(
    "--repeat", type=click.IntRange(5), default=5, show_default=True, metavar="N", help="Repetitions."
)
@click.option("--against", multiple=True, metavar="PEER",
              help="Also measure llama.cpp[:Q4_0|:Q4_K_M][:norepack] or torch (repeatable).")  # fmt: skip
@click.option(
    "--kernels", is_flag=True, help="Mac: time tinychat's Metal kernels against MLX's, and store the fastest."
)
@click.option(
    "--model-cost", is_flag=True, help="Mac: compute the tokens/s that each chip's bandwidth allows."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def bench(model: str | None, shape: str | None, as_json: bool, **options: Any) -> None:
    """Measure speed on this machine."""
    plan = _plan(model, shape, options)
    if options["model_cost"] or options["kernels"]:
        _on_mac(plan, options["kernels"], as_json)
    elif options["threads_sweep"]:
        _sweep(plan, as_json)
    else:
        from tinychat_mlx.apps.bench.measure import run

        result = run(plan, _say)
        if as_json:
            click.echo(json.dumps(result))
        else:
            from tinychat_mlx.apps.bench.table import show

            show(result)


def _plan(model: str | None, shape: str | None, options: dict[str, Any]) -> Plan:
    from tinychat_mlx.apps.bench.measure import Plan, parse_peer
    from tinychat_mlx.apps.bench.shapes import find
    from tinychat_mlx.open import choose

    if model is not None and shape is not None:
        raise UsageError("--model and --shape exclude each other", remedy="give one of them")
    if model is not None and options["head"] is not None:
        raise UsageError(
            "--head applies to --shape only; a model has its own head", remedy="leave out --head"
        )
    if model is None:
        shape = shape or DEFAULT_SHAPE
        find(shape)
    head = options["head"] or "int8"
    for peer in options["against"]:
        parse_peer(peer, head)
    names = ("pp", "tg", "depth", "threads", "exact", "repeat", "against")
    backend = "mlx" if options["model_cost"] or options["kernels"] else choose(options["backend"])[0]
    return Plan(model, shape, backend, head, **{name: options[name] for name in names})


def _say(line: str) -> None:
    click.echo(line, err=True)


def _sweep(plan: Plan, as_json: bool) -> None:
    """Run once per number of threads. The JSON object is that of the fastest decoder; "sweep" has the others."""
    from tinychat_mlx.apps.bench.measure import run
    from tinychat_mlx.apps.bench.table import show_sweep

    most = plan.threads or _cores()
    counts = sorted({1 << i for i in range(most.bit_length()) if 1 << i < most} | {most})
    results = [run(replace(plan, threads=count), _say) for count in counts]
    if as_json:
        best = max(results, key=lambda r: float(r["tg_tok_s"]))
        click.echo(json.dumps(best | {"sweep": results}))
    else:
        show_sweep(results)


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def _on_mac(plan: Plan, kernels: bool, as_json: bool) -> None:
    from tinychat_mlx.apps.bench import mac
    from tinychat_mlx.apps.bench.table import show_rows

    if kernels:
        result: Any = mac.kernels(plan, _say)
        rows = result["kernels"]
    else:
        result = rows = mac.model_cost(plan.config(), plan.depth)
    if as_json:
        click.echo(json.dumps(result))
    else:
        show_rows(rows)
