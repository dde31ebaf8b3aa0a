"""The kernels of a head in halves in the emulator: against float64, both lane orders, at guard pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal import address_spaces
from metal.emulator import (
    BEGIN,
    COMPILERS,
    CXX,
    END,
    ODD,
    Launch,
    buffers_of,
    build,
    floats,
    guarded,
    host,
    run,
    traced,
    unwritten,
)
from virtual_gpu import SLACK

from tinychat_mlx.backends.mlx.head import Shortlist, array_of
from tinychat_mlx.backends.mlx.split_int8 import SplitHandle
from tinychat_mlx.contract import Choice, Norm

METAL = mx.metal.is_available()
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}  # half a unit of the last place
TILE = 4
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A head, an input and a choice."""

    dtype: str
    group: int
    n: int
    k: int
    norm: bool
    wide: bool  # x is float32, like the residual
    temperature: float

    def __str__(self) -> str:
        on = [w for w in ("norm", "wide") if getattr(self, w)]
        return f"{self.dtype}-g{self.group}-{self.n}x{self.k}-{'-'.join(on)}-T{self.temperature}"


def cases() -> list[Case]:
    """Every dtype and group; one group, K just above a block, ragged N, more rows than a SIMD-group's 32."""
    return [
        Case(dtype, group, n, k, norm=(i + j) % 3 > 0, wide=(i + j) % 2 > 0, temperature=(0.0, 0.05, 0.9)[(i + j // 2) % 3])
        for i, (dtype, group) in enumerate(product(DTYPES, (32, 64, 128)))
        for j, (n, k) in enumerate([(13, group), (8, 896), (37, 512), (130, 512 + group), (65, 1152)])
    ]  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """A case's arrays and their values in float64."""

    x: Any
    w: SplitHandle
    norm: Norm | None
    codes: Any  # (N, K)
    h: Any  # (K,), normalised

    @property
    def named(self) -> Arrays:
        """Return the inputs of both kernels, except for a plane."""
        norm = {} if self.norm is None else {"norm_weight": self.norm.weight, "eps": mx.array(self.norm.eps)}
        return {"scales": self.w.scales, "biases": self.w.biases, **norm}

    def by_group(self, array: Any) -> Any:
        """(N, K / G) -> float64 (N, K)."""
        return np.repeat(floats(host(array)), self.w.group_size, axis=1)


@cache
def operands(c: Case) -> Operands:
    rng = np.random.default_rng(c.n * c.k)
    codes = rng.integers(0, 256, (c.n, c.k), dtype=np.uint8)
    scales = (rng.random((c.n, c.k // c.group)) + 0.5) / 128 * c.k**-0.5
    biases = -scales * rng.integers(0, 256, scales.shape)
    scales, biases = (mx.array(a.astype(np.float32)).astype(DTYPES[c.dtype]) for a in (scales, biases))
    planes = [mx.array(words(plane)) for plane in (codes >> 4, codes & 15)]
    w = SplitHandle("w", (c.n, c.k), *planes, scales, biases, c.group, lambda u, v: None)
    x = mx.array(rng.standard_normal((1, c.k)).astype(np.float32))
    x = x if c.wide else x.astype(DTYPES[c.dtype])
    h, norm = floats(host(x))[0], None
    if c.norm:
        weight = (1 + 0.3 * rng.standard_normal(c.k)).astype(np.float32)
        norm = Norm("n", "rms", mx.array(weight), None, 1e-3)
        h = h / np.sqrt((h**2).mean() + 1e-3) * weight
    return Operands(x, w, norm, codes, h)


def words(halves: Any) -> Any:
    """Pack halves (N, K) to uint32 (N, K / 8) by arithmetic."""
    place = np.uint64(16) ** np.arange(8, dtype=np.uint64)
    return (halves.reshape(len(halves), -1, 8) * place).sum(-1).astype(np.uint32)


# running a kernel -------------------------------------------------------------------------------------
Outputs = list[tuple[Sequence[int], Any]]  # shape, NumPy's dtype


def results(call: Callable[[], Any], launch: Launch, kernel: Any, named: Arrays, outputs: Outputs) -> list[Any]:  # fmt: skip
    """Return a kernel's outputs in float64. Emulated, they must not depend on lane order or array position."""
    if METAL:
        return [floats(host(y)) for y in call()]
    found = []
    for order, at in ((0, END), (3, BEGIN), (0, ODD)):
        given = buffers_of(list(named), [host(a) for a in named.values()], launch.text)
        made = [guarded(unwritten(*form), at) for form in outputs]
        run(kernel, [*(guarded(b, at) for b in given), *made], launch.grid, launch.threadgroup, order)
        found.append([floats(y) for y in made])
    for other in found[1:]:
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found[0], other, strict=True))
    return found[0]


def launched(call: Callable[[Any], Any], first: Any, named: Arrays) -> Launch:
    """Return MLX's trace. Everything must be evaluated first, or it would be an input unknown to the trace."""
    mx.eval(named)
    (launch,) = traced(call, first)
    return launch


def need_a_device() -> None:
    if CXX is None and not METAL:
        absent("no g++ or clang++ with _Float16, and no Metal")


@cache
def emulated(compiler: str | None) -> dict[str, Any]:
    """Compile every source that the cases need, with one start of the compiler."""
    every = [f(c)[1] for c in cases() for f in (upper, lower)] + [least(*some())[1]]
    texts = list(dict.fromkeys(launch.text for launch in every))
    return dict(zip(texts, build(texts, compiler), strict=True))


def kernel_of(launch: Launch, compiler: str | None = CXX) -> Any:
    return None if METAL else emulated(compiler)[launch.text]


# upper -----------------------------------------------------------------------------------------------
def upper(c: Case) -> tuple[Callable[[], Any], Launch, Arrays, Outputs]:
    o, choice = operands(c), array_of(Choice(c.temperature, 0.01))

    def call(x: Any = o.x) -> Any:
        return Shortlist().upper(x, o.w, o.norm, choice)

    named = {"x": o.x, "w": o.w.upper, **o.named, "choice": choice}
    tiles = -(-c.n // TILE)
    shapes = [(1, c.n), (tiles,), (tiles,)]
    return call, launched(call, o.x, named), named, [(shape, np.float32) for shape in shapes]


def check_upper(c: Case, compiler: str | None = CXX) -> None:
    """Check estimates against float32 sums, top against four estimates, reach against head.py's formula."""
    call, launch, named, outputs = upper(c)
    o = operands(c)
    y, top, reach = results(call, launch, kernel_of(launch, compiler), named, outputs)
    s, b = o.by_group(o.w.scales), o.by_group(o.w.biases)
    u = o.codes >> 4
    y64 = (16 * s * u + b + 7.5 * s) @ o.h
    error = c.k * 2.0**-23 * ((16 * s * u + np.abs(b) + 7.5 * s) @ np.abs(o.h)) * SLACK + 1e-7
    assert (np.abs(y[0] - y64) <= error).all()  # a NaN fails
    d = np.sqrt(85 / 4 * (s**2 @ o.h**2))
    more = 6 * np.sqrt(2) * d
    if c.temperature:
        more = np.minimum(more, d**2 / (2 * c.temperature))
    reaches = y[0] + UNIT[c.dtype] * np.abs(y[0]) + more
    for t in range(len(top)):
        rows = slice(TILE * t, TILE * (t + 1))
        assert top[t] == y[0][rows].max()
        # d and its factors are float32 sums of squares: K roundings of positive terms
        assert abs(reach[t] - reaches[rows].max()) <= SLACK * (c.k * 2.0**-23 * more.max() + 1e-6)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_an_estimate_is_the_upper_halves_product_and_reaches_as_far_as_it_may_err(case: Case) -> None:
    need_a_device()
    check_upper(case)


# lower -----------------------------------------------------------------------------------------------
def lower(c: Case) -> tuple[Callable[[], Any], Launch, Arrays, Outputs]:
    """Every third tile matters, and one whose reach is NaN."""
    o, rng, tiles = operands(c), np.random.default_rng(c.n), -(-c.n // TILE)
    estimate = mx.array(rng.standard_normal((1, c.n)).astype(np.float32))
    far = np.arange(tiles, dtype=np.float32) % 3
    far[tiles // 2] = np.nan
    reach, least = mx.array(far), mx.array([2.0])

    def call(x: Any = o.x) -> Any:
        return [Shortlist().lower(x, o.w, o.norm, estimate, reach, least)]

    named = {"x": o.x, "w": o.w.lower, **o.named, "estimate": estimate, "reach": reach, "least": least}
    del named["biases"]
    narrow = np.uint16 if c.dtype == "bfloat16" else np.dtype(c.dtype)
    return call, launched(call, o.x, named), named, [((1, c.n), narrow)]


def check_lower(c: Case, compiler: str | None = CXX) -> None:
    call, launch, named, outputs = lower(c)
    o, estimate = operands(c), np.array(named["estimate"])[0]
    (y,) = results(call, launch, kernel_of(launch, compiler), named, outputs)
    s = o.by_group(o.w.scales)
    v = (o.codes & 15).astype(np.float64)
    whole = np.repeat(~(np.array(named["reach"]) < 2), TILE)[: c.n]
    assert 0 < whole.sum() < c.n or c.n < 9
    y64 = estimate + np.where(whole, (s * (v - 7.5)) @ o.h, 0)
    error = c.k * 2.0**-23 * ((s * (v + 7.5)) @ np.abs(o.h)) * SLACK + 1.01 * UNIT[c.dtype] * np.abs(y64)
    assert (np.abs(y[0] - y64) <= error + 1e-7).all()
    handed_on = floats(host(mx.array(estimate).astype(DTYPES[c.dtype])))
    assert (y[0] == handed_on)[~whole].all()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_where_it_matters_the_lower_halves_are_added_and_elsewhere_the_estimate_stays(case: Case) -> None:
    need_a_device()
    check_lower(case)


# least -----------------------------------------------------------------------------------------------
TILES = (1, 3, 7, 8, 31, 500, 511, 512, 513, 1024, 4099)
CHOICES = ((0.0, 0.0), (0.7, 0.025), (1.0, 0.001), (1.0, 40.0), (5.0, 0.2), (0.7, 0.0))


def some(tiles: int = 8, spread: float = 2.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(tiles)
    top = (spread * rng.standard_normal(tiles)).astype(np.float32)
    return top, top + rng.random(tiles, np.float32)


def least(
    top: Any, reach: Any, choice: tuple[float, float] = CHOICES[1], dtype: str = "float16"
) -> tuple[Callable[[], Any], Launch, Arrays, Outputs]:
    named = {"top": mx.array(top), "reach": mx.array(reach), "choice": array_of(Choice(*choice))}

    def call(top: Any = named["top"]) -> Any:
        return [Shortlist().least(top, named["reach"], named["choice"], DTYPES[dtype])]

    return call, launched(call, named["top"], named), named, [((1,), np.float32)]


@cache
def alone(text: str) -> Any:
    return None if METAL else build([text])[0]


def check_least(
    tiles: int, choice: tuple[float, float], spread: float, dtype: str = "float16", cxx: str | None = CXX
) -> None:
    """Check the search: of 512 steps of T / 8, the last below which the tiles weigh at most `tail`."""
    (temperature, tail), (top, reach) = choice, some(tiles, spread)
    call, launch, named, outputs = least(top, reach, choice, dtype)
    kernel = alone(launch.text) if cxx == CXX else emulated(cxx)[launch.text]
    ((found,),) = results(call, launch, kernel, named, outputs)
    best = float(top.max())
    best -= UNIT[dtype] * abs(best)
    if not temperature:
        assert abs(found - best) <= 2.0**-23 * abs(best)
        return
    thresholds = best - temperature * (64 - np.arange(512) / 8)
    weight = TILE * np.exp((reach.astype(np.float64) - best) / temperature)
    mass = np.array([weight[reach < t].sum() for t in thresholds])
    at = int(np.argmin(np.abs(thresholds - found)))
    rounding = SLACK * 64 * 2.0**-23 * max(temperature, abs(best))
    assert abs(thresholds[at] - found) <= rounding
    # a tile may be on a threshold except for that rounding, and sums are float32
    close = weight[np.abs(reach - thresholds[at]) <= 2 * rounding].sum()
    assert at == 0 or mass[at] <= tail * 1.0001 + close
    if at < 511:
        beyond = weight[np.abs(reach - thresholds[at + 1]) <= 2 * rounding].sum()
        assert mass[at + 1] >= tail * 0.9999 - beyond


@pytest.mark.parametrize("spread", [0.3, 8.0])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_least_reach_that_matters_leaves_out_as_much_as_it_may(
    choice: tuple[float, float], tiles: int, spread: float
) -> None:
    need_a_device()
    check_least(tiles, choice, spread, tuple(DTYPES)[tiles % 2])


def test_what_is_no_number_leaves_nothing_out_that_matters() -> None:
    need_a_device()
    for choice in CHOICES:
        top, reach = some(100)
        top[5] = reach[5] = reach[40] = np.nan
        call, launch, named, outputs = least(top, reach, choice)
        ((found,),) = results(call, launch, alone(launch.text), named, outputs)
        assert found <= np.nanmax(top)
        top[:] = reach[:] = np.nan
        call, launch, named, outputs = least(top, reach, choice)
        ((found,),) = results(call, launch, alone(launch.text), named, outputs)
        assert not (reach < found).any()


# all of them -----------------------------------------------------------------------------------------
def test_the_other_compiler_gives_the_same_numbers() -> None:
    """Undefined behaviour differs between compilers."""
    if len(COMPILERS) < 2:
        pytest.skip("one compiler with _Float16 is here (clang++ 16 has it)")
    for case in cases()[3::7]:
        check_upper(case, COMPILERS[1])
        check_lower(case, COMPILERS[1])
    check_least(1025, CHOICES[1], 2.0, cxx=COMPILERS[1])


def test_there_are_at_least_forty_cases_of_each() -> None:
    assert len(cases()) >= 40 and len(TILES) * len(CHOICES) * 2 >= 40
    for field in ("norm", "wide", "temperature"):
        assert len({(c.dtype, getattr(c, field)) for c in cases()}) >= 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_respect_address_spaces(dtype: str) -> None:
    if address_spaces.CLANG is None:
        absent("no clang++: address spaces are not checked")
    every = [f(c)[1] for c in cases() if c.dtype == dtype for f in (upper, lower)]
    texts = {launch.text for launch in [*every, least(*some(), dtype=dtype)[1]]}
    assert len(texts) > 8
    for text in texts:
        assert address_spaces.errors(text) == []
        wrong = text.replace("const device uint32_t* w,", "const thread uint32_t* w,")
        assert address_spaces.errors(wrong) or "head_2" in text


def test_texts_are_ascii_and_a_name_means_one_text() -> None:
    """MLX caches a compiled kernel by name.

    Two sources with one name would give a recompilation or the wrong kernel.
    """
    named: dict[str, str] = {}
    every = [f(c)[1] for c in cases() for f in (upper, lower)]
    every += [least(*some(tiles), dtype=d)[1] for d in DTYPES for tiles in (3, 100)]
    for found in every:
        assert found.text.isascii()
        assert named.setdefault(found.name, found.text) == found.text
    assert len(named) == len(set(named.values())) > 30
