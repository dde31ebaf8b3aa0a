"""Which models are at hand, how large are they, and does one fit this machine? Asked before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat_mlx import hub
from tinychat_mlx.apps.terminal import size
from tinychat_mlx.errors import BackendError, UsageError, pip_install

if TYPE_CHECKING:
    from tinychat_mlx.apps.models.facts import Facts

SPARE = 1.15  # of the weights' bytes: KV cache, scratch, and the tokenizer
SYSTEM_SHARE = 0.9  # of the memory that is free; the rest keeps the machine usable
BASE = 150 << 20  # bytes of Python, NumPy, the tokenizer and a step's activations, where no file says more
PROCESS = 60 << 20  # bytes of Python, NumPy and the program: what an answer of the bundled demo takes
TOKENIZER = 10  # bytes of memory for one of tokenizer.json: 131 MB for 13 MB, with a vocabulary of 128256
LEAST_CONTEXT = 512  # tokens; less is no conversation


@dataclass(frozen=True)
class Need:
    """Bytes of a model's weights, and how many of them are still to be fetched (0 bytes: unknown)."""

    nbytes: int
    to_fetch: int = 0


def local() -> list[str]:
    """Models at hand: the demo, and those that the hub's cache holds whole or that we hold converted."""
    from tinychat_mlx.apps.models.opening import home

    found = [
        p.parent.name.removesuffix("-int4").replace("--", "/", 1)
        for p in home().glob("*--*-int4/config.json")
    ]
    for folder in sorted(hub.hub_cache().glob("models--*--*")):
        if any(folder.glob("snapshots/*/config.json")) and not any(folder.glob("blobs/*.incomplete")):
            found.append("/".join(folder.name.split("--")[1:]))
    return ["demo", *sorted(set(found))]


def look_up(name: str) -> Need:
    """How large a model at hand is; one that is not, or unknown, is 0. Asks nobody."""
    ref = None if Path(name).expanduser().is_dir() else hub.parse(name)
    folder = Path(name).expanduser() if ref is None else hub.cached(ref)
    return Need(sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder else 0)


def available() -> int:
    """Bytes of memory free for a model."""
    import psutil

    return int(psutil.virtual_memory().available * SYSTEM_SHARE)


def describe(name: str, need: Need, freed: int = 0) -> str:
    """A sentence on size, download and memory."""
    if not need.nbytes:
        return f"{name}: loading"
    fetch = f"{size(need.to_fetch)} to download, " if need.to_fetch else ""
    return (
        f"{name}: {fetch}{size(need.nbytes * SPARE)} of memory needed, {size(available() + freed)} free"
        f"{'' if fits(need, freed) else ' (too little)'}"
    )


def fits(need: Need, freed: int = 0) -> bool:
    return need.nbytes * SPARE <= available() + freed


def check(name: str, need: Need, backend: str = "auto", freed: int = 0) -> None:
    """Raises BackendError if the model does not fit, before anything is fetched or loaded.

    A GPU with memory of its own is not asked: its backend says what does not fit there.
    """
    from tinychat_mlx.loading import choose

    if need.nbytes and not fits(need, freed) and choose(backend)[0] != "cuda":
        raise BackendError(
            f"{name} needs {size(need.nbytes * SPARE)} of memory, {size(available() + freed)} are free: "
            "close other programs, or choose a smaller or more strongly quantised model"
        )


# per backend -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Room:
    """What a model takes on a backend of this machine; trouble: why the backend does not run here, or ""."""

    backend: str
    free: int = 0  # bytes it may take
    weights: int = 0
    kv_per_token: int = 0
    context: int = 0  # tokens that fit, at most the model's own; 0: too large
    trouble: str = ""


def rooms(facts: Facts) -> Iterator[Room]:
    """For each backend of the package: does it run here, and how much of the model's context would fit?"""
    from tinychat_mlx.loading import BACKENDS

    for backend in BACKENDS:
        try:
            yield room(facts, backend, free_on(backend))
        except (BackendError, UsageError) as error:
            yield Room(backend, trouble=str(error))


def room(facts: Facts, backend: str, free: int) -> Room:
    """reference computes in float32; the others keep codes as they are, floats and the KV cache in 16 bits."""
    weights = weight_bytes(facts, backend)
    kv = facts.kv_bytes(4 if backend == "reference" else 2)
    fits = min(facts.context, max(0, free - weights - base(facts)) // kv) if kv else 0
    return Room(backend, free, weights, kv, fits if fits >= min(LEAST_CONTEXT, facts.context) else 0)


def weight_bytes(facts: Facts, backend: str) -> int:
    """Bytes of a model's weights as a backend keeps them."""
    if backend == "reference":
        return 4 * facts.parameters
    return sum(min(p.nbytes, 2 * p.parameters) for p in facts.parts)


def base(facts: Facts) -> int:
    """Bytes of all that is neither weight nor cache: program, tokenizer, activations of the longest step."""
    from tinychat_mlx.generate import PREFILL_ROWS

    c = facts.config
    if facts.folder is None or c is None:
        return BASE
    tokenizer = facts.folder / "tokenizer.json"
    words = TOKENIZER * tokenizer.stat().st_size if tokenizer.exists() else 0
    # x, its norm, q k v, the heads' outputs; the MLP's inner rows: each rounded up to a power of two
    wide = 4 * max(c.hidden_size, c.num_attention_heads * c.head_dim) + c.intermediate_size
    return PROCESS + words + round(1.5 * 4 * PREFILL_ROWS * wide)


def peak(facts: Facts, tokens: int, backend: str = "cpu") -> int:
    """The most bytes a process takes to answer with `tokens` in its cache, known before it is loaded."""
    kv = facts.kv_bytes(4 if backend == "reference" else 2)
    return weight_bytes(facts, backend) + base(facts) + kv * tokens


def free_on(backend: str) -> int:
    """Bytes that a backend may take on this machine. Raises BackendError saying why it does not run here."""
    from tinychat_mlx.loading import create, has_nvidia

    if backend == "mlx" and sys.platform != "darwin":
        raise BackendError("needs a Mac with Apple silicon")
    if backend == "cuda" and not has_nvidia():
        raise BackendError("no NVIDIA GPU found (`tinychat doctor` says more)")
    if backend == "cuda" and find_spec("torch") is None:
        raise BackendError(f"needs torch: {pip_install('cuda')}")
    memory = create(backend, False, None).memory()
    own = memory.limit - memory.used
    if backend == "cuda" and own > 0:  # may be a card's own memory, of which the system knows nothing
        return own
    return min(own, available()) if memory.limit else available()
