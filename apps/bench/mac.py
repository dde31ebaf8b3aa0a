"""`bench --kernels` and `bench --model-cost`: the mlx backend's kernel selection and its roofline model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tinychat_mlx.apps.bench.measure import Plan, own_options
from tinychat_mlx.apps.bench.ours import Subject
from tinychat_mlx.apps.bench.worker import Worker
from tinychat_mlx.base.errors import BackendError

if TYPE_CHECKING:
    from tinychat_mlx.backends.mlx.bench import Trial


def model_cost(config: Mapping[str, Any], depth: int) -> list[dict[str, Any]]:
    """Compute bytes and launches per token, and the tokens per second that they allow on each chip, without a run."""
    from tinychat_mlx.backends.mlx import cost

    shape = cost.Shape.of(config)
    return cost.reads(shape, depth) + cost.table(shape, depth)


def kernels(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Time tinychat's Metal kernels against MLX's, and steps with and without mx.compile; store the fastest."""
    try:
        from tinychat_mlx.backends.mlx import bench
    except ImportError as e:
        raise BackendError(
            f"mlx does not load ({e})",
            where="bench --kernels",
            remedy="run `pip install mlx` on a Mac with Apple silicon",
        ) from None
    bench.mac()
    options = own_options(plan) | {"backend": "mlx"}
    results, file = bench.run(
        products(options), lambda r: say(f"{r.key}: {r.ours_us:.1f} µs, stock {r.stock_us:.1f} µs")
    )
    steps = {}
    for capture in ("1", "0"):  # one after another, because each holds a whole model
        with closing(Worker("ours", options, env={"TINYCHAT_MLX_CAPTURE": capture})) as worker:
            worker.opened()
            times = [worker.call("decode") for _ in range(plan.repeat + 1)]
            steps[capture] = 1e6 * min(times[1:]) / plan.tg
    bench.keep_capture(steps["1"], steps["0"])
    shown = [asdict(r) | {"wins": r.wins} for r in results]
    return {"kernels": shown, "captured_us": steps["1"], "eager_us": steps["0"], "kept_in": file}


def products(options: dict[str, Any]) -> list[Trial]:
    """Time the products of this model at 1 to 8 rows: its shapes, bits, groups, norms, activation, biases."""
    from tinychat_mlx.backends.mlx import bench
    from tinychat_mlx.backends.mlx.backend import MlxBackend

    decoder = Subject(**options | {"pp": 2, "tg": 1, "depth": 0}).decoder
    cache = decoder.new_cache(max(bench.ROWS))
    assert isinstance(decoder.backend, MlxBackend)

    def step(rows: int) -> None:
        decoder.forward([1] * rows, cache, last_only=False)
        cache.rewind(0)

    return bench.products(decoder.backend, step)
