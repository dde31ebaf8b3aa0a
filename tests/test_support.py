"""Which family runs where, dense and int4: tried here, and the README's table says exactly that.

`python tests/test_support.py` tries everything and prints the table.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_models import RENAMED, VARIANTS, tiny

from tinychat_mlx.arch import ARCHITECTURES
from tinychat_mlx.backend import Backend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Decoder
from tinychat_mlx.weight import Dense, Packed, Weight, pack_codes

README = Path(__file__).resolve().parent.parent / "README.md"
GROUP, TOKENS = 32, 40  # longer than every window


def variant_of(family: str) -> str:
    """The first tiny model of a family."""
    named = [v for v, (kind, _) in VARIANTS.items() if kind == family]
    return named[0] if named else next(v for v in RENAMED if v.split("-")[0] == family)


def round_to_int4(weight: Dense) -> Packed:
    """Plain rounding, enough to have int4 weights: scale and offset from each group's ends."""
    w = weight.to_float32()
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    q = (groups - biases[..., None].astype(np.float32)) / scales[..., None].astype(np.float32)
    codes = np.clip(np.rint(q), 0, 15).astype(np.uint8).reshape(w.shape)
    return Packed(weight.name, pack_codes(codes, 4), scales, biases, 4, GROUP, weight.bias)


class Int4:
    """A checkpoint whose linears are int4; routers and learned positions stay dense, as AWQ keeps them."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.has, self.vector = source, source.has, source.vector

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        weight = self.source.weight(module, shape)
        dense = re.search(r"(mlp|block_sparse_moe)\.gate$|shared_expert_gate$|wpe$|embed_positions$", module)
        return weight if dense or not isinstance(weight, Dense) else round_to_int4(weight)


def decoder(folder: Path, backend: Backend, int4: bool) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    return Decoder(parse_config(checkpoint.config), Int4(checkpoint) if int4 else checkpoint, backend)


def logits(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """Half in one piece, the rest token by token, so that both ways of running are tried."""
    cache, host = decoder.new_cache(len(ids)), decoder.backend.to_host
    half = len(ids) // 2
    rows = [host(decoder.forward(ids[:half], cache, last_only=False))]
    rows += [host(decoder.forward([t], cache)) for t in ids[half:]]
    return np.concatenate(rows)


@cache
def expected(family: str, int4: bool, root: Path) -> np.ndarray:
    t = tiny(variant_of(family), root)
    return logits(decoder(t.folder, ReferenceBackend(), int4), t.ids) if int4 else t.logits


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_family_runs_on(family: str, int4: bool, backend: Backend, tiny_root: Path) -> None:
    """Dense equals transformers, int4 equals the reference on the same codes, to 1e-4 of the largest logit.

    float32 sums of about 100 terms through 4 layers are good to 2e-5; int4 changes the weights, not that.
    """
    t = tiny(variant_of(family), tiny_root)
    got = logits(decoder(t.folder, backend, int4), t.ids)
    want = expected(family, int4, tiny_root)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
