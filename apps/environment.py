"""Which environment variables count, and what does each do?

`tinychat config --help` prints these tables, `tinychat doctor` looks by them at what is set. Values of the open ones are
numbers and words of ours, which a bug report may hold; of the closed ones it says no more than that they are set.
"""

from __future__ import annotations

from typing import Any

import click

from tinychat_mlx.apps.options import CHATTING, DEFAULTS, LOADING, SAMPLING

OPEN = {
    "TINYCHAT_WEIGHT_CACHE": "cpu: bytes that packed weights may take on disk; 0: none are kept [a fifth of the disk].",
    "TINYCHAT_PREFIX_MB": "MB that what was computed of long chats may take on disk; 0: nothing is kept [1024].",
    "TINYCHAT_CPU_ISA": "cpu: a lower instruction set than the best here, such as avx2, neon or scalar.",
    "TINYCHAT_KV": "cpu: the conversation's cache in fp16, int8 (half the memory) or fp32 [fp16].",
    "TINYCHAT_MLX_DTYPE": "mlx: float16, bfloat16 (from M3 on) or float32 [float16 on a GPU].",
    "TINYCHAT_MLX_KV_BITS": "mlx: 4 or 8: the conversation's cache in so many bits [16].",
    "TINYCHAT_MLX_KERNELS": "mlx: our kernels: off, all, measured, or kinds with commas [measured].",
    "TINYCHAT_MLX_CAPTURE": "mlx: 1 or 0: whether a step goes through mx.compile [as measured].",
    "TINYCHAT_CUDA_DEVICE": "cuda: the number of the GPU, or cpu: torch on the CPU, for tests [0].",
    "TINYCHAT_CUDA_KV": "cuda: the conversation's cache in fp16 or int8 (half the memory) [fp16].",
    "TINYCHAT_CUDA_KERNELS": "cuda: 0: plain torch without our kernels.",
}
CLOSED = {
    "TINYCHAT_STOP": "End the answer before this text; several with spaces between.",
    "TINYCHAT_PRESET": "As --preset: a set of settings from the config file.",
    "TINYCHAT_CONFIG": "The config file.",
    "TINYCHAT_DATA": "Where chats and what was typed are saved [tinychat-mlx in your folder for data].",
    "TINYCHAT_CACHE": "The folder of all caches [tinychat-mlx in your cache folder].",
}
HUB = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DOWNLOAD_TIMEOUT"}
ELSEWHERE = {  # not ours, closed
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY",
    "CUDA_VISIBLE_DEVICES",
}  # fmt: skip


def options() -> dict[str, str]:
    """One variable for each option of the chat -> what it does, its values and what counts without it."""
    rows = {**LOADING, **CHATTING, **SAMPLING}
    return {f"TINYCHAT_{name.upper()}": _meaning(name, *row) for name, row in rows.items()}


def _meaning(name: str, kind: Any, text: str) -> str:
    if kind is bool:
        return f"1 or 0. {text}"
    values = f"{' | '.join(kind.choices)}. " if isinstance(kind, click.Choice) else ""
    return values + text + (f" [{DEFAULTS[name]}]" if name in DEFAULTS else "")


def ours() -> dict[str, str]:
    """Every variable that this program reads -> what it does."""
    return options() | OPEN | CLOSED


def shown() -> set[str]:
    """Those whose values may be told to others: options that are no text, and the open ones."""
    rows = {**LOADING, **CHATTING, **SAMPLING}
    return {f"TINYCHAT_{name.upper()}" for name, (kind, _) in rows.items() if kind is not str} | {*OPEN, *HUB}
