"""MLX in float32, on a CPU or a Mac: the graph equals the reference, tokens equal mlx-lm's, limits are said in words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from tiny_models import VARIANTS, tiny

import tinychat_mlx
from tinychat_mlx.backend import Attention, Backend, CacheShape, Segment
from tinychat_mlx.backends.mlx import MlxBackend, sampling
from tinychat_mlx.backends.mlx.device import Chip, check_version, choose_dtype, find_chip
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Decoder
from tinychat_mlx.errors import BackendError
from tinychat_mlx.generate import Engine, Event
from tinychat_mlx.sampler import SamplingParams, distribution
from tinychat_mlx.weight import F32, Packed, Weight, pack_codes

# float32 on both sides: a logit sums ~100 products through 4 layers, 100 · 6e-8 · 4 ≈ 2e-5 of the largest.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel; one test below pays for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Quantised:
    """A checkpoint whose matrices come out packed: quantised here, the same for every backend."""

    def __init__(self, folder: Path, w_bit: int, group: int) -> None:
        self.inner, self.w_bit, self.group = Checkpoint.open(folder), w_bit, group

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def vector(self, name: str) -> F32:
        return self.inner.vector(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        dense = self.inner.weight(module, shape)
        return quantised(dense.to_float32(), self.w_bit, self.group, module, dense.bias)


def quantised(w: F32, w_bit: int, group: int, name: str = "w", bias: F32 | None = None) -> Packed:
    """Round to nearest between each group's least and greatest."""
    n, k = w.shape
    g = w.reshape(n, k // group, group)
    low = g.min(-1)
    scales = np.maximum((g.max(-1) - low) / (2**w_bit - 1), 1e-4).astype(np.float16)
    low = low.astype(np.float16)
    q = np.rint((g - low[..., None].astype(np.float32)) / scales[..., None].astype(np.float32))
    codes = q.clip(0, 2**w_bit - 1).astype(np.uint8).reshape(n, k)
    return Packed(name, pack_codes(codes, w_bit), scales, low, w_bit, group, bias)


def decoder(folder: Path, backend: Backend, form: tuple[int, int] | None = None) -> Decoder:
    source: Any = Checkpoint.open(folder) if form is None else Quantised(folder, *form)
    return Decoder(parse_config(Checkpoint.open(folder).config), source, backend)


def logits(d: Decoder, ids: list[int], cuts: list[int]) -> F32:
    """Logits of all ids, computed in pieces of these lengths."""
    cache, at, out = d.new_cache(len(ids)), 0, []
    for n in cuts:
        out.append(d.backend.to_host(d.forward(ids[at : at + n], cache, last_only=False)))
        at += n
    return np.concatenate(out)


def agree(got: F32, expected: F32) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference_in_one_piece_in_pieces_and_step_by_step(
    variant: str, tiny_root: Path
) -> None:
    t = tiny(variant, tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend()), t.ids, [40])
    for captured in (False, True):
        d = decoder(t.folder, MlxBackend(exact=True, compiled=captured))
        for cuts in ([40], [17, 1, 7, 1, 1, 13], [1] * 40):
            agree(logits(d, t.ids, cuts), expected)


@pytest.mark.parametrize(
    "form", [(4, 32), (8, 32), (3, 32), (4, 64), (8, 64)], ids=lambda f: f"int{f[0]}g{f[1]}"
)
def test_packed_weights_stay_packed_and_mean_the_same(
    form: tuple[int, int], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"intermediate_size": 128, "tie_word_embeddings": True}
    monkeypatch.setitem(VARIANTS, "mlx-wide", ("llama", wide))
    t = tiny("mlx-wide", tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend(), form), t.ids, [40])
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True), form)
    assert d.head.bits == form[0] and d.layers[0].qkv[0].w.dtype == mx.uint32
    agree(logits(d, t.ids, [30, *[1] * 10]), expected)


