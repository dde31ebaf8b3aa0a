"""The environment variables that tinychat reads, and their descriptions.

`tinychat config --help` prints these tables. `tinychat doctor` uses them to print variables that are set. Values of
the OPEN ones are numbers and keywords, safe for a bug report. Of the CLOSED ones it prints only that they are set.
"""

from __future__ import annotations

from typing import Any

import click

from tinychat_mlx.apps.setting_table import CHATTING, DEFAULTS, LOADING, SAMPLING

OPEN = {
    "TINYCHAT_WEIGHT_CACHE": "cpu: disk limit of the packed-weight cache in bytes; 0 disables it [a fifth of the disk].",
    "TINYCHAT_PREFIX_MB": "Disk limit of the cache of computed chats in MB; 0 disables it [1024].",
    "TINYCHAT_CPU_ISA": "cpu: an instruction set below the best one, such as avx2, neon or scalar.",
    "TINYCHAT_KV": "cpu: type of the KV cache: fp16, int8 (half the memory) or fp32 [fp16].",
    "TINYCHAT_MLX_DTYPE": "mlx: float16, bfloat16 (from M3 on) or float32 [float16 on a GPU].",
    "TINYCHAT_MLX_KV_BITS": "mlx: bits of the KV cache: 4 or 8 [16].",
    "TINYCHAT_MLX_KERNELS": "mlx: tinychat's kernels: off, all, measured, or a comma-separated list [measured].",
    "TINYCHAT_MLX_CAPTURE": "mlx: 1 or 0: compile a step with mx.compile [as measured].",
    "TINYCHAT_CUDA_DEVICE": "cuda: number of the GPU, or cpu for torch on the CPU, for tests [0].",
    "TINYCHAT_CUDA_KV": "cuda: type of the KV cache: fp16 or int8 (half the memory) [fp16].",
    "TINYCHAT_CUDA_KERNELS": "cuda: 0: torch without tinychat's kernels.",
}
CLOSED = {
    "TINYCHAT_STOP": "End the answer before this text; several with spaces between.",
    "TINYCHAT_PRESET": "As --preset: a set of settings from the config file.",
    "TINYCHAT_CONFIG": "The config file.",
    "TINYCHAT_DATA": "Where chats and what was typed are saved [tinychat-mlx in your folder for data].",
    "TINYCHAT_CACHE": "The folder of all caches [tinychat-mlx in your cache folder].",
}
HUB = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DOWNLOAD_TIMEOUT"}
ELSEWHERE = {  # of other programs, closed
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY",
    "CUDA_VISIBLE_DEVICES",
}  # fmt: skip


def options() -> dict[str, str]:
    """Return the variable of each chat option -> its description, values and default."""
    rows = {**LOADING, **CHATTING, **SAMPLING}
    return {f"TINYCHAT_{name.upper()}": _meaning(name, *row) for name, row in rows.items()}


def _meaning(name: str, kind: Any, text: str) -> str:
    if kind is bool:
        return f"1 or 0. {text}"
    values = f"{' | '.join(kind.choices)}. " if isinstance(kind, click.Choice) else ""
    return values + text + (f" [{DEFAULTS[name]}]" if name in DEFAULTS else "")


def ours() -> dict[str, str]:
    """Return every variable that tinychat reads -> its description."""
    return options() | OPEN | CLOSED


def shown() -> set[str]:
    """Return the variables whose values may be printed: options that are not free text, and the open ones."""
    rows = {**LOADING, **CHATTING, **SAMPLING}
    return {f"TINYCHAT_{name.upper()}" for name, (kind, _) in rows.items() if kind is not str} | {*OPEN, *HUB}
