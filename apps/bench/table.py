"""Print a benchmark result: one row per subject, and the machine's limits below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tinychat_mlx.base.wording import size


def show(result: dict[str, Any]) -> None:
    """Print a run to stdout."""
    console = _console()
    console.print(f"{result['shape']} on {result['backend']}: {result['device']} ({result['detail']})")
    at = f" after {result['depth']}" if result["depth"] else ""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("median ± sd", no_wrap=True)
    names = (
        f"pp{result['pp']} tok/s",
        f"tg{result['tg']}{at} tok/s",
        "per token",
        "GB/s",
        "load",
        "peak memory",
    )
    for name in (*names, "ours / its pp", "ours / its tg"):
        table.add_column(name, justify="right")
    head = f" head {result['head']}" if result["head"] else ""
    table.add_row(f"ours{head}", *_speeds(result))
    peers = [p for p in result["peers"] if "pp_tok_s" in p]
    for peer in peers:
        table.add_row(peer["name"], *_speeds(peer), *(_ratio(peer[k]) for k in ("pp_ratio", "tg_ratio")))
    console.print(table)
    for line in _below(result):
        console.print(line)


def _speeds(r: dict[str, Any]) -> list[str]:
    def both(name: str) -> str:
        return f"{r[name]:.1f} ± {r['spread'][name]['sd']:.1f}"

    gb_s = r["bytes_per_token"] * r["tg_tok_s"] / 1e9
    return [both("pp_tok_s"), both("tg_tok_s"), size(r["bytes_per_token"]), f"{gb_s:.1f}",
            f"{r['load_s']:.2f} s", size(r["rss_bytes"])]  # fmt: skip


def _ratio(r: dict[str, Any]) -> str:
    return f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})"


def _below(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["bandwidth_gb_s"] is not None:
        spread, used = result["spread"]["bandwidth_gb_s"], result["spread"]["mbu"]
        lines.append(
            f"memory: {result['bandwidth_gb_s']:.1f} GB/s read in each round ({spread['min']:.1f}–"
            f"{spread['max']:.1f}); decoding uses {result['mbu']:.0%} of it ({used['min']:.0%}–{used['max']:.0%})"
            f"{' (so the model fits in a CPU cache)' if result['mbu'] > 1.1 else ''}"
        )
    text = f"prefill: {result['prefill_gop_s']:.0f} GOP/s in total"
    if result["matmul_gop_s"] is not None:
        text += f", {result['matmul_gop_s']:.0f} in its matrix products"
        if result["int8_peak_gop_s"] is not None:
            share = result["matmul_gop_s"] / result["int8_peak_gop_s"]
            text += f", {share:.0%} of the int8 peak of {result['int8_peak_gop_s']:.0f}"
    lines.append(text)
    over = result["rss_bytes"] / (result["weight_bytes"] + result["kv_bytes"])
    lines.append(
        f"peak memory: {size(result['rss_bytes'])}, {over:.2f} × weights "
        f"({size(result['weight_bytes'])}) and KV cache ({size(result['kv_bytes'])})"
    )
    for peer in result["peers"]:
        if "matvec_gb_s" in peer:
            lines.append(
                f"torch {peer['version']}, products only: int4 {peer['matvec_gb_s']:.1f} GB/s at one row, "
                f"{peer['matmul_gop_s']:.0f} GOP/s at many, dense bf16 {peer['bf16_gop_s']:.0f}; ours / its: "
                + ", ".join(
                    f"{name} {_ratio(peer[key])}"
                    for key, name in (("tg_ratio", "read"), ("matmul_ratio", "int4"), ("bf16_ratio", "bf16"))
                    if key in peer
                )
            )
    return lines


def show_sweep(results: Sequence[dict[str, Any]]) -> None:
    """Print the speed per number of threads."""
    rows = [
        {"threads": r["threads"], "pp tok/s": f"{r['pp_tok_s']:.1f}", "tg tok/s": f"{r['tg_tok_s']:.1f}",
         "of the bandwidth": "" if r["mbu"] is None else f"{r['mbu']:.0%}"}
        for r in results
    ]  # fmt: skip
    show_rows(rows)


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print dictionaries with the same keys, one per row."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(str(name), justify="right")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    _console().print(table)


def _console() -> Console:
    """Return a console; without a terminal it is wide enough that lines in a log are not wrapped."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)
