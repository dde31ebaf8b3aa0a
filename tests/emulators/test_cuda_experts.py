"""Experts on the emulated CUDA kernels, against float64 on more than 40 shapes, and recorded steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import emulate
import models
from guarded import GuardedKernels, both_orders
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulators.test_cuda_kernels import CPU, FLOAT, HALF, WIDTHS, halves, offset_bound, tiled, within
from tests.emulators.test_cuda_steps import IDS, Keeping, Recorder
from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import experts, kernels, weights
from tinychat_mlx.backends.cuda.backend import CudaBackend
from tinychat_mlx.backends.reference import ACTIVATIONS, ReferenceBackend
from tinychat_mlx.contract import Mlp, Moe, Segment, Step
from tinychat_mlx.contract import route as contract_route

pytestmark = pytest.mark.skipif(emulate.compiler() is None, reason="no C++ compiler to emulate kernels with")
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.ENVIRONMENT, "cpu")
    torch.set_num_threads(1)


def moe_of(made: Any, count: int, slots: int, shared: bool = False, normalise: bool = False) -> Moe:
    """Return a mixture without a router, because the routing is given."""
    router = weights.DenseHandle("r", (count + shared, 32), torch.zeros(count + shared, 32), None)
    return Moe("silu", router, made, count, slots, normalise)


ROUTES = [
    (rows, count, k)
    for rows, (count, k) in itertools.product(
        (1, 3),
        (
            (1, 1),
            (4, 2),
            (5, 5),
            (31, 3),
            (32, 8),
            (33, 4),
            (60, 4),
            (64, 6),
            (128, 8),
            (300, 10),
            (1024, 32),
        ),
    )
]


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("rows, count, k", ROUTES)
def test_rows_go_where_the_contract_says(rows: int, count: int, k: int, shared: int) -> None:
    """44 shapes, on the kernel and in torch; half of them with ties, which go to the lower index."""
    rng = np.random.default_rng(count * 10 + rows)
    scores = (rng.standard_normal((rows, count + shared)) * 3).astype(np.float32)
    scores = np.round(scores) if (count + rows) % 2 else scores
    moe = moe_of(None, count, k, bool(shared), normalise=k % 2 == 0)
    choice, share = contract_route(scores, moe)
    in_torch = experts.route(torch.from_numpy(scores), moe)
    for i, expected in enumerate((choice[:, :k], share)):
        on_kernel = both_orders(lambda on, i=i: experts.route_rows(on, on.put(scores), moe)[i])
        for got in (on_kernel, in_torch[i].numpy()):
            # exp twice, with errors of a few units, a sum of E, two quotients and a sum of k
            within(got.astype(np.float64), expected, FLOAT * (16 + count + k) * expected * i)


def test_damaged_scores_lead_to_experts_that_exist() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.zeros((2, 40), np.float32)
        scores[0], scores[1, 33] = bad, bad
        choice = both_orders(lambda on, x=scores: experts.route_rows(on, on.put(x), moe_of(None, 40, 6))[0])
        assert choice.min() >= 0 and choice.max() < 40 and all(len(set(row)) == 6 for row in choice)


class Case:
    """Random experts and routing, with the float64 result by definition and its error bound."""

    def __init__(
        self, w_bit: int, group: int, size: tuple[int, int, int, int, int], bias: bool, extra: bool
    ) -> None:
        """size: rows, experts, slots, hidden, inner."""
        self.rows, self.count, self.slots, self.hidden, self.inner = size
        self.ups = [tiled(w_bit, group, 2 * self.inner, self.hidden, bias) for _ in range(self.count)]
        self.downs = [tiled(w_bit, group, self.hidden, self.inner, bias) for _ in range(self.count)]
        for e in range(self.count):  # `tiled` gives the same weight for the same shape, so make them differ
            for w, dense in (self.ups[e], self.downs[e]):
                w.scales.mul_(1 - e / 16)
                dense *= 1 - e / 16
        rng = np.random.default_rng(sum(size))
        self.x = halves((self.rows, self.hidden))
        self.choice = np.stack([rng.permutation(self.count)[: self.slots] for _ in range(self.rows)]).astype(
            np.int32
        )
        self.share = rng.uniform(0.1, 0.5, (self.rows, self.slots + extra)).astype(np.float32)
        self.other, self.residual = rng.standard_normal((2, self.rows, self.hidden)).astype(np.float32)
        self.extra = extra

    def run(self, on: GuardedKernels, few: bool) -> Any:
        mlps = [
            Mlp("silu", on.handle(down), gate_up=on.handle(up))
            for (up, _), (down, _) in zip(self.ups, self.downs, strict=True)
        ]
        made = experts.Experts(mlps, CPU)
        made.up, made.down = on.put(made.up), on.put(made.down)
        moe = moe_of(made, self.count, self.slots, self.extra)
        assert made.on_kernels(moe)
        put = on.put(self.choice), on.put(self.share)
        given = (on.put(self.other), on.put(self.residual)) if self.extra else (None, None)
        mixture = experts.Mixture(on, moe, *put, *given)
        return (mixture.few if few else mixture.many)(on.put(self.x))

    def expected(self, few: bool) -> tuple[np.ndarray, np.ndarray]:
        y, bound = np.zeros((2, self.rows, self.hidden))
        for t, s in np.ndindex(self.rows, self.slots):
            e, share = self.choice[t, s], float(self.share[t, s])
            one, at = self.one(self.x[t : t + 1], int(e), few)
            y[t] += share * one[0]
            bound[t] += share * at[0]
        if self.extra:
            y += self.share[:, -1:] * self.other.astype(np.float64) + self.residual
        return y, bound + FLOAT * (self.slots + 4) * (np.abs(y) + 2) + 1e-5

    def one(self, x: np.ndarray, e: int, few: bool) -> tuple[np.ndarray, np.ndarray]:
        """One expert's result for one row, with the combined bounds of test_cuda_kernels.py."""

        def product(pair: tuple[Any, np.ndarray], a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            w, dense = pair
            y = a.astype(np.float64) @ dense.T + (0 if w.bias is None else w.bias.numpy())
            if few:
                return y, 2 * offset_bound(w, a)  # twice: scales times share are rounded once more
            mass = np.abs(a.astype(np.float64)) @ np.abs(dense).T
            return y, mass * (2 * HALF + FLOAT * (a.shape[1] / 8 + 4)) + np.abs(y) * HALF + 1e-5

        y, error = product(self.ups[e], x)
        f = self.inner
        up, acted = y[:, f:], ACTIVATIONS["silu"](y[:, :f])
        h = acted * up
        off = (
            1.13 * error[:, :f] * (np.abs(up) + error[:, f:])
            + np.abs(acted) * error[:, f:]
            + HALF * np.abs(h)
            + 1e-5
        )
        y, error = product(self.downs[e], h)
        return y, error + off @ np.abs(self.downs[e][1]).T


# rows, experts, slots, hidden, inner
FEW = [
    (1, 4, 2, 128, 128),
    (1, 6, 6, 256, 128),
    (3, 5, 2, 128, 256),
    (8, 3, 1, 128, 128),
    (1, 9, 8, 128, 128),
]
MANY = [(9, 4, 2, 128, 128), (140, 2, 1, 128, 128), (40, 5, 3, 128, 256), (20, 12, 2, 256, 128)]


@pytest.mark.parametrize("w_bit, group", WIDTHS)
def test_a_few_rows_get_their_own_experts(w_bit: int, group: int) -> None:
    """48 cases, also sizes that fill no unit or block. Scales are float16: (1 - e / 16) times one is rounded."""
    for i, size in enumerate(
        [
            *FEW,
            (2, 4, 2, 3 * group, group),
            (1, 3, 3, group, 5 * group),
            (1, 4, 2, 160 // group * group or group, 128),
        ]
    ):
        case = Case(w_bit, group, size, bias=i % 2 == 1, extra=i % 3 != 0)
        y, bound = case.expected(few=True)
        within(both_orders(lambda on, c=case: c.run(on, few=True)).astype(np.float64), y, bound)


@pytest.mark.parametrize("w_bit, group", WIDTHS)
def test_many_rows_meet_each_expert_once(w_bit: int, group: int) -> None:
    """42 cases: experts without rows, with more rows than a block, and sizes that fill no block."""
    for i, size in enumerate(
        [*MANY, (11, 3, 2, 3 * group, group), (17, 4, 4, group, 3 * group), (33, 1, 1, 128, 128)]
    ):
        case = Case(w_bit, group, size, bias=i % 2 == 0, extra=i % 3 != 0)
        y, bound = case.expected(few=False)
        within(both_orders(lambda on, c=case: c.run(on, few=False)).astype(np.float64), y, bound)


BUGS = [  # (few rows or many, the replaced text, the replacement): the tests must detect each
    (True, "at - s * units, slot", "at, slot"),
    (True, "slot[s].share};", "1.f};"),
    (True, "3 * size_t(expert)", "3 * size_t(0)"),
    (True, "fmaf(slot[s].share, slot[s].bias[n], sum)", "sum + slot[s].bias[n]"),
    (True, "blockIdx.y / slots", "blockIdx.y"),
    (False, "from[first_row + row]", "first_row + row"),
    (False, "(at - pieces[e]) * ROWS", "0"),
    (False, "pieces[middle] <= at", "pieces[middle] < at"),
]


@pytest.mark.parametrize("few, old, new", BUGS)
def test_the_emulator_sees_bugs_put_in_on_purpose(
    few: bool, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(4, 32, (2, 5, 3, 160, 256) if few else (150, 3, 3, 160, 128), True, True)
    right = both_orders(lambda on: case.run(on, few))
    plain = emulate.build

    def build(program: str, defines: Any, change: Any = None) -> Any:
        return plain(program, defines, (old, new) if program == ("experts" if few else "gemm") else None)

    monkeypatch.setattr(emulate, "build", build)
    try:
        changed = both_orders(lambda on: case.run(on, few))
    except (RuntimeError, AssertionError):
        return
    assert not np.allclose(right, changed, rtol=0.01, atol=0.01)


# whole models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_on_kernels_agrees_with_the_reference(family: str) -> None:
    """fp16's bound of test_cuda_backend.py; a prefill sorted by expert, steps by number."""
    config = models.config_of(family, intermediate_size=256)
    expected = models.whole(models.decoder(config, ReferenceBackend(), "int4", 64), IDS)
    launcher = emulate.Emulator()
    backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(launcher, CPU, 8))
    model = models.decoder(config, backend, "int4", 64)
    bound = 4 * 37**0.5 * 2**-11 * float(np.sqrt(np.square(expected).mean()))
    assert np.abs(models.whole(model, IDS) - expected).max() <= bound
    cache = model.new_cache(len(IDS))
    stepwise = np.concatenate([backend.to_host(model.forward([i], cache)) for i in IDS[:5]])
    assert np.abs(stepwise - expected[:5]).max() <= bound
    ours = {"route_rows", "experts_up", "experts_down", "gemm_experts", "combine_rows"}
    assert ours <= set(launcher.launched) and backend._recordable


# OLMoE's norm of the whole q runs in torch
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_step_recorded_once_serves_tokens_with_other_experts(family: str) -> None:
    """The launches of one step are repeated with new ids and positions, and give the bits of eager steps."""
    config = models.config_of(family, intermediate_size=256)
    recorder = Recorder()
    backend = CudaBackend(dtype=torch.float16, kernels=Keeping(recorder, CPU, 8))
    model = models.decoder(config, backend, "int4", 64)
    cache, other = model.new_cache(40), model.new_cache(40)
    eager = [backend.to_host(model.forward([i], other)) for i in IDS[:6]]
    ids, positions = backend.ids(IDS[:1]), torch.zeros(1, dtype=torch.int32)
    recorder.recording = True
    logits = model._logits(model._hidden(ids, Step((Segment(cache, 1),), positions)))
    recorder.recording = False
    for at in range(1, 6):
        ids[0], positions[0] = IDS[at], at
        recorder.replay()
        np.testing.assert_array_equal(logits.numpy(), eager[at])
    assert backend._recordable


class Waits(TorchDispatchMode):
    """Records the operations for whose result or size the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 40])
def test_nothing_in_a_mixture_waits_for_the_device(rows: int) -> None:
    """With experts of one form. Those of several forms wait, and no graph may record their routing."""
    waiting = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount", "is_nonzero"}
    for form in ("int4", "dense"):
        config = models.config_of("qwen2_moe")
        backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(emulate.Emulator(), CPU, 8))
        layer = models.decoder(config, backend, form, 64).layers[0]
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 128)).astype(np.float32))
        with Waits() as waits:
            backend.moe(x, layer.mlp, layer.norms["pre_mlp"], x)
        assert bool(waits.seen & waiting) == (form == "dense") != backend._recordable
