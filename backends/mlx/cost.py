"""Roofline model: bytes and kernel launches per token, and the tokens/s that they allow on each chip.

    python -m tinychat_mlx.backends.mlx.cost [SHAPE]

A decoded token reads every weight once. Its time on a Mac is bytes / (0.8 · bandwidth) + launches · 2.3 µs.
0.8 is the share of the specified bandwidth that 4B and larger models reach with MLX and llama.cpp on M1, M2
and M4 Pro. 2.3 µs per launch is the remainder in mlx-lm's published figure for Qwen3-4B on an M4 Max (134.5
tokens/s, 690 launches); it predicts the M3 Pro's (44.6) within 5 %. None of these figures is our measurement.

This module does not import MLX, so it runs on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.base import shapes

SHARE, LAUNCH_S = 0.8, 2.3e-6
# GB/s of the variant with the largest GPU, and the source: Apple's announcement of that month, which rounds;
# or computed from the memory (bits at a time, MT/s). A smaller M3 Max has 300, a smaller M4 Max 410.
CHIPS = {
    "M1": (68.25, "128 bit LPDDR4X-4266"),
    "M1 Pro": (200.0, "Apple 2021-10"), "M1 Max": (400.0, "Apple 2021-10"), "M1 Ultra": (800.0, "Apple 2022-03"),
    "M2": (100.0, "Apple 2022-06"),
    "M2 Pro": (200.0, "Apple 2023-01"), "M2 Max": (400.0, "Apple 2023-01"), "M2 Ultra": (800.0, "Apple 2023-06"),
    "M3": (100.0, "Apple 2023-10"), "M3 Pro": (150.0, "Apple 2023-10"), "M3 Max": (400.0, "Apple 2023-10"),
    "M3 Ultra": (819.0, "Apple 2025-03"),
    "M4": (120.0, "Apple 2024-05"), "M4 Pro": (273.0, "Apple 2024-10"), "M4 Max": (546.0, "Apple 2024-10"),
    "M5": (153.6, "128 bit LPDDR5X-9600"), "M5 Pro": (307.0, "Apple 2026-03"), "M5 Max": (614.0, "Apple 2026-03"),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes that determine a decoder's cost, named as in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read from a config.json of a dense, gated model."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes = {name: int(config[name]) for name in names}
        heads = sizes["num_attention_heads"]
        kind = config.get("model_type")
        return cls(
            **sizes,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or sizes["hidden_size"] // heads),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
            qk_norm=kind == "qwen3",
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(N, K) of the products of one layer, joined: qkv, o, gate and up, down."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        c, f = self.hidden_size, self.intermediate_size
        return [(q + 2 * kv, c), (c, q), (2 * f, c), (c, f)]


NAMES = (
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "llama-3.2-1b",
    "qwen2.5-1.5b",
    "llama-3.2-3b",
    "qwen3-4b",
    "llama-3.1-8b",
)
SHAPES = {name: Shape.of(shapes.SHAPES[name]) for name in NAMES}


@dataclass(frozen=True)
class Form:
    """The form in which a program stores and runs a model. Groups share a float16 scale and offset."""

    name: str
    w_bit: int
    group_size: int
    head_bit: int
    fused: bool = False  # our kernels, or one launch for each of mlx-lm's operations
    joined: bool = True  # qkv, and gate and up, as one product each
    shortlist: float | None = None  # a head in halves: the share read at full width; None: everything at once


# Of a head in halves (head.py) all upper halves are read, and the lower halves of this share of its tiles.
# The demo's held-out text needs 0.2 % for the most likely token, 2 % for one sampled at a temperature of 0.7,
# 7 % at 1 and 14 % at 1 with top_p 1 (checked by tests/emulators/metal/test_head.py). mlx-lm's bytes would be reached
# at 27 % for llama-3.2-1b.
SHORTLIST = 1 / 16
BETWEEN = 15  # bytes per row that the kernels pass on: the estimate, and a quarter of the tile's bounds

# mlx_lm.convert quantises embedding and head like everything else by default, in groups of 64; an 8-bit head
# needs its --quant-predicate. Ours keeps 8 bits in the head unless `--head int4` is given.
MLX_LMS = {bits: Form(f"mlx-lm, head int{bits}", 4, 64, bits, joined=False) for bits in (4, 8)}
MLX_LM = MLX_LMS[4]
OURS = {
    4: Form("ours, head int4", 4, 128, 4, fused=True),
    8: Form("ours, head int8", 4, 128, 8, fused=True, shortlist=SHORTLIST),
}
# comparable forms next to each other
FORMS = [form for bits in (4, 8) for form in (MLX_LMS[bits], OURS[bits])]


def bytes_per_token(shape: Shape, form: Form, context: int = 0) -> int:
    """Return the bytes read per token: weights, and keys and values of a context in float16."""
    body = shape.num_hidden_layers * sum(n * k for n, k in shape.linears)
    overhead = 32 / form.group_size
    n, k = shape.vocab_size, shape.hidden_size  # one row of an embedding is read; a tied one is the head
    head = n * k * (form.head_bit + overhead) / 8
    if form.shortlist is not None:
        head = halved_bytes(n, k, form.group_size, form.shortlist)
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2 * context
    return round(body * (form.w_bit + overhead) / 8 + head) + kv


def halved_bytes(n: int, k: int, group_size: int, share: float, itemsize: int = 2) -> float:
    """Return the bytes read of a head (N, K) in halves.

    The lower halves and again the scales are read for this share of its tiles.
    """
    return n * k / 2 * (1 + share) + n * k / group_size * itemsize * (2 + share) + n * BETWEEN


def launches_per_token(shape: Shape, form: Form) -> int:
    """Return the kernel launches per token. Equals the count in MLX's trace (tests/emulators/metal/test_model.py)."""
    layer = 2 + 2 + 1  # rope of q and k, two cache writes, attention
    layer += 2 if shape.qk_norm else 0
    if form.fused:
        layer += 4  # qkv with its norm, o with its residual, gate and up, down
    else:
        products = 4 if form.joined else 7
        layer += products + 2 + 1 + 2  # norms, gated activation, residuals
        layer += 2 if form.joined else 0  # conversion of a norm's result from our float32 residual to float16
        layer += (1 if form.joined else 3) if shape.qkv_bias else 0
    around = 3 + 1 + (1 if form.fused else 2)  # gather of three arrays, dequantise; norm and head
    if form.shortlist is not None:
        around += 2 + 2  # of a tied embedding both halves are gathered and joined; the head is three kernels
    around += 0 if not form.joined else 1 if form.fused else 2  # to and from the float32 residual
    return shape.num_hidden_layers * layer + around


