"""Upper bounds of speed: measured memory reads and int8 arithmetic, and the tokens/s that they allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinychat_mlx.apps.doctor.finding import NOTE, OK, Finding, Section
from tinychat_mlx.base.wording import size

ROOM = 1 << 30  # bytes that must be free: the measurement reads half of it
SIZES = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
CPU_SAVES = (
    16  # bits per group of int4 weights: scale and zero point share 16 bits in tiles (backends/cpu/pack.py)
)
COMPUTED = (
    "computed from these, not measured: weights as `tinychat convert` writes them, read once per token; "
    "two operations per weight and prompt token"
)


def speed(backend: str, elsewhere: float | None, free: int) -> Section:
    """Return the section. elsewhere: bytes/s measured in the chosen backend's process; None: measure the CPU here."""
    if elsewhere is not None:
        bandwidth, peak = elsewhere, None
    elif backend not in ("cpu", "reference"):
        text, do = f"not measured: the {backend or 'chosen'} backend does not start", "fix that first"
        return Section("speed", "Speed", (Finding("read_bytes_s", None, text, NOTE, do),))
    elif free < ROOM:
        text, do = f"not measured: it needs {size(ROOM)} of free memory", "close other programs"
        return Section("speed", "Speed", (Finding("read_bytes_s", None, text, NOTE, do),))
    else:
        bandwidth, peak = _measure()
    found = [Finding("read_bytes_s", bandwidth, f"{bandwidth / 1e9:.1f} GB/s read from memory", OK)]
    if peak is not None:
        found.append(Finding("int8_ops_s", peak, f"{peak / 1e9:.0f} billion int8 operations per second", OK))
    found.append(_expected(backend, bandwidth, peak, free))
    return Section("speed", "Speed", tuple(found))


def _measure() -> tuple[float, float]:
    """Return bytes/s and int8 operations/s of all threads. Takes less than two seconds at 2 GB/s or more."""
    from tinychat_mlx.backends.cpu import probe
    from tinychat_mlx.backends.cpu.backend import CpuBackend

    engine = CpuBackend().engine
    return probe.read_bandwidth(engine, repeats=3), probe.int8_peak(engine, repeats=2)


def _expected(backend: str, bandwidth: float, peak: float | None, free: int) -> Finding:
    """Return the maximum tokens/s of int4 models with an int8 head, as `tinychat convert` writes them."""
    from tinychat_mlx.backends.mlx import cost  # a cost model; imports no MLX

    form = replace(cost.OURS[8], shortlist=None)  # every weight: all must fit, and all may be read
    rows: list[dict[str, Any]] = []
    for name in SIZES:
        shape = cost.SHAPES[name]
        weights = shape.num_hidden_layers * sum(n * k for n, k in shape.linears)
        saved = weights * CPU_SAVES / form.group_size / 8 if backend == "cpu" else 0
        nbytes = round(cost.bytes_per_token(shape, form) - saved)
        prompt = peak / (2 * weights) if peak else None
        rows.append({"model": name, "bytes_per_token": nbytes, "tok_s": bandwidth / nbytes,
                     "prompt_tok_s": prompt, "fits": nbytes < free})  # fmt: skip
    words = [
        f"{r['model']} {_number(r['tok_s'])}"
        + (f" (prompt {_number(r['prompt_tok_s'])})" if r["prompt_tok_s"] else "")
        + ("" if r["fits"] else " (does not fit)")
        for r in rows
    ]
    return Finding("expected", rows, f"tokens/s at most: {', '.join(words)}; {COMPUTED}")


def _number(n: float) -> str:
    return f"{n:.0f}" if n >= 10 else f"{n:.1f}"