@pytest.mark.parametrize("variant", ["qwen2_moe", "olmoe"])
@pytest.mark.parametrize("form", [None, (4, 32), (8, 32)], ids=["dense", "int4", "int8"])
def test_experts_stay_on_the_device(
    variant: str, form: tuple[int, int] | None, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 rows are sorted by expert, 9 are not; a captured step holds the routing."""
    t = tiny(variant, tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend(), form), t.ids, [40])
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True), form)
    hosts: list[Any] = []
    monkeypatch.setattr(Backend, "moe", lambda *a: hosts.append(a))
    for cuts in ([40], [9, 20, *[1] * 11]):
        agree(logits(d, t.ids, cuts), expected)
    assert not hosts


def test_groups_wider_than_mlx_knows_are_the_same_numbers() -> None:
    w = quantised(np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32), 4, 512)
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    b = MlxBackend(exact=True)
    agree(b.to_host(b.linear(b.put(x), b.pack(w))), x @ w.to_float32().T)
    with pytest.raises(BackendError, match="groups of 16"):
        b.pack(quantised(np.ones((8, 64), np.float32), 4, 16))


def test_a_compiled_step_equals_the_eager_one_across_spans(tiny_root: Path, monkeypatch: Any) -> None:
    """Real mx.compile: the position is traced, so one program serves every position of a span."""
    monkeypatch.setattr("tinychat_mlx.backends.mlx.cache.SPAN", 8)
    mx.enable_compile()
    t = tiny("llama", tiny_root)
    eager = logits(decoder(t.folder, MlxBackend(exact=True, compiled=False)), t.ids, [3, *[1] * 37])
    compiled = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    agree(logits(compiled, t.ids, [3, *[1] * 37]), eager)
    first = decoder(t.folder, MlxBackend(exact=True, compiled=True)).new_cache(40)
    assert [first.span() for first.length in (0, 7, 8, 15, 16, 31, 39)] == [8, 8, 16, 16, 32, 32, 40]


def test_a_captured_step_serves_two_conversations_and_a_rewind(tiny_root: Path) -> None:
    t = tiny("qwen2-window", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    whole = logits(d, t.ids, [40])
    caches = [d.new_cache(40) for _ in range(2)]
    for i, token in enumerate(t.ids[:12]):
        for cache in caches:
            agree(d.backend.to_host(d.forward((token,), cache)), whole[i : i + 1])
    for _ in range(4):
        d.forward((7,), caches[0])
    caches[0].rewind(12)
    agree(d.backend.to_host(d.forward(t.ids[12:20], caches[0], last_only=False)), whole[12:20])
    agree(d.backend.to_host(d.forward((t.ids[20],), caches[0])), whole[20:21])
    agree(d.backend.to_host(d.forward((t.ids[12],), caches[1])), whole[12:13])


def test_three_conversations_in_one_step_equal_three_steps(tiny_root: Path) -> None:
    t = tiny("mistral", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    whole = logits(d, t.ids, [40])
    caches = [d.new_cache(40) for _ in range(3)]
    for cache, n in zip(caches, (3, 9, 20), strict=True):
        d.forward(t.ids[:n], cache)
    rows = [t.ids[3:5], t.ids[9:10], t.ids[20:24]]
    step = d.backend.step(tuple(Segment(c, len(r)) for c, r in zip(caches, rows, strict=True)))
    x = d._hidden(d.backend.ids([i for r in rows for i in r]), step)
    agree(d.backend.to_host(d._logits(x)), np.concatenate([whole[3:5], whole[9:10], whole[20:24]]))


def test_the_cache_is_written_in_place(tiny_root: Path) -> None:
    """A step may need the cache once more, never twice: a copied cache would halve the context that fits."""
    d = decoder(tiny("llama", tiny_root).folder, MlxBackend(exact=True, compiled=True))
    cache = d.new_cache(1 << 16)
    size = sum(a.nbytes for a in cache.k + cache.v)
    assert size > 30 << 20
    for token in range(5, 8):
        d.backend.to_host(d.forward((token,), cache))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for token in range(5, 8):
        d.backend.to_host(d.forward((token,), cache))
    assert mx.get_peak_memory() - before < size / 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "spec", [Attention(0, 0.2), Attention(0, 0.2, window=5, softcap=3.0)], ids=["full", "window"]
)
def test_packed_keys_and_values_mean_their_dequantised_numbers(
    bits: int, spec: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", str(bits))
    rng, shape = np.random.default_rng(0), CacheShape(1, 2, 64)
    q, k, v = (rng.standard_normal((11, h, 64)).astype(np.float32) for h in (4, 2, 2))

    def rounded(x: F32) -> F32:
        form = {"group_size": 64, "bits": bits}
        return np.array(mx.dequantize(*mx.quantize(mx.array(x), **form), **form))

    def run(b: Backend, k: F32, v: F32, cuts: list[int]) -> F32:
        cache, at, out = b.new_cache(shape, 16), 0, []
        for n in cuts:
            piece = (b.put(t[at : at + n]) for t in (q, k, v))
            out.append(b.to_host(b.attention(*piece, spec, b.step((Segment(cache, n),)))))
            cache.length, at = cache.length + n, at + n
        return np.concatenate(out)

    expected = run(ReferenceBackend(), rounded(k), rounded(v), [11])
    for cuts in ([11], [6, 1, 1, 3]):
        agree(run(MlxBackend(exact=True), k, v, cuts), expected)


def test_packed_caches_are_smaller_and_refuse_what_they_cannot_hold(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("llama-tied", tiny_root)
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", "8")
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    got = logits(d, t.ids, [30, *[1] * 10])
    # a number's 8-bit error is at most half of 1/255 of its group's range: about 1 % of a typical one
    assert np.abs(got - t.logits).max() < 0.02 * np.abs(t.logits).max()
    cache = d.new_cache(1000)
    held = sum(part.nbytes for side in (cache.k, cache.v) for layer in side for part in layer)
    assert held < 0.35 * cache.shape.bytes_per_token(4) * 1000
    with pytest.raises(BackendError, match="24 a head cannot be packed"):
        d.backend.new_cache(CacheShape(1, 2, 24), 16)
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", "5")
    with pytest.raises(BackendError, match="KV_BITS=5 is unknown: give 4 or 8"):
        MlxBackend(exact=True)


# the engine: one step in flight ---------------------------------------------------------------------


class Letters:
    """Token t is the character chr(200 + t)."""

    def push(self, token: int) -> str:
        return chr(200 + token)

    def flush(self) -> str:
        return ""


def answer(
    engine: Engine, prompt: list[int], stop: frozenset[int] = frozenset(), **params: Any
) -> list[Event]:
    return list(engine.generate(prompt, SamplingParams(**params), stop, Letters()))


def tokens(events: list[Event]) -> list[int]:
    return [ord(c) - 200 for e in events for c in e.text]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    folder = tiny("qwen3", tmp_path_factory.mktemp("engines")).folder
    on_host = MlxBackend(exact=True)
    on_host.sampler = lambda *a: None  # type: ignore[method-assign]
    return Engine(decoder(folder, MlxBackend(exact=True, compiled=True)), 64), Engine(
        decoder(folder, on_host), 64
    )


def test_one_step_ahead_gives_the_same_greedy_text(engines: tuple[Engine, Engine]) -> None:
    ahead, in_turn = engines
    for params in ({"max_tokens": 20}, {}):
        got, expected = (answer(e, [5, 9, 33], temperature=0, **params) for e in (ahead, in_turn))
        assert tokens(got) == tokens(expected) and len(tokens(got)) >= 20
        for name in ("finish_reason", "completion_tokens", "context_used"):
            assert getattr(got[-1].stats, name) == getattr(expected[-1].stats, name)
    turn = [5, 9, 33, *tokens(got)[:10], 40, 41]
    got, expected = (answer(e, turn, temperature=0, max_tokens=9) for e in (ahead, in_turn))
    assert tokens(got) == tokens(expected)
    assert got[-1].stats.cached_tokens == expected[-1].stats.cached_tokens == 13


def test_the_step_begun_ahead_of_a_stop_is_taken_back(engines: tuple[Engine, Engine]) -> None:
    ahead = engines[0]
    whole = tokens(answer(ahead, [5, 9, 33], temperature=2, seed=3, max_tokens=20))
    stop = next(t for i, t in enumerate(whole) if i > 1 and t not in whole[:i])
    events = answer(ahead, [5, 9, 33], frozenset({stop}), temperature=2, seed=3, max_tokens=20)
    said = whole[: whole.index(stop)]
    assert tokens(events) == said and events[-1].stats.finish_reason == "stop"
    assert ahead.cache.length == len(ahead.ids) == 3 + len(said)


def test_the_device_draws_what_the_host_would_allow() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200) * 3).astype(np.float32)
    cases = [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}]
    for given in cases:
        p = SamplingParams(**({"temperature": 0.8, "top_p": 1.0} | given))
        ids, expected = distribution(x, p)
        kept = np.array(mx.softmax(sampling.filtered(mx.array(x), p.temperature, p.top_k, p.top_p, p.min_p)))
        assert sorted(np.flatnonzero(kept)) == sorted(ids)
        assert np.abs(kept[ids] - expected).max() < 1e-5  # float32 against float64
    draw = sampling.drawer(0.8, 5, 1.0, 0.0, seed=11)
    ids, expected = distribution(x, SamplingParams(temperature=0.8, top_k=5, top_p=1.0))
    drawn = np.array([draw(mx.array(x[None])).item() for _ in range(2000)])
    for token, p in zip(ids, expected, strict=True):  # five standard deviations of a binomial
        assert abs((drawn == token).mean() - p) < 5 * (p * (1 - p) / 2000) ** 0.5
    again = sampling.drawer(0.8, 5, 1.0, 0.0, seed=11)
    assert [again(mx.array(x[None])).item() for _ in range(50)] == drawn[:50].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_told(bad: float, temperature: float) -> None:
    x = np.zeros((1, 50), np.float32)
    x[0, 3] = bad
    assert sampling.drawer(temperature, 0, 0.9, 0.0, 1)(mx.array(x)).item() == -1


# interop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 64), (4, 128), (8, 64)])
def test_folders_of_mlx_lm_give_its_tokens(
    bits: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, 24 tokens, on the folder that mlx_lm.convert writes; logits within float32's reach."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx_lm.models.cache import make_prompt_cache

    sizes = {"hidden_size": 256, "intermediate_size": 384, "rope_theta": 5e5}
    monkeypatch.setitem(VARIANTS, "mlx-lm", ("llama", sizes))
    t = tiny("mlx-lm", tmp_path)
    folder = convert(t.folder, tmp_path / "q", bits, group)
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    cache, prompt = make_prompt_cache(theirs), t.ids[:6]
    y = theirs(mx.array([prompt]), cache=cache)
    first, expected = np.array(y[0, -1]), []
    for _ in range(24):
        expected.append(int(mx.argmax(y[0, -1])))
        y = theirs(mx.array([[expected[-1]]]), cache=cache)
    model = tinychat_mlx.load(folder, backend="mlx", exact=True)
    assert f"int{bits} g{group}" in model.quantization
    agree(model.logits(prompt)[-1], first)
    assert tokens(answer(model.engine, prompt, temperature=0, max_tokens=24)) == expected


def convert(source: Path, target: Path, bits: int, group: int) -> Path:
    """What mlx_lm.convert does to a folder, less the tokenizer that a tiny model does not have."""
    import mlx_lm.utils as u

    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # transformers 5's key is lost on mlx-lm
    (source / "config.json").write_text(json.dumps(config))
    model, config = u.load_model(source, lazy=True)
    model, config = u.quantize_model(model, config, group, bits)
    u.save_model(target, model)
    u.save_config(config, target / "config.json")
    assert json.loads((target / "config.json").read_text())["quantization"]["bits"] == bits
    return target


# limits and errors -----------------------------------------------------------------------------------


def chip(**given: Any) -> Chip:
    return Chip(**({"name": "Apple M1", "metal": True, "generation": 13, "memory": 8 << 30,
                    "working_set": 5 << 30} | given))  # fmt: skip


def test_a_cache_that_would_not_fit_is_refused_with_the_sum() -> None:
    b = MlxBackend(exact=True)
    b.chip = chip(working_set=1 << 30)
    shape = CacheShape(16, 8, 64)  # Llama-3.2-1B in float32: 64 KiB a token
    words = r"40000 tokens needs 2\.44 GB.*may give 1\.00 GB: use --context \d{4,5}"
    with pytest.raises(BackendError, match=words):
        b.new_cache(shape, 40000)
    assert b.new_cache(shape, 100).capacity == 100
    b.chip = chip(working_set=1 << 20)
    with pytest.raises(BackendError, match="smaller model"):
        b.new_cache(shape, 100)


def test_limits_stay_below_three_quarters_of_the_memory() -> None:
    assert chip().limit == 5 << 30
    assert chip(working_set=9 << 30).limit == 6 << 30
    assert find_chip().limit <= find_chip().memory * 3 // 4


def test_dtypes_by_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYCHAT_MLX_DTYPE", raising=False)
    assert choose_dtype(chip(), exact=False) == mx.float16
    assert choose_dtype(chip(), exact=True) == mx.float32
    assert choose_dtype(chip(metal=False, generation=0), exact=False) == mx.float32
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "bfloat16")
    assert choose_dtype(chip(name="Apple M3", generation=15), exact=False) == mx.bfloat16
    with pytest.raises(BackendError, match="emulated on Apple M1: use float16"):
        choose_dtype(chip(), exact=False)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "int4")
    with pytest.raises(BackendError, match="unknown: give one of"):
        choose_dtype(chip(), exact=False)


def test_float16_means_the_same_as_float32(monkeypatch: pytest.MonkeyPatch, tiny_root: Path) -> None:
    """The dtype of a Mac, on few tokens: constants must be narrowed, or everything is computed wide."""
    t = tiny("llama-llama3", tiny_root)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    cache = d.new_cache(8)
    y = d.forward(t.ids[:4], cache)
    assert y.dtype == mx.float16 and cache.k[0].dtype == mx.float16
    # MLX's CPU loops sum in float16: 96 terms · 2^-11, through 4 layers
    got = d.backend.to_host(d.forward((t.ids[4],), cache))
    assert np.abs(got - t.logits[4]).max() < 4 * 96 * 2**-11 * np.abs(t.logits[4]).max()


def test_old_versions_and_macs_without_metal_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version("0.32.0")
    check_version("1.0")
    with pytest.raises(BackendError, match=r"MLX 0\.29\.1 is too old: pip install"):
        check_version("0.29.1")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no Metal device.*--backend cpu"):
        MlxBackend(exact=True)


def test_threads_take_turns(tiny_root: Path) -> None:
    """MLX's default stream is per thread, and two evaluations at once abort the process."""
    t = tiny("llama", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    results: list[F32] = []

    def run() -> None:
        results.append(logits(d, t.ids, [20, *[1] * 20]))

    jobs = [threading.Thread(target=run) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(results) == 4
    for got in results:
        agree(got, t.logits)


def test_a_failure_on_the_device_is_a_backend_error() -> None:
    class Broken:
        def astype(self, dtype: Any) -> Any:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes")  # MLX's own words

    with pytest.raises(BackendError, match=r"MLX stopped: .*allocate 9 bytes: use a shorter --context"):
        MlxBackend(exact=True).to_host(Broken())


def test_it_says_what_it_runs_on() -> None:
    device = MlxBackend(exact=True).describe()
    where = "Metal" if mx.metal.is_available() else "CPU"
    assert where in device.detail and "float32" in device.detail and mx.__version__ in device.detail
