"""Memory plan: the memory that a model needs on a backend, computed before it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from tinychat_mlx.base import limits
from tinychat_mlx.base.errors import BackendError, UsageError, pip_install
from tinychat_mlx.base.wording import size

if TYPE_CHECKING:
    from tinychat_mlx.contract import Backend
    from tinychat_mlx.inspect import ModelInfo
    from tinychat_mlx.parts import Part

BASE = 150 << 20  # bytes of Python, NumPy, the tokenizer and a step's activations, where no file says more
PROCESS = 60 << 20  # bytes of Python, NumPy and the program: what an answer of the bundled demo takes
TOKENIZER = 10  # bytes of memory for one of tokenizer.json: 131 MB for 13 MB, with a vocabulary of 128256
LEAST_CONTEXT = 512  # tokens; less is no conversation


class MemoryCost(NamedTuple):
    """Bytes of memory that a model needs on a backend."""

    weights: int
    program: int  # includes the tokenizer
    loading: int  # in addition to the weights, while they are loaded
    running: int  # activations of the longest step
    per_token: int  # of context
    files: int = 0  # mapped while they are read

    def peak(self, tokens: int) -> int:
        """Return the peak memory of a process that answers with `tokens` in its cache."""
        return self.weights + self.program + max(self.loading, self.running + self.per_token * tokens)

    def context(self, free: int, most: int) -> int:
        """Return the number of tokens that fit, at most `most`; 0: too few for a conversation."""
        left = free - self.weights - self.program
        fits = min(most, (left - self.running) // self.per_token) if self.per_token else most
        return fits if left >= self.loading and fits >= min(LEAST_CONTEXT, most) else 0


def cost(facts: ModelInfo, backend: Backend) -> MemoryCost:
    """Compute a model's memory from its headers and the backend's costs. All estimates use this function."""
    from tinychat_mlx.contract import CacheShape
    from tinychat_mlx.engine.engine import PREFILL_ROWS

    c = facts.config
    program = 0 if backend.own_memory() else BASE
    weights = sum(_held(part, backend) for part in facts.parts) or facts.nbytes
    if c is None:
        return MemoryCost(weights, program, 0, 0, 0, facts.nbytes)
    if program and facts.folder is not None:
        tokenizer = facts.folder / "tokenizer.json"
        program = PROCESS + (TOKENIZER * tokenizer.stat().st_size if tokenizer.exists() else 0)
    # x, its norm, q k v, the attention output, and the MLP's inner rows, each rounded up to a power of two
    wide = 4 * max(c.hidden_size, c.num_attention_heads * c.head_dim) + c.intermediate_size
    running = round(1.5 * 4 * PREFILL_ROWS * wide)
    token = backend.kv_bytes(CacheShape(c.num_hidden_layers, c.num_key_value_heads, c.head_dim))
    token += backend.score_bytes(c.num_attention_heads, PREFILL_ROWS)
    loading = backend.loading_bytes(max((p.parameters // p.tensors for p in facts.parts), default=0))
    return MemoryCost(weights, program, loading, running, token, facts.nbytes)


def _held(part: Part, backend: Backend) -> int:
    """Return the bytes of a part's weights on a backend. Norms and biases are float32 on all of them."""
    if part.sample is None:
        return 4 * part.parameters
    n, k = part.sample.shape
    return round(part.parameters * backend.weight_bytes(part.sample) / (n * k))


# the machine -------------------------------------------------------------------------------------------
def chosen(options: dict[str, Any]) -> Backend:
    """Return the backend for a command's options. Raises BackendError, UsageError."""
    from tinychat_mlx.open import choose, create

    name = "mlx" if options.get("engine") == "mlx-lm" else choose(options["backend"])[0]
    return create(name, bool(options.get("exact")), options.get("threads"))


def look_for(name: str) -> None:
    """Raise BackendError if a backend cannot run on this machine, without importing its library."""
    from tinychat_mlx.open import has_nvidia

    if name == "mlx" and sys.platform != "darwin":
        raise BackendError("this computer is not a Mac with Apple silicon", remedy="use --backend cpu")
    if name == "cuda" and not has_nvidia():
        raise BackendError("no NVIDIA GPU was found")
    if name == "cuda" and find_spec("torch") is None:
        raise BackendError("torch is not installed", remedy=pip_install("cuda"))


