"""Reference writers for every 4-bit layout, element by element. Oracle of test_formats.py.

q (N, K) codes 0..15, z (N, K/G) zeros 0..15, s (N, K/G) scales; w = (q - z) * s. "Nibble i" of a word is its
bits 4i..4i+3.
"""

from __future__ import annotations

import numpy as np

Tensors = dict[str, np.ndarray]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a GEMM word contains output 8c + AWQ_ORDER[i]


def nibbles_along_last(codes: np.ndarray, order: list[int] | range = range(8)) -> np.ndarray:
    """(..., 8 m) -> (..., m) uint32; nibble i of word c is element 8c + order[i]."""
    groups = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8)
    return sum(groups[..., e] << np.uint32(4 * i) for i, e in enumerate(order))


def autoawq_gemm(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    return {
        "qweight": nibbles_along_last(q.T, AWQ_ORDER).view(np.int32),  # (K, N/8)
        "qzeros": nibbles_along_last(z.T, AWQ_ORDER).view(np.int32),  # (K/G, N/8)
        "scales": np.ascontiguousarray(s.T),  # (K/G, N)
    }


def padded(a: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(N, K/G) -> (N, 8 Z), padded with zeros."""
    k, groups = q.shape[1], a.shape[1]
    multiple = {32: 4, 64: 2}.get(k // groups, 1)
    words = -(-groups // 8)
    width = 8 * (-(-words // multiple) * multiple)
    return np.pad(a, ((0, 0), (0, width - groups)))


def autoawq_gemv(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    return {
        "qweight": nibbles_along_last(q).view(np.int32),  # (N, K/8)
        "qzeros": nibbles_along_last(padded(z, q)).view(np.int32),  # (N, Z)
        "scales": padded(s, q),  # (N, 8 Z)
    }


def llm_awq_v2(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    """llm-awq's layout. AutoAWQ calls it GEMV_FAST; scaled_zeros is `qzeros` there."""
    n, k = (axis.ravel() for axis in np.indices(q.shape))
    packed = np.zeros((q.shape[0] // 4, q.shape[1]), np.uint16)
    column = 64 * (k // 64) + 16 * (n % 4) + 8 * (k % 64 // 32) + 2 * (k % 8 // 2) + k % 2
    nibble = k % 32 // 8
    np.bitwise_or.at(
        packed, (n // 4, column), (q.ravel().astype(np.uint16) << (4 * nibble)).astype(np.uint16)
    )
    return {
        "qweight": packed.view(np.int16),  # (N/4, K)
        "scales": np.ascontiguousarray(padded(s, q).T),  # (8 Z, N)
        "scaled_zeros": np.ascontiguousarray(padded(-(s * z.astype(s.dtype)), q).T),
    }


def gemv_fast(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    tensors = llm_awq_v2(q, z, s)
    tensors["qzeros"] = tensors.pop("scaled_zeros")
    return tensors


def compressed_tensors(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    """pack-quantized. q and z here are the format's signed values plus 8."""
    return {
        "weight_packed": nibbles_along_last(q).view(np.int32),  # (N, K/8)
        "weight_scale": s,  # (N, K/G)
        "weight_zero_point": nibbles_along_last(z.T).T.copy().view(np.int32),  # (N/8, K/G)
        "weight_shape": np.array(q.shape, np.int64),
    }


def mlx_affine(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> Tensors:
    return {"weight": nibbles_along_last(q), "scales": s, "biases": -(s * z.astype(s.dtype))}


WRITERS = {
    "awq-gemm": autoawq_gemm,
    "awq-gemv": autoawq_gemv,
    "llm-awq": llm_awq_v2,
    "awq-gemv-fast": gemv_fast,
    "compressed-tensors": compressed_tensors,
    "mlx": mlx_affine,
}


def config(layout: str, group_size: int) -> dict[str, object]:
    """Return the quantisation block of config.json for a layout."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
    }
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    if layout == "mlx":
        return {"quantization": {"group_size": group_size, "bits": 4}}
    return {
        "quantization_config": {
            "awq-gemm": awq | {"version": "gemm"},
            "awq-gemv": awq | {"version": "gemv"},
            "llm-awq": awq | {"backend": "llm-awq"},
            "awq-gemv-fast": awq | {"version": "gemv_fast"},
            "compressed-tensors": packed | {"config_groups": {"group_0": scheme}},
        }[layout]
    }


def golden() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return q, z, s with N 64, K 128, G 64. s and s * z are exact in float16."""
    n, k, g = np.arange(64)[:, None], np.arange(128)[None], np.arange(2)[None]
    q = (7 * n + 3 * k + n * k // 5) % 16
    z = (3 * n + 5 * g + 1) % 16
    s = ((1 + (n + 2 * g) % 4 / 4) / 64).astype(np.float16)
    return q, z, s


def sample(n: int, k: int, group_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random q, z, s in the range of a quantiser: scales are any float16 near 0.01."""
    rng = np.random.default_rng(seed)
    groups = (n, k // group_size)
    s = np.exp(rng.normal(-4.6, 0.5, groups)).astype(np.float16)
    return rng.integers(0, 16, (n, k)), rng.integers(0, 16, groups), s
