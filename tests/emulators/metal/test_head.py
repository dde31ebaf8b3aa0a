"""A head in halves on mlx with emulated kernels: same greedy token, nearly the same distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import DATA

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal.emulator import CXX
from metal.in_graph import emulated_metal
from mlx_models import agree, answer, decoder, tokens
from tiny_models import VARIANTS, tiny

from tinychat_mlx.awq.calibration.tokens import encoded
from tinychat_mlx.awq.search.quantizer import round_to_nearest
from tinychat_mlx.backends.mlx import cost, head, split_int8
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.split_int8 import SplitHandle
from tinychat_mlx.backends.mlx.weights import PackedHandle, pack
from tinychat_mlx.contract import Choice, Norm, Segment
from tinychat_mlx.engine.engine import Engine
from tinychat_mlx.engine.sampler import TAIL, SamplingParams, choice_of, distribution
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.open import load
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight, join, pack_codes

GREEDY = Choice()
TILE = 4
READ_AT_MOST = (
    0.18  # of a head's tiles; at that share every shape of the roofline also reads fewer bytes than mlx-lm
)


@pytest.fixture(autouse=True)
def small_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Test vocabularies are smaller, and on a CPU mx.compile starts a C++ compiler for each fused kernel."""
    monkeypatch.setattr(split_int8, "LEAST_ROWS", 32)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(params=[0, 3], ids=["lanes up", "lanes down"])
