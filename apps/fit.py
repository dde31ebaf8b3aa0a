"""Which models are at hand, how large are they, and does one fit this machine? Asked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tinychat_mlx.apps.terminal import size
from tinychat_mlx.errors import BackendError

SPARE = 1.15  # of the weights' bytes: KV cache, scratch, and the tokenizer
SYSTEM_SHARE = 0.9  # of the memory that is free; the rest keeps the machine usable


@dataclass(frozen=True)
class Need:
    """Bytes of a model's weights, and how many of them are still to be fetched (0 bytes: unknown)."""

    nbytes: int
    to_fetch: int = 0


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, found as it finds it, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def local() -> list[str]:
    """Models at hand: the demo, and those of the hub's cache that hold a whole snapshot."""
    found = []
    for folder in sorted(hub_cache().glob("models--*--*")):
        if any(folder.glob("snapshots/*/config.json")) and not any(folder.glob("blobs/*.incomplete")):
            found.append("/".join(folder.name.split("--")[1:]))
    return ["demo", *found]


def look_up(name: str) -> Need:
    """How large a model is; asks the hub only for one that is not at hand. Unknown is 0, never an error."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        snapshots = (hub_cache() / f"models--{name.replace('/', '--')}").glob("snapshots/*")
        folder = max(snapshots, key=lambda p: p.stat().st_mtime, default=folder)
    if folder.is_dir():
        return Need(sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    if name == "demo" or "/" not in name or os.environ.get("HF_HUB_OFFLINE"):
        return Need(0)
    return _ask_hub(name)


def _ask_hub(repo: str) -> Need:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = HfApi().model_info(repo, files_metadata=True, timeout=10).siblings or []
    except (HfHubHTTPError, HFValidationError, OSError):
        return Need(0)  # loading will say what is wrong
    total = sum(f.size or 0 for f in files if f.rfilename.endswith(".safetensors"))
    return Need(total, total)


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
