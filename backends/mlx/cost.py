"""The roofline on paper: bytes and kernel launches a token, and what they allow, chip by chip.

    python -m tinychat_mlx.backends.mlx.cost [SHAPE]

A decoded token reads every weight once. Its time on a Mac is bytes / (0.8 · bandwidth) + launches · 2.3 µs:
0.8 is the share of the specified bandwidth that 4B and larger models reach with MLX and llama.cpp on M1, M2
and M4 Pro; 2.3 µs a launch is what is left over in mlx-lm's own figure for Qwen3-4B on an M4 Max (134.5
tokens/s, 690 launches), and it foretells the M3 Pro's (44.6) within 5 %. Nothing here was measured by us.

This module imports no MLX: it runs anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHARE, LAUNCH_S = 0.8, 2.3e-6
# GB/s of the form with the largest GPU, and whence: Apple's announcement of that month, which rounds; or what follows
# from the memory (bits at a time, MT/s). A smaller M3 Max has 300, a smaller M4 Max 410.
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
    """The sizes that decide a decoder's cost, named as in config.json."""

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
        """From a config.json of a dense, gated model."""
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
        """(N, K) of one layer's products, joined: qkv, o, gate and up, down."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        c, f = self.hidden_size, self.intermediate_size
        return [(q + 2 * kv, c), (c, q), (2 * f, c), (c, f)]


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936, qkv_bias=True),
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, qk_norm=True),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 128, 151936, qkv_bias=True),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, 128, 151936, qk_norm=True),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Form:
    """How a program keeps and runs a model. Groups share a float16 scale and offset."""

    name: str
    w_bit: int
    group_size: int
    head_bit: int
    fused: bool = False  # our kernels, or one launch for each of mlx-lm's operations
    joined: bool = True  # qkv, and gate and up, as one product each
    shortlist: float | None = None  # a head in halves: the share read whole; None: all at once


# Of a head in halves (head.py) the upper ones are read, and the lower ones of this share of its tiles. The demo's held-out
# text needs 0.2 % for the likeliest token, 2 % for one drawn at a temperature of 0.7, 7 % at 1 and 14 % at 1 with top_p 1
# (tests/emulators/metal/test_head.py holds them to it). mlx-lm's bytes would be reached at 27 % for llama-3.2-1b.
SHORTLIST = 1 / 16
BETWEEN = 15  # bytes a row that its kernels hand on: the estimate, and a quarter of what its tile is told by

# mlx_lm.convert's default quantises embedding and head as everything else, in groups of 64; a head of 8 bits
# is for its --quant-predicate to ask for. Ours keeps 8 bits in the head unless `--head int4` is given.
MLX_LMS = {bits: Form(f"mlx-lm, head int{bits}", 4, 64, bits, joined=False) for bits in (4, 8)}
MLX_LM = MLX_LMS[4]
OURS = {
    4: Form("ours, head int4", 4, 128, 4, fused=True),
    8: Form("ours, head int8", 4, 128, 8, fused=True, shortlist=SHORTLIST),
}
FORMS = [form for bits in (4, 8) for form in (MLX_LMS[bits], OURS[bits])]  # like beside like


def bytes_per_token(shape: Shape, form: Form, context: int = 0) -> int:
    """Weights read for one token, and keys and values of a context in float16."""
    body = shape.num_hidden_layers * sum(n * k for n, k in shape.linears)
    overhead = 32 / form.group_size
    n, k = shape.vocab_size, shape.hidden_size  # of an embedding one row is read; a tied one is the head
    head = n * k * (form.head_bit + overhead) / 8
    if form.shortlist is not None:
        head = halved_bytes(n, k, form.group_size, form.shortlist)
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2 * context
    return round(body * (form.w_bit + overhead) / 8 + head) + kv


def halved_bytes(n: int, k: int, group_size: int, share: float, itemsize: int = 2) -> float:
    """Read of a head (N, K) in halves, the lower ones of this share of its tiles, whose scales are read again."""
    return n * k / 2 * (1 + share) + n * k / group_size * itemsize * (2 + share) + n * BETWEEN


def launches_per_token(shape: Shape, form: Form) -> int:
    """Kernels started for one token; equals the count of MLX's trace (tests/emulators/metal/test_model.py)."""
    layer = 2 + 2 + 1  # rope of q and k, two cache writes, attention
    layer += 2 if shape.qk_norm else 0
    if form.fused:
        layer += 4  # qkv with its norm, o with its residual, gate and up, down
    else:
        products = 4 if form.joined else 7
        layer += products + 2 + 1 + 2  # norms, gated activation, residuals
        layer += 2 if form.joined else 0  # a norm's result, from our float32 residual, to float16
        layer += (1 if form.joined else 3) if shape.qkv_bias else 0
    around = 3 + 1 + (1 if form.fused else 2)  # gather of three arrays, dequantise; norm and head
    if form.shortlist is not None:
        around += 2 + 2  # of a tied embedding both halves are gathered and joined; the head is three kernels
    around += 0 if not form.joined else 1 if form.fused else 2  # to and from the float32 residual
    return shape.num_hidden_layers * layer + around


def seconds_per_token(shape: Shape, form: Form, gb_s: float, context: int = 0) -> float:
    """The model of this file's first lines."""
    read = bytes_per_token(shape, form, context) / (SHARE * gb_s * 1e9)
    return read + launches_per_token(shape, form) * LAUNCH_S


def table(shape: Shape, context: int = 0) -> list[dict[str, Any]]:
    """One row a chip: expected tokens/s of each form, the ceiling of the bytes alone, and whence the bandwidth."""
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
    """What the table's rows follow from, in its columns: megabytes read and kernels launched for one token."""
    megabytes = {f.name: round(bytes_per_token(shape, f, context) / 1e6, 1) for f in FORMS}
    launches = {f.name: launches_per_token(shape, f) for f in FORMS}
    heads: dict[str, dict[str, Any]] = {"MB read a token": megabytes, "launches a token": launches}
    return [
        {"chip": what, "gb_s": "", **row, "ceiling": "", "bandwidth from": ""} for what, row in heads.items()
    ]


def report(name: str, context: int = 0) -> str:
    """The table as text. Raises KeyError for a shape that is not in SHAPES."""
    rows = reads(SHAPES[name], context) + table(SHAPES[name], context)
    lines = [f"{name}, a token after {context}; tokens/s are expected, the ceiling is of our int4 head:"]
    lines.append("  " + "".join(f"{h:>21}" for h in rows[0]))
    lines += ["  " + "".join(f"{v:>21}" for v in row.values()) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    for shown in sys.argv[1:] or SHAPES:
        print(report(shown), end="\n\n")