def calls(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    yield from emulation(request.param)


def emulation(order: int = 0) -> Iterator[Counter[str]]:
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")
    with emulated_metal(order) as calls:
        yield calls


@pytest.fixture(autouse=True)
def seed() -> None:
    global RNG
    RNG = np.random.default_rng(3)


def randn(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


def backend_of(dtype: str, monkeypatch: pytest.MonkeyPatch) -> MlxBackend:
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", dtype)
    return MlxBackend(exact=True, kernels="head")


def head_of(backend: MlxBackend, w: Weight, kind: str = "rms") -> Any:
    """Return (logits of a row under a choice, the share of tiles read at full width)."""
    norm = Norm("n", kind, backend.put(np.ones(w.shape[1], np.float32)), None, 1e-6)
    handle = backend.pack(w)
    assert backend.kernels is not None
    backend.kernels.shortlist.tally = tally = []

    def run(x: F32, choice: Choice | None) -> tuple[F32, float]:
        y = backend.to_host(backend.head(backend.put(x), norm, handle, choice))[0]
        return y, float(tally.pop().item()) if tally else 0.0

    return run


# selection and storage of the weights -----------------------------------------------------------------
def eight_bits(n: int, k: int, group: int = 64, bias: F32 | None = None) -> Packed:
    return round_to_nearest(0.05 * randn(n, k), 8, group).packed("w", bias)


def test_only_a_head_whose_kernels_were_chosen_is_kept_in_halves() -> None:
    w = eight_bits(64, 128)
    parts = join("w", [eight_bits(32, 128), eight_bits(32, 128)])
    four = round_to_nearest(randn(64, 128), 4, 64).packed("w", None)
    assert parts is not None
    for kernels in ("head", "all"):
        b = MlxBackend(exact=True, kernels=kernels)
        assert isinstance(b.pack(w), SplitHandle)
        for other in (parts, four, eight_bits(64, 128, bias=randn(64)), eight_bits(31, 128)):
            assert isinstance(b.pack(other), PackedHandle)
        assert not isinstance(b.pack(Dense("w", randn(64, 128))), SplitHandle)
    for kernels in ("off", "matvec,norm"):
        assert isinstance(MlxBackend(exact=True, kernels=kernels).pack(w), PackedHandle)


def test_a_head_that_won_on_this_mac_is_kept_in_halves() -> None:
    b = MlxBackend(exact=True, kernels="head")
    assert b.kernels is not None
    asked: list[str] = []
    for wins in (False, True):
        b.kernels.takes = lambda key, wins=wins: asked.append(key) or wins
        assert isinstance(b.pack(eight_bits(64, 128)), SplitHandle) == wins
    assert asked == ["head 64x128 int8 g64 float32"] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_its_rows_are_the_very_numbers_of_the_8_bit_weight(group: int, dtype: str, monkeypatch: Any) -> None:
    """It may be the embedding too.

    All codes and all pairs of neighbouring halves occur; blocks end inside it.
    """
    monkeypatch.setattr(split_int8, "BLOCK", 128)
    codes = RNG.integers(0, 256, (300, 256), dtype=np.uint8)
    codes[0], codes[1] = np.arange(256), np.arange(256)[::-1]
    scales = (RNG.random((300, 256 // group)) + 0.5).astype(np.float16)
    w = Packed("w", pack_codes(codes, 8), scales, -128 * scales, 8, group)
    b = backend_of(dtype, monkeypatch)
    handle, ids = b.pack(w), [0, 1, 299, 17]
    assert isinstance(handle, SplitHandle)
    assert (np.array(handle.upper) == pack_codes(codes >> 4, 4)).all()
    assert (np.array(handle.lower) == pack_codes(codes & 15, 4)).all()
    usual = pack(w, b.dtype).rows(mx.array(ids))
    assert handle.rows(b.ids(ids)).dtype == b.dtype and (handle.rows(b.ids(ids)) == usual).all().item()
    assert b.weight_bytes(w) == sum(
        a.nbytes for a in (handle.upper, handle.lower, handle.scales, handle.biases)
    )


def test_taking_it_apart_needs_no_memory_beside_its_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is the weight by `weight_bytes` and a few blocks; a copy of its words would be 4 MB more."""
    monkeypatch.setattr(split_int8, "BLOCK", 64)
    w, b = eight_bits(4096, 1024), MlxBackend(exact=True, kernels="head")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    handle = b.pack(w)
    took, words = mx.get_active_memory() - before, w.qweight.nbytes
    assert isinstance(handle, SplitHandle) and abs(took - b.weight_bytes(w)) < words / 16
    assert mx.get_peak_memory() - before - took < words / 4


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_several_rows_are_multiplied_by_both_halves(rows: int) -> None:
    """float32: 1e-4 like the 8-bit product; K sums of products of 7e-3 · 1 in both."""
    w, x = eight_bits(70, 256), randn(rows, 256)
    b = MlxBackend(exact=True, kernels="head")
    agree(b.to_host(b.linear(b.put(x), b.pack(w))), x @ w.to_float32().T)


# guarantees -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k", "group"), [(1000, 256, 128), (3072, 128, 32), (37, 64, 64)])
def test_the_largest_logit_is_found_and_its_tile_has_all_its_bits(
    calls: Counter[str], n: int, k: int, group: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = head_of(backend_of(dtype, monkeypatch), eight_bits(n, k, group))
    shares = []
    for _ in range(15):
        x = randn(1, k)
        (whole, all_of_it), (y, share) = run(x, None), run(x, GREEDY)
        best = int(whole.argmax())
        assert y.argmax() == best and all_of_it == 1
        tile = best // TILE * TILE
        assert (y == whole)[tile : tile + TILE].all()
        shares.append(share)
    tiles = -(-n // TILE)
    assert min(shares) >= 0.99 / tiles and (n < 100 or np.mean(shares) < 0.1)
    assert len(calls) == 3 and calls.total() == 15 * 5


def test_all_of_it_is_the_8_bit_product(calls: Counter[str]) -> None:
    """Without a choice. float32: 1e-4."""
    w = eight_bits(1000, 256)
    run, x = head_of(MlxBackend(exact=True, kernels="head"), w), randn(1, 256)
    expected = (x / np.sqrt((x**2).mean() + 1e-6)) @ w.to_float32().T
    agree(run(x, None)[0], expected[0])


def test_a_layer_norm_goes_before(calls: Counter[str]) -> None:
    w = eight_bits(200, 128)
    b = MlxBackend(exact=True, kernels="head")
    run, x = head_of(b, w, "layer"), randn(1, 128) + 3
    expected = ((x - x.mean()) / np.sqrt(x.var() + 1e-6)) @ w.to_float32().T
    agree(run(x, None)[0], expected[0])
    assert run(x, GREEDY)[0].argmax() == expected.argmax()


def test_an_estimate_errs_as_much_as_its_lower_halves_can(calls: Counter[str]) -> None:
    """|scale * (lower - 7.5) * x| <= 7.5 scale |x|, summed over the inputs."""
    w = eight_bits(800, 128)
    run = head_of(MlxBackend(exact=True, kernels="head"), w)
    for _ in range(5):
        x = randn(1, 128)
        whole, y = run(x, None)[0], run(x, GREEDY)[0]
        size = np.abs(x / np.sqrt((x**2).mean() + 1e-6)).reshape(2, 64).sum(1)
        bound = 7.5 * w.scales.astype(np.float64) @ size
        assert np.all(np.abs(y - whole) <= bound * 1.0001)
        assert np.abs(y - whole).max() > bound.mean() / 100  # the estimate is not exact


def test_tokens_that_are_nearly_as_good_are_all_read_whole(calls: Counter[str]) -> None:
    """Rows that differ only in their lower halves have one estimate; only all bits show which is the largest."""
    codes = RNG.integers(0, 256, (640, 128), dtype=np.uint8)
    x = randn(1, 128)
    rows = [5, 100, 250, 333, 639]
    codes[rows] = np.where(x > 0, 240, 0)
    for i, row in enumerate(rows):
        codes[row] += np.uint8(i) * (x[0] > 0)
    scales = np.full((640, 1), 0.01, np.float16)
    w = Packed("w", pack_codes(codes, 8), scales, -128 * scales, 8, 128)
    run = head_of(MlxBackend(exact=True, kernels="head"), w)
    y, share = run(x, GREEDY)
    assert y.argmax() == 639 and share == pytest.approx(len(rows) / 160)
    assert np.array_equal(y[rows], run(x, None)[0][rows])


def test_a_rounded_estimate_does_not_beat_a_logit_that_is_larger(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 logits of 1000 have a spacing of half a unit, here 37 times the error of an estimate.

    A row's estimate of 1000.2505 would be rounded up to 1000.5; its exact value 1000.236 is rounded down. The
    largest, 1000.298, is far enough above the estimate for its error, but not for the rounding.
    """
    codes = np.zeros((64, 32), np.uint8)
    codes[8] = spread_over(242) << 4  # its lower halves are 0: 7.5 · 32 scales less than assumed
    codes[40] = spread_over(290) << 4 | np.tile([7, 8], 16)
    scales, biases = np.full((64, 1), 2.0**-14, np.float16), np.full((64, 1), 31.25, np.float16)
    run = head_of(
        backend_of("float16", monkeypatch), Packed("w", pack_codes(codes, 8), scales, biases, 8, 32)
    )
    x = np.ones((1, 32), np.float32)
    whole, y = run(x, None)[0], run(x, GREEDY)[0]
    assert whole.argmax() == y.argmax() == 40 and whole[40] == 1000.5 and y[8] == whole[8] == 1000


def spread_over(total: int) -> Any:
    """Return 32 halves with this sum."""
    return np.full(32, total // 32, np.uint8) + (np.arange(32) < total % 32).astype(np.uint8)


def test_flat_logits_are_all_read_whole_and_peaked_ones_are_not(calls: Counter[str]) -> None:
    w = round_to_nearest(0.01 * randn(1600, 128), 8, 128).packed("w", None)
    run, x = head_of(MlxBackend(exact=True, kernels="head"), w), randn(1, 128)
    whole, _ = run(x, None)
    y, share = run(x, Choice(1.0, TAIL))
    assert share == 1 and np.array_equal(y, whole)  # each token has about 1 / 1600
    for choice in (
        Choice(0.005, TAIL),
        Choice(1e-30, TAIL),
        Choice(1.0, 2000.0),
    ):  # the last: all may be approximate
        y, share = run(x, choice)
        assert share < 0.3 and y.argmax() == whole.argmax()


def test_logits_that_are_no_numbers_stay_so(calls: Counter[str]) -> None:
    run, x = head_of(MlxBackend(exact=True, kernels="head"), eight_bits(64, 64)), randn(1, 64)
    x[0, 3] = np.nan
    for choice in (GREEDY, Choice(1.0, TAIL), None):
        assert not np.isfinite(run(x, choice)[0]).any()
    w = eight_bits(64, 64)
    w.scales[5] = np.inf
    for choice in (GREEDY, Choice(1.0, TAIL), None):
        y = head_of(MlxBackend(exact=True, kernels="head"), w)(randn(1, 64), choice)[0]
        assert not np.isfinite(y[5]) and np.isfinite(np.delete(y, 5)).all()


# whole models -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo() -> Any:
    return load("demo", backend="cpu", threads=2)


@pytest.fixture
def on_mlx(demo: Any) -> Decoder:
    d = decoder(demo.folder, MlxBackend(exact=True, kernels="head"))
    assert isinstance(d.head, SplitHandle) and d.inputs.tokens is d.head
    return d


@pytest.fixture(scope="module")
def text(demo: Any) -> Any:
    """Return (last hidden states of held-out text, one row each; the exact logits) on demand."""

    @cache
    def run() -> tuple[Any, list[F32]]:
        d = decoder(demo.folder, MlxBackend(exact=True, kernels="head"))
        ids = encoded(str(DATA / "demo_heldout_text.jsonl"), demo.tokenizer)[:768]
        step = d.backend.step((Segment(d.new_cache(len(ids)), len(ids)),))
        rows = d._hidden(d.backend.ids(ids), step)[::24]
        whole: list[F32] = []
        for _ in emulation():
            whole = [d.backend.to_host(d._logits(rows[i : i + 1]))[0] for i in range(len(rows))]
        return rows, whole

    return run


@pytest.mark.parametrize(
    ("given", "most"),
    [({"temperature": 0.0}, 0.01), ({"temperature": 0.7}, 0.03), ({"temperature": 1.0, "top_p": 1.0}, READ_AT_MOST)],
    ids=str,
)  # fmt: skip
def test_what_may_be_drawn_on_real_text_stays_as_it_was(
    text: Any, on_mlx: Decoder, given: dict[str, float], most: float
) -> None:
    """The largest logit is the same.

    In the worst case the tokens with approximate logits lose or gain all their probability, and half of that
    is the change. In practice errors mostly cancel, to the KL that head.py states. `most`: the share of tiles
    read at full width. With the chat's defaults it is covered by the roofline's share.
    """
    params, (rows, everything) = SamplingParams(**given), text()
    choice, backend = choice_of(params), on_mlx.backend
    assert choice is not None and isinstance(backend, MlxBackend) and backend.kernels is not None
    moved, kl, tally = [], [], []
    backend.kernels.shortlist.tally = tally
    for _ in emulation():
        for i, whole in enumerate(everything):
            y = backend.to_host(on_mlx._logits(rows[i : i + 1], choice))[0]
            assert y.argmax() == whole.argmax()
            if params.temperature:
                moved.append(np.abs(chances(whole, params) - chances(y, params)).sum() / 2)
                p, q = (log_softmax(logits / params.temperature) for logits in (whole, y))
                kl.append((np.exp(p) * (p - q)).sum())
    assert np.mean([share.item() for share in tally]) < most and len(tally) == len(everything) == 32
    if params.temperature:
        assert max(moved) <= choice.tail and np.mean(moved) < choice.tail / 10
        assert np.mean(kl) < 5e-5 and max(kl) < 5e-4
    assert most < cost.SHORTLIST or params.top_p == 1


def log_softmax(logits: F32) -> Any:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())


def test_even_where_all_tokens_may_be_drawn_fewer_bytes_are_read_than_by_mlx_lm() -> None:
    for shape in cost.SHAPES.values():
        hard = replace(cost.OURS[8], shortlist=READ_AT_MOST)
        assert cost.bytes_per_token(shape, hard) <= cost.bytes_per_token(shape, cost.MLX_LM)


def chances(logits: F32, params: SamplingParams) -> Any:
    p = np.zeros(len(logits))
    ids, probabilities = distribution(logits, params)
    p[ids] = probabilities
    return p


def test_the_demo_says_what_it_says_with_stock_operations(demo: Any, on_mlx: Decoder) -> None:
    """Compares whole answers with one step in flight. Sampled ones use seeded numbers."""
    stock = decoder(demo.folder, MlxBackend(exact=True, kernels="off"))
    for given in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 5}):
        for question in ("who are you?", "what is 3 + 4?"):
            asked = [{"role": "user", "content": question}]
            ids = demo._encode_rendered(demo._render(asked, {}), asked, {})
            expected = tokens(answer(Engine(stock, 64), ids, max_tokens=20, **given))
            for _ in emulation():
                assert tokens(answer(Engine(on_mlx, 64), ids, max_tokens=20, **given)) == expected


def test_a_captured_step_obeys_each_calls_choice(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's program is compiled once, so a choice must be an input. The kernels record what they receive."""
    monkeypatch.setitem(VARIANTS, "mlx-tied", ("llama", {"tie_word_embeddings": True}))
    seen: list[Choice | None] = []

    def logits(self: Any, x: Any, w: SplitHandle, norm: Norm, choice: Choice | None) -> Any:
        seen.append(choice)
        return head.array_of(choice)[None] + (0 if choice is None else 10)

    monkeypatch.setattr(head.Shortlist, "logits", logits)
    mx.enable_compile()
    d = decoder(
        tiny("mlx-tied", tiny_root).folder, MlxBackend(exact=True, kernels="head", compiled=True), (8, 32)
    )
    cache, got = d.new_cache(16), []
    choices = [GREEDY, None, Choice(0.7, TAIL), Choice(1.5, 0.25), None, GREEDY]
    for choice in choices:
        got.append(d.backend.to_host(d.forward([5], cache, choice=choice))[0].tolist())
    expected = [[0, 0] if c is None else [10 + c.temperature, 10 + c.tail] for c in choices]
    assert np.allclose(got, expected)
    assert len(seen) == 2, "one program for a choice, one for none"


def test_a_captured_step_with_the_kernels_equals_one_that_is_not(
    calls: Counter[str], demo: Any, on_mlx: Decoder
) -> None:
    ids = [5, 9, 33, 7, 21, 40]
    whole = on_mlx.backend.to_host(on_mlx.forward(ids, on_mlx.new_cache(8), last_only=False))
    captured = decoder(demo.folder, MlxBackend(exact=True, kernels="head", compiled=True))
    for choices in ([None, GREEDY, None], [GREEDY, None, Choice(0.7, TAIL)]):
        cache = captured.new_cache(8)
        captured.forward(ids[:3], cache)
        for at, choice in enumerate(choices, 3):
            y = captured.backend.to_host(captured.forward(ids[at : at + 1], cache, choice=choice))[0]
            close = np.abs(y - whole[at]).max() <= 1e-4 * np.abs(whole[at]).max()
            assert close == (choice is None) and y.argmax() == whole[at].argmax()
