"""The settings that several commands share: names, types, help texts, defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from tinychat_mlx.base import backend_names

BACKENDS = ("auto", *backend_names.BACKENDS)

LOADING: dict[str, tuple[Any, str]] = {
    "model": (str, 'A folder, a Hugging Face id, or "demo".'),
    "backend": (click.Choice(BACKENDS), "Device backend. A named backend never falls back to another."),
    "engine": (
        click.Choice(["tinychat", "mlx-lm"]),
        "Engine: tinychat, or mlx-lm for architectures that tinychat does not support (macOS).",
    ),
    "exact": (bool, "Activations in full precision, not int8 (slower, reproduces the reference)."),
    "threads": (click.IntRange(1), "CPU threads [OMP_NUM_THREADS, or one per fast core]."),
    "context": (
        click.IntRange(16),
        "Context length in tokens [the model's maximum, at most 8192, limited by memory].",
    ),
    "convert": (
        click.Choice(["ask", "always", "never"]),
        "Convert a 16-bit hub model to int4, once. Without a terminal, ask means never.",
    ),
}
SAMPLING: dict[str, tuple[Any, str]] = {
    "max_tokens": (click.IntRange(1), "Maximum length of the answer in tokens [the rest of the context]."),
    "temperature": (click.FloatRange(0), "0 is greedy; higher values are more random."),
    "top_k": (click.IntRange(0), "Sample from the K most likely tokens (0: all)."),
    "top_p": (
        click.FloatRange(0, 1, min_open=True),
        "Sample from the most likely tokens with this total probability.",
    ),
    "min_p": (click.FloatRange(0, 1), "Minimum probability, relative to the most likely token."),
    "repetition_penalty": (
        click.FloatRange(0, min_open=True),
        "Above 1, makes tokens that were used less likely.",
    ),
    "seed": (click.IntRange(0), "Random seed; the same seed gives the same answer [random]."),
}
CHATTING: dict[str, tuple[Any, str]] = {
    "system": (str, "System prompt, or @FILE."),
    "on_full": (
        click.Choice(["stop", "slide", "compact"]),
        "When the context is full: stop, drop the oldest messages, or summarise. A note is always printed.",
    ),
    "think": (bool, "Enable or disable the thinking of a model that supports it [the template's default]."),
    "plain": (bool, "No colour, no Markdown, no redraws."),
    "no_save": (bool, "Do not save this chat."),
}
DEFAULTS = {
    "model": "demo",
    "backend": "auto",
    "engine": "tinychat",
    "exact": False,
    "convert": "ask",
    "on_full": "stop",
    "plain": False,
    "no_save": False,
}


def known() -> dict[str, Callable[[Any], Any]]:
    """Return setting -> the function that checks its value, for the config file."""

    def check(kind: Any) -> Callable[[Any], Any]:
        if kind in (bool, str):
            return lambda value: value if isinstance(value, kind) else _refuse(value, kind)
        return lambda value: kind.convert(value, None, None)

    rows = {**LOADING, **CHATTING, **SAMPLING}
    checks = {name: check(kind) for name, (kind, _) in rows.items()}
    texts = check(str)
    return checks | {
        "stop": lambda value: [texts(v) for v in value] if isinstance(value, list) else _refuse(value, list)
    }


def _refuse(value: object, kind: type) -> None:
    raise TypeError(
        f"{value!r} is not {({bool: 'true or false', str: 'text', list: 'a list of texts'})[kind]}"
    )