def seconds_per_token(shape: Shape, form: Form, gb_s: float, context: int = 0) -> float:
    """Evaluate the model that this module's docstring describes."""
    read = bytes_per_token(shape, form, context) / (SHARE * gb_s * 1e9)
    return read + launches_per_token(shape, form) * LAUNCH_S


def table(shape: Shape, context: int = 0) -> list[dict[str, Any]]:
    """Return one row per chip: expected tokens/s of each form, the limit by bytes, the bandwidth's source."""
    rows: list[dict[str, Any]] = []
    for chip, (gb_s, source) in CHIPS.items():
        row: dict[str, Any] = {"chip": chip, "gb_s": gb_s}
        for form in FORMS:
            row[form.name] = round(1 / seconds_per_token(shape, form, gb_s, context), 1)
        row["ceiling"] = round(gb_s * 1e9 / bytes_per_token(shape, OURS[4], context), 1)
        row["bandwidth from"] = source
        rows.append(row)
    return rows


def reads(shape: Shape, context: int = 0) -> list[dict[str, Any]]:
    """Return the inputs of the table in its columns: megabytes read and kernels launched per token."""
    megabytes = {f.name: round(bytes_per_token(shape, f, context) / 1e6, 1) for f in FORMS}
    launches = {f.name: launches_per_token(shape, f) for f in FORMS}
    heads: dict[str, dict[str, Any]] = {"MB read per token": megabytes, "launches per token": launches}
    return [
        {"chip": what, "gb_s": "", **row, "ceiling": "", "bandwidth from": ""} for what, row in heads.items()
    ]


def report(name: str, context: int = 0) -> str:
    """Format the table as text. Raises KeyError for a shape that is not in SHAPES."""
    rows = reads(SHAPES[name], context) + table(SHAPES[name], context)
    lines = [f"{name}, a token after {context}; tokens/s are expected, the ceiling is of our int4 head:"]
    lines.append("  " + "".join(f"{h:>21}" for h in rows[0]))
    lines += ["  " + "".join(f"{v:>21}" for v in row.values()) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    for shown in sys.argv[1:] or SHAPES:
        print(report(shown), end="\n\n")
