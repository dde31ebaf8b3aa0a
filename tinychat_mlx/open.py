"""Load a model by name onto a device. The only module that selects a backend."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from tinychat_mlx import hub
from tinychat_mlx.base import paths
from tinychat_mlx.base.backend_names import BACKENDS
from tinychat_mlx.base.errors import BackendError, ModelNotFoundError, UsageError, pip_install
from tinychat_mlx.contract import Backend
from tinychat_mlx.loaded_model import Model
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint

DEFAULT_CONTEXT = 8192  # tokens, where the model allows more: KV memory grows with it
DEMO = Path(__file__).resolve().parent / "models" / "demo"


def load(
    model: str | Path = "demo",
    backend: str = "auto",
    exact: bool = False,
    threads: int | None = None,
    context: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    engine: str = "tinychat",
) -> Model:
    """Load a folder, a Hugging Face id or "demo" onto a device.

    backend: auto | mlx | cuda | cpu | reference. exact: no int8 activations. context: capacity of the KV cache in
    tokens (default: the model's own maximum, at most 8192). progress(done, total) is called as layers load.
    engine: tinychat, or mlx-lm for architectures that tinychat does not support (macOS).
    Raises ModelNotFoundError, ConfigError, FormatError, BackendError, UsageError.
    """
    if engine == "mlx-lm":
        return load_mlx_lm(find_folder(model), exact, threads, context)
    if engine != "tinychat":
        raise UsageError(f"unknown engine {engine!r}", remedy="use tinychat or mlx-lm")
    checkpoint = Checkpoint.open(find_folder(model))
    config = parse_config(checkpoint.config)
    capacity = capacity_of(context, config.max_position_embeddings)
    config = parse_config(checkpoint.config, capacity)  # again with the capacity, for longrope
    name, why = choose(backend)
    device_backend = create(name, exact, threads)
    device = replace(device_backend.describe(), why=why)
    is_folder = str(model) != "demo" and Path(model).expanduser().is_dir()
    shown = checkpoint.folder.resolve().name if is_folder else str(model)
    return Model(shown, checkpoint, config, device_backend, device, capacity, progress)


def load_mlx_lm(folder: Path, exact: bool, threads: int | None, context: int | None) -> Model:
    """Load a model that mlx-lm computes on the mlx backend's device. Raises BackendError, FormatError."""
    from importlib import import_module

    from tinychat_mlx.mlx_lm_engine import MlxLmModel, read_config

    config, backend = read_config(folder), create("mlx", exact, threads)
    decoder = import_module("tinychat_mlx.backends.mlx.mlx_lm_decoder").MlxLmDecoder(folder, config, backend)
    return MlxLmModel(folder, decoder, capacity_of(context, decoder.config.max_position_embeddings))


def capacity_of(context: int | None, limit: int) -> int:
    """Return the capacity of the cache in tokens, at most limit. Raises UsageError."""
    if context is not None and not 1 < context <= limit:
        raise UsageError(
            f"a context of {context} tokens is outside this model's range",
            remedy=f"use --context 2 to {limit}",
        )
    return context or min(limit, DEFAULT_CONTEXT)


def at_hand(name: str) -> Path | None:
    """Return the folder of a local model by the name in `tinychat models list`, else None. Never uses the network."""
    if name == "demo":
        return DEMO
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    ref = hub.parse(name)
    return hub.cached(ref) if ref else paths.find_conversion(name)


def find_folder(
    model: str | Path, watch: hub.Watch = lambda done, total: None, say: hub.Say = lambda text: None
) -> Path:
    """Return the model's folder: a path, "demo", a conversion, or a hub id (ORG/NAME[@REVISION]), downloaded if needed.

    A model in the cache is used without network access. watch(bytes done, total) and say(note) report the progress
    of a download. Raises ModelNotFoundError, DownloadError, FormatError.
    """
    text = str(model)
    if (here := at_hand(text)) is not None:
        return here
    if Path(model).expanduser().exists():
        raise ModelNotFoundError(
            "this is a file", where=text, remedy="give the folder that contains config.json"
        )
    looks_local = text.startswith((".", "/", "~")) or os.sep != "/" and os.sep in text
    if looks_local or hub.parse(text) is None:
        raise ModelNotFoundError(
            "no such folder, and not a Hugging Face id (ORG/NAME)",
            where=text,
            remedy="check the path or the name",
        )
    return hub.find(text, watch, say)


def choose(backend: str) -> tuple[str, str]:
    """Return (backend name, reason). Inspects the machine without importing torch or mlx."""
    if backend != "auto":
        if backend not in BACKENDS or find_spec(BACKENDS[backend][0]) is None:
            known = ", ".join(n for n, (module, _) in BACKENDS.items() if find_spec(module) is not None)
            raise UsageError(f"unknown backend {backend!r}", remedy=f"use one of auto, {known}")
        return backend, "requested"
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple and find_spec("mlx") is not None and find_spec(BACKENDS["mlx"][0]) is not None:
        return "mlx", "Apple silicon"
    nvidia = has_nvidia()
    if nvidia and find_spec("torch") is not None and find_spec(BACKENDS["cuda"][0]) is not None:
        return "cuda", "NVIDIA GPU"
    if nvidia:
        return "cpu", f"there is an NVIDIA GPU, but torch is not installed: {pip_install('cuda')}"
    return "cpu", "Apple silicon without mlx" if apple else "no Apple or NVIDIA GPU found"


def has_nvidia() -> bool:
    """Whether an NVIDIA driver is installed. Does not import torch, which takes a second."""
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32" / "nvcuda.dll").exists()
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvhost-ctrl-gpu"))


def create(name: str, exact: bool, threads: int | None) -> Backend:
    """Create a backend. Raises BackendError if its library or device is missing; never falls back to another."""
    from importlib import import_module

    module, cls = BACKENDS[name]
    try:
        made: Backend = getattr(import_module(module), cls)(exact=exact, threads=threads)
    except ImportError as e:
        raise BackendError(f"its library does not load ({e})", where=f"{name} backend") from None
    return made
