"""Correctness on the GPU at hand, then its speed: python tests/emulators/cuda/measure.py --out cuda.json [--dry]

1. every tiny architecture against `reference`, in fp16 with our kernels; nothing is timed if one is wrong;
2. read bandwidth: the best of torch's copy and sum over 1 GiB;
3. for each shape, with random int4 weights (group 128, head int8): the matvec over more weights than the L2
   cache holds, as a share of that bandwidth, compared with torch's int4 product and a Triton kernel of the
   usual AWQ kind; end-to-end decoding with sampling on the device; graph launches; 2048 tokens of prefill,
   compared with torch's fp16 products of the same shapes.

Prints a Markdown table for docs/devices.md and writes everything as JSON. --dry runs the same code on CPU
tensors with a toy shape; its figures are meaningless and are marked as such.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
SHAPES = ("llama-2-7b", "llama-3.1-8b")
ROUNDS = 5  # of each timing; the best is used, the spread is recorded


def clock(device: Any, work: Callable[[], object], repeat: int) -> dict[str, float]:
    """Return seconds per `work`: best and median of ROUNDS, each of `repeat` calls after a warm-up."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    times = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(repeat):
            work()
        wait()
        times.append((time.perf_counter() - start) / repeat)
    return {"best_s": min(times), "median_s": sorted(times)[ROUNDS // 2]}


def correct(make: Callable[[], Any], dry: bool) -> dict[str, float]:
    """Return family -> largest error relative to the fp16 bound (see test_cuda_backend.py), at most 1."""
    import models

    from tinychat_mlx.backends.reference import ReferenceBackend
    from tinychat_mlx.model.families import ARCHITECTURES

    ids, found = [5, 80, 13, 2, 96, 41, 7, 7, 30, 64, 11], {}
    for family in ["llama", "qwen3"] if dry else sorted(n for n, s in ARCHITECTURES.items() if not s.moe):
        config = models.config_of(family, intermediate_size=256)
        expected = models.whole(models.decoder(config, ReferenceBackend(), "int4", 64), ids)
        model = models.decoder(config, make(), "int4", 64)
        cache = model.new_cache(32)
        steps = np.concatenate([model.backend.to_host(model.forward([i], cache)) for i in ids])
        bound = 4 * 37**0.5 * 2**-11 * float(np.sqrt(np.square(expected).mean()))
        worst = max(np.abs(got - expected).max() for got in (models.whole(model, ids), steps))
        found[family] = float(worst / bound)
        if not worst <= bound:
            sys.exit(f"{family} is wrong: {worst:.2e}, allowed {bound:.2e}. Nothing was timed.")
    return found


def bandwidth(device: Any, size: int) -> float:
    """Return the bytes per second that torch reads (sum) or reads and writes (copy), whichever is larger."""
    import torch

    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    read = size / clock(device, x.sum, 4)["best_s"]
    return max(read, 2 * size / clock(device, lambda: y.copy_(x), 4)["best_s"])


def products(config: Any) -> list[tuple[int, int]]:
    """Return (N, K) of a layer's matrices: qkv, o, gate and up, down."""
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return [
        (heads, c.hidden_size),
        (c.hidden_size, c.num_attention_heads * c.head_dim),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    ]


def round_robin(makes: list[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that calls each once in turn, so that no weight stays in a cache."""

    def around() -> None:
        for make in makes:
            make()

    return around


def recorded(device: Any, work: Callable[[], object]) -> Callable[[], object]:
    """Record `work` as one CUDA graph, so that launches from Python are not timed."""
    import torch

    if device.type != "cuda":
        return work
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], object] = graph.replay
    return replay


def matvecs(backend: Any, config: Any, cold: int) -> dict[str, Any]:
    """Time the products of one row with a layer's matrices, over copies that exceed `cold` bytes in total.

    Also times the peers.
    """
    import peers
    from models import random_packed

    rng, device = np.random.default_rng(0), backend.device
    sets: dict[str, list[Callable[[], object]]] = {"ours": []}
    held, missing = 0, {}
    for n, k in products(config):
        weight = random_packed(rng, n, k, 4, 128)
        copies = max(-(-cold // (4 * weight.nbytes)), 1)
        x = backend.put(rng.standard_normal((1, k)).astype(np.float32)).to(backend.dtype)
        for _ in range(copies):
            handle = backend.pack(weight)
            held += handle.nbytes
            sets["ours"].append(lambda x=x, w=handle: backend.linear(x, w))
        for name, make in peers.MATVECS.items():
            try:
                sets.setdefault(name, []).extend(make(weight, x, copies, device))
            except (peers.MissingError, RuntimeError, ImportError) as e:
                missing[name] = str(e).splitlines()[0]
    timed = {}
    for name, calls in sets.items():
        if name not in missing:
            timed[name] = clock(device, recorded(device, round_robin(calls)), 4)
    for result in timed.values():
        result["gb_s"] = held / result["best_s"] / 1e9  # the same weights, counted in our bytes, for all
    return {**timed, "missing": missing}


def decode(model: Any, tokens: int, context: int) -> dict[str, Any]:
    """Time `tokens` after `context`, greedy; on a GPU sampled on the device, one step ahead, like the chat."""
    backend, cache = model.backend, model.new_cache(context + tokens + 8)
    model.forward([i % 1000 + 1 for i in range(context)], cache)
    draw = backend.sampler(0.0, 0, 1.0, 0.0, 0)
    token, replay = backend.ids([7]), model._one_row
    for _ in range(3):  # compile, record, replay
        logits = model.advance(token, cache)
    before, start = getattr(replay, "replays", 0), time.perf_counter()
    pending = None
    for _ in range(tokens):
        logits = model.advance(token, cache)
        token = draw(logits) if draw else backend.ids([int(backend.to_host(logits)[0].argmax())])
        if pending is not None:
            backend.to_host(pending)
        pending = token
    backend.to_host(pending)
    seconds = time.perf_counter() - start
    launches = (getattr(replay, "replays", 0) - before) / tokens
    return {
        "tok_s": tokens / seconds,
        "graph_launches_per_token": launches,
        "context": context,
        "tokens": tokens,
    }


def prefill(model: Any, config: Any, tokens: int) -> dict[str, Any]:
    """Time `tokens` in the engine's pieces, and torch's fp16 products of the same shapes (without attention)."""
    import torch

    from tinychat_mlx.engine.engine import PREFILL_ROWS

    backend, ids = model.backend, [i % 1000 + 1 for i in range(tokens)]
    cache = model.new_cache(tokens)

    def ours() -> None:
        cache.rewind(0)
        for at in range(0, tokens, PREFILL_ROWS):
            model.forward(ids[at : at + PREFILL_ROWS], cache)

    seconds = clock(backend.device, ours, 1)["best_s"]
    dense_s = 0.0
    for n, k in products(config):
        w = torch.empty((n, k), dtype=backend.dtype, device=backend.device).normal_()
        x = torch.empty((tokens, k), dtype=backend.dtype, device=backend.device).normal_()
        product = recorded(backend.device, lambda x=x, w=w: torch.nn.functional.linear(x, w))
        dense_s += clock(backend.device, product, 4)["best_s"]
    dense_s *= config.num_hidden_layers
    return {"tok_s": tokens / seconds, "tokens": tokens, "share_of_torch_fp16_products": dense_s / seconds}


def token_bytes(model: Any) -> int:
    """Return the bytes that one step reads: every weight except the embedding rows that are not needed."""
    handles = [h for layer in model.layers for h in (*layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down)]
    return sum(h.nbytes for h in handles) + int(model.head.nbytes)


def measured(shape: str, make: Callable[[], Any], rate: float, dry: bool) -> dict[str, Any]:
    from tinychat_mlx.apps.bench.shapes import find
    from tinychat_mlx.apps.bench.synthetic import RandomSource
    from tinychat_mlx.model.config import parse_config
    from tinychat_mlx.model.decoder import Decoder

    config, backend = parse_config(find(shape)), make()
    alone = matvecs(backend, config, (1 << 20) if dry else (512 << 20))
    model = Decoder(config, RandomSource(find(shape)), backend)
    talk = decode(model, 4 if dry else 256, 16 if dry else 128)
    read = token_bytes(model)
    return {
        "matvec": {**alone, "share": alone["ours"]["gb_s"] * 1e9 / rate},
        "decode": {**talk, "bytes_per_token": read, "share": talk["tok_s"] * read / rate},
        "prefill": prefill(model, config, 64 if dry else 2048),
        "memory_bytes": backend.memory().peak,
    }


def table(report: dict[str, Any]) -> str:
    """Format Markdown for docs/devices.md: a row per shape."""
    dry = " A dry run on a CPU: these figures are no measurement." if report["dry"] else ""
    lines = [
        f"{report['device']}, {report['date']}: reads {report['bandwidth_gb_s']:.0f} GB/s.{dry}",
        "",
        "| shape | decode tok/s | share of bandwidth | only matvec | torch int4 | Triton AWQ | prefill tok/s "
        + "| of torch fp16 | graph launches per token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, r in report["shapes"].items():
        peers = [
            f"{r['matvec'][p]['gb_s']:.0f} GB/s" if p in r["matvec"] else "–"
            for p in ("torch int4", "triton awq")
        ]
        lines.append(
            f"| {shape} | {r['decode']['tok_s']:.1f} | {r['decode']['share']:.0%} | {r['matvec']['share']:.0%} "
            f"({r['matvec']['ours']['gb_s']:.0f} GB/s) | {peers[0]} | {peers[1]} | {r['prefill']['tok_s']:.0f} "
            f"| {r['prefill']['share_of_torch_fp16_products']:.0%} "
            f"| {r['decode']['graph_launches_per_token']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, then time, the cuda backend.")
    parser.add_argument("--out", type=Path, default=Path("cuda-measured.json"))
    parser.add_argument("--dry", action="store_true", help="run on CPU tensors with a toy shape")
    parser.add_argument("--shape", action="append", help=f"default: {', '.join(SHAPES)}")
    options = parser.parse_args()
    if options.dry:
        os.environ["TINYCHAT_CUDA_DEVICE"] = "cpu"
    from tinychat_mlx.backends.cuda.backend import CudaBackend

    backend = CudaBackend()
    shown = backend.describe()
    report: dict[str, Any] = {
        "dry": options.dry,
        "date": datetime.date.today().isoformat(),
        "device": f"{shown.name} ({shown.detail})",
        "errors_over_bound": correct(CudaBackend, options.dry),
        "bandwidth_gb_s": bandwidth(backend.device, (16 << 20) if options.dry else (1 << 30)) / 1e9,
        "shapes": {},
    }
    for shape in options.shape or (["tiny"] if options.dry else SHAPES):
        rate = report["bandwidth_gb_s"] * 1e9
        report["shapes"][shape] = measured(shape, CudaBackend, rate, options.dry)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
