"""Canonical weights: packing is lossless, and joining is stacking."""

from __future__ import annotations

import numpy as np
import pytest

from tinychat_mlx.weights.weight import Dense, Packed, Weight, join, pack_codes, to_float32, unpack_codes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("w_bit", [3, 4, 8])
def test_pack_then_unpack_is_identity_and_equals_mlx(w_bit: int) -> None:
    q = RNG.integers(0, 2**w_bit, (5, 128), dtype=np.uint8)
    words = pack_codes(q, w_bit)
    assert words.shape == (5, 128 * w_bit // 32) and words.dtype == np.uint32
    assert (unpack_codes(words, w_bit) == q).all()
    mx = pytest.importorskip("mlx.core")
    ones = mx.ones((5, 2))
    theirs = mx.dequantize(mx.array(words), ones, 0 * ones, group_size=64, bits=w_bit)
    assert (np.array(theirs) == q).all()


def test_bfloat16_bits_widen_exactly() -> None:
    bits = np.array([0x3F80, 0xC000, 0x0001, 0x7F80], np.uint16)
    assert to_float32(bits).tolist() == [1.0, -2.0, 9.183549615799121e-41, np.inf]


def make(n: int, group: int = 64, bias: bool = False) -> Packed:
    q = RNG.integers(0, 16, (n, 128), dtype=np.uint8)
    side = [RNG.random((n, 128 // group)).astype(np.float16) for _ in range(2)]
    return Packed("w", pack_codes(q, 4), side[0], side[1], 4, group, np.ones(n, np.float32) if bias else None)


def test_joined_weights_mean_their_parts_stacked() -> None:
    parts: list[Weight] = [make(8), make(4, bias=True)]
    whole = join("all", parts)
    assert whole is not None and whole.shape == (12, 128)
    assert (whole.to_float32() == np.concatenate([p.to_float32() for p in parts])).all()
    assert whole.bias is not None and whole.bias.tolist() == [0] * 8 + [1] * 4


def test_what_differs_in_form_is_not_joined() -> None:
    dense = Dense("d", np.ones((4, 128), np.float16))
    assert join("all", [make(8), make(8, group=32)]) is None
    assert join("all", [make(8), dense]) is None
    assert join("all", [dense, Dense("e", np.ones((4, 128), np.float32))]) is None