def free_on(backend: Backend, files: int = 0) -> int:
    """Return the bytes that a backend can allocate on this machine. files: bytes that it will map."""
    memory = backend.memory()
    own = memory.limit - memory.used
    if backend.own_memory() and own > 0:
        return own
    return min(own, limits.available(files)) if memory.limit else limits.available(files)


# does it fit -------------------------------------------------------------------------------------------
def usual(facts: ModelInfo, asked: int | None = None) -> int:
    """Return the default context of a model in tokens, without regard to memory."""
    from tinychat_mlx.open import DEFAULT_CONTEXT

    return min(asked or DEFAULT_CONTEXT, facts.context)


def context_for(
    facts: ModelInfo, backend: Backend, asked: int | None, say: Callable[[str], None], freed: int = 0
) -> int | None:
    """Return the context for loading: as given, else the default or, with a note, the largest that fits.

    freed: bytes of a model that will be unloaded. Raises BackendError before loading if the model does not fit.
    """
    takes, tokens = cost(facts, backend), usual(facts, asked)
    free = free_on(backend, takes.files) + freed
    if takes.peak(tokens) <= free:
        return asked
    fits = takes.context(free, tokens)
    if asked is not None or not fits:
        refuse(facts.name, takes, tokens, free, backend.name, fits)
    say(
        f"note: using a context of {fits:,} tokens: {tokens:,} needs {size(takes.peak(tokens))} of memory, "
        f"{size(free)} is free"
    )
    return fits


def _with(tokens: int) -> str:
    return f" with a context of {tokens:,} tokens" if tokens else ""


def fits(facts: ModelInfo, backend: Backend, asked: int | None, freed: int = 0) -> bool:
    """Whether `context_for` would succeed."""
    takes, tokens = cost(facts, backend), usual(facts, asked)
    free = free_on(backend, takes.files) + freed
    return takes.peak(tokens) <= free or (asked is None and takes.context(free, tokens) > 0)


def refuse(name: str, takes: MemoryCost, tokens: int, free: int, backend: str, fits: int = 0) -> None:
    """Raise BackendError if a model with a context of this many tokens does not fit into `free` bytes."""
    if takes.peak(tokens) > free:
        # Free memory at the next start differs by a little.
        way = f"use --context {fits - fits // 64}, " if fits else ""
        raise BackendError(
            f"needs {size(takes.peak(tokens))} of memory on the {backend} backend{_with(tokens)}, {size(free)} is free",
            where=name,
            remedy=f"{way}close other programs, or choose a smaller or more strongly quantised model",
        )


def describe(facts: ModelInfo, backend: Backend, asked: int | None, freed: int = 0, to_fetch: int = 0) -> str:
    """Return a sentence on download size and memory."""
    takes, tokens = cost(facts, backend), usual(facts, asked)
    free = free_on(backend, takes.files) + freed
    fetch = f"{size(to_fetch)} to download, " if to_fetch else ""
    little = ""
    if takes.peak(tokens) > free:
        fits = takes.context(free, tokens)
        little = f" (enough for {fits:,} tokens)" if fits else " (too little)"
    return (
        f"{facts.name}: {fetch}{size(takes.peak(tokens))} of memory needed{_with(tokens)}, "
        f"{size(free)} free{little}"
    )


# per backend -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Room:
    """Memory of a model on a backend of this machine. trouble: the reason why the backend does not run, or ""."""

    backend: str
    free: int = 0  # bytes that it can allocate
    weights: int = 0
    kv_per_token: int = 0
    context: int = 0  # tokens that fit, at most the model's own maximum; 0: too large
    trouble: str = ""


def rooms(*kinds: ModelInfo) -> Iterator[tuple[Room, ...]]:
    """Yield the room of each model on every backend, or the reason why the backend does not run here."""
    from tinychat_mlx.base.backend_names import BACKENDS
    from tinychat_mlx.open import create

    for name in BACKENDS:
        try:
            look_for(name)
            backend = create(name, False, None)
            yield tuple(room(facts, backend) for facts in kinds)
        except (BackendError, UsageError) as error:
            yield (Room(name, trouble=str(error)),)


def room(facts: ModelInfo, backend: Backend) -> Room:
    """Return the Room of a model on a backend."""
    takes = cost(facts, backend)
    free = free_on(backend, takes.files)
    fits = takes.context(free, facts.context)
    return Room(backend.name, free, takes.weights, takes.per_token, fits)
