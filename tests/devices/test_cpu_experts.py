"""Mixtures of experts on the native kernels: routed, multiplied and replayed without the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import decoder, logits
from tiny_models import tiny

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.cpu.experts import Experts, Places
from tinychat_mlx.backends.cpu.recorded_step import Captured
from tinychat_mlx.contract import Mlp, Moe, Norm, route
from tinychat_mlx.weights.weight import Dense, Packed, Weight, pack_codes

EPS = 2.0**-24  # half a unit in the last place of float32
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
Pairs = list[tuple[Weight, Weight]]


@pytest.fixture(params=c.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TINYCHAT_CPU_ISA", request.param)
    return str(request.param)


def weight(rng: np.random.Generator, n: int, k: int, form: str) -> Weight:
    """form: "dense", or bits and group: "4g32"."""
    bias = rng.standard_normal(n).astype(np.float32) if n % 3 else None
    if form == "dense":
        return Dense("w", (rng.standard_normal((n, k)) / k**0.5).astype(np.float16), bias)
    w_bit, group = (int(i) for i in form.split("g"))
    q = rng.integers(0, 2**w_bit, (n, k), dtype=np.uint8)
    scales = (rng.uniform(1, 3, (n, k // group)) / 2**w_bit / k**0.5).astype(np.float16)
    return Packed("w", pack_codes(q, w_bit), scales, (-scales * 2 ** (w_bit - 1)), w_bit, group, bias)


def mixture(
    backend: CpuBackend, hidden: int, sizes: list[int], forms: list[str], k: int, shared: bool
) -> tuple[Moe, tuple[Mlp, ...]]:
    """Return random experts as the backend packs them, and the same ones as separate weights."""
    rng = np.random.default_rng(len(sizes) * 1000 + hidden)
    pairs: Pairs = [
        (weight(rng, 2 * f, hidden, form), weight(rng, hidden, f, form))
        for f, form in zip(sizes, forms, strict=True)
    ]
    router = backend.pack(Dense("r", rng.standard_normal((len(sizes), hidden)).astype(np.float32) / 4))
    packed: Any = backend.pack_experts("silu", iter(pairs))
    handles = packed.pairs if isinstance(packed, Experts) else [(m.gate_up, m.down) for m in packed]
    one_by_one = tuple(Mlp("silu", down, gate_up=up) for up, down in handles)
    return Moe("silu", router, packed, len(sizes) - shared, k, k == 2), one_by_one


# hidden, inner size of each expert, form of each, k, whether the last is shared
MIXTURES = [
    (128, [64] * 5, ["4g64"] * 5, 2, False),
    (96, [32] * 6 + [96], ["4g32"] * 7, 3, True),
    (256, [128] * 8, ["8g128"] * 8, 4, False),
    (80, [48] * 4 + [16], ["dense"] * 5, 2, True),
    (128, [64, 128, 64, 192, 64], ["4g64", "4g32", "8g64", "dense", "8g32"], 3, False),
    (64, [32], ["4g32"], 1, False),
    (64, [32] * 40, ["4g32"] * 40, 6, False),
]


@pytest.mark.parametrize("size", [(1, 4, 2), (1, 128, 8), (5, 8, 8), (40, 60, 4), (300, 6, 1)])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("normalise", [False, True])
def test_rows_go_where_the_contract_says(
    isa: str, size: tuple[int, int, int], shared: int, normalise: bool
) -> None:
    """Includes ties: the logits of every second row are small integers."""
    rows, experts, k = size
    rng, backend = np.random.default_rng(rows + experts), CpuBackend(threads=3)
    scores = (rng.standard_normal((rows, experts + shared)) * 3).astype(np.float32)
    scores[::2] = np.round(scores[::2])
    router: Any = backend.pack(Dense("r", np.zeros((experts + shared, 32), np.float32)))
    places = Places(rows, Moe("silu", router, None, experts, k, normalise), backend._new)
    backend.engine.run_one(places.route(experts + shared, scores.ctypes.data))
    choice, share = route(scores, places.moe)
    flat = choice.ravel()
    order = np.argsort(flat, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts + shared))])
    starts, all_places = len(first), rows * (k + shared)
    held = places.memory.view(np.int32)
    assert np.array_equal(held[:starts], first)
    assert np.array_equal(held[starts : starts + all_places], order // (k + shared))
    # exp twice (2 units each), a sum of E, two quotients and a sum of k
    got, expected = places.memory[starts + all_places :], share.ravel()[order]
    assert np.all(np.abs(got - expected) <= EPS * (16 + experts + k) * expected)


def test_damaged_scores_lead_to_experts_that_exist(isa: str) -> None:
    backend = CpuBackend(threads=2)
    router: Any = backend.pack(Dense("r", np.zeros((7, 32), np.float32)))
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.zeros((3, 7), np.float32)
        scores[1], scores[2, 3] = bad, bad
        places = Places(3, Moe("silu", router, None, 7, 4, True), backend._new)
        backend.engine.run_one(places.route(7, scores.ctypes.data))
        held = places.memory.view(np.int32)
        assert held[0] == 0 and held[7] == 12 and np.all(np.diff(held[:8]) >= 0)
        assert np.array_equal(np.bincount(held[8:20]), [4, 4, 4])


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("given", MIXTURES, ids=lambda m: f"{m[0]}-{len(m[1])}x{m[1][-1]}-{m[2][0]}")
def test_a_mixture_is_the_weighted_sum_of_its_experts(isa: str, given: Any, exact: bool) -> None:
    """Of `mlp`'s results for each expert's rows. Shares have E + 16 roundings, sums one per term."""
    backend = CpuBackend(exact=exact, threads=3)
    moe, one_by_one = mixture(backend, *given)
    rng = np.random.default_rng(5)
    norm = Norm("n", "rms", rng.standard_normal(given[0]).astype(np.float32), None, 1e-5)
    for rows in (1, 1, 1, 1, 2, 9, 33, 130):
        wide = np.full((rows + 2, given[0] + 24), np.nan, np.float32)  # a view surrounded by NaN
        x = wide[1:-1, 8 : 8 + given[0]]
        x[:] = rng.standard_normal(x.shape)
        residual = rng.standard_normal(x.shape).astype(np.float32)
        for used, added in ((None, None), (norm, residual)):
            h = x.copy() if used is None else backend.norm(x, used)
            choice, share = route(backend.linear(h, moe.router), moe)
            total, size = np.zeros(x.shape), np.zeros(x.shape)
            for e in np.unique(choice):
                t, slot = np.nonzero(choice == e)
                terms = share[t, slot, None].astype(np.float64) * backend.mlp(h[t], one_by_one[e])
                total[t] += terms
                size[t] += np.abs(terms)
            if added is not None:
                total, size = total + added, size + np.abs(added)
            got = backend.to_host(backend.moe(x, moe, used, added))
            bound = EPS * (len(one_by_one) + 2 * moe.top_k + 20) * size
            assert np.all(np.abs(got - total) <= bound), f"{rows} rows"


def test_experts_whose_gate_ends_inside_a_tile_run_on_the_host() -> None:
    backend = CpuBackend(exact=True, threads=2)
    moe, one_by_one = mixture(backend, 64, [24] * 3, ["dense"] * 3, 2, False)
    assert isinstance(moe.experts, tuple) and not isinstance(backend.capture(lambda ids, step: ids), Captured)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    choice, share = route(backend.linear(x, moe.router), moe)
    expected = sum(
        share[:, i, None]
        * np.concatenate([backend.mlp(x[t : t + 1], one_by_one[choice[t, i]]) for t in range(5)])
        for i in range(2)
    )
    assert np.abs(backend.moe(x, moe) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    results = []
    for threads in range(1, 9):
        backend = CpuBackend(threads=threads)
        moe, _ = mixture(backend, *MIXTURES[4])
        rng = np.random.default_rng(9)
        rows = [rng.standard_normal((n, 128)).astype(np.float32) for n in (1, 6, 70)]
        results.append(np.concatenate([backend.to_host(backend.moe(x, moe)) for x in rows]))
    assert all(np.array_equal(results[0], r) for r in results)


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_token_goes_to_its_own_experts(
    family: str, exact: bool, int4: bool, tiny_root: Path
) -> None:
    """One recording serves every token bit for bit, and steps give the logits of one prefill."""
    t = tiny(family, tiny_root)
    model = decoder(t.folder, CpuBackend(exact=exact, threads=2), int4)
    assert isinstance(model._one_row, Captured)
    calls: list[int] = []
    record = model._one_row._fn

    def counted(ids: Any, step: Any) -> Any:
        calls.append(1)
        return record(ids, step)

    model._one_row._fn = counted
    replayed = logits(model, t.ids, [1] * len(t.ids))
    assert len(calls) == 1
    model._one_row = record
    assert np.array_equal(logits(model, t.ids, [1] * len(t.ids)), replayed)
    if exact:  # float32 sums of about 100 terms through 4 layers have an error of 2e-5
        whole = model.backend.to_host(model.forward(t.ids, model.new_cache(len(t.ids)), last_only=False))
        assert np.abs(replayed - whole).max() < 1e-4 * np.abs(whole).max()
