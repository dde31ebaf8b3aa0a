"""Facts about a model (parts, sizes, defaults) from file headers only, of a local model or one on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinychat_mlx import hub
from tinychat_mlx.base.errors import FormatError, TinychatError
from tinychat_mlx.base.json_file import read_json, read_optional
from tinychat_mlx.contract import CacheShape
from tinychat_mlx.engine.sampler import from_generation_config
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.parts import FLOATS, Listing, Module, Part, modules_of, parts_of
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE, Checkpoint
from tinychat_mlx.weights.formats import detect
from tinychat_mlx.weights.formats.stored import Shape
from tinychat_mlx.weights.safetensors import TensorFile

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model that need no computation. trouble: the reason why it does not run here."""

    name: str
    folder: Path | None
    architecture: str
    parts: tuple[Part, ...]
    modules: tuple[Module, ...]
    nbytes: int  # of the tensors in the weight files
    config: ModelConfig | None
    generation: Mapping[str, Any]
    template: bool
    licence: str
    trouble: TinychatError | None = None

    @property
    def parameters(self) -> int:
        return sum(p.parameters for p in self.parts)

    @property
    def dense(self) -> bool:
        return all(p.form in FLOATS.values() for p in self.parts)

    @property
    def quantization(self) -> str:
        """The form of most weights."""
        return max(self.parts, key=lambda p: p.parameters).form if self.parts else "unknown"

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings if self.config else 0

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Bytes of keys and values per token."""
        c = self.config
        if c is None:
            return 0
        return CacheShape(c.num_hidden_layers, c.num_key_value_heads, c.head_dim).bytes_per_token(itemsize)

    def sampling(self) -> dict[str, tuple[Any, str]]:
        """Return the sampling defaults, each with its origin. Raises ConfigError for invalid values."""
        found = from_generation_config(self.generation)
        return {
            name: (getattr(found, name), "generation_config.json" if name in self.generation else "built in")
            for name in SAMPLING
        }


def local(name: str, folder: Path) -> ModelInfo:
    """Return the facts of a folder. Raises a TinychatError if its files are damaged or inconsistent."""
    checkpoint = Checkpoint.open(folder)
    files = sorted(hub.shards_of(read_json(folder / INDEX))) if (folder / INDEX).exists() else [SINGLE]
    opened = [TensorFile(folder / file) for file in files]
    listing = Listing({n: f.info(n) for f in opened for n in f.names})
    template = (folder / "chat_template.jinja").exists() or "chat_template" in read_optional(
        folder / "tokenizer_config.json"
    )
    about = checkpoint.config, checkpoint.generation_config, listing, template, _licence(folder)
    return _facts(name, folder, *about, checkpoint)


def remote(found: hub.Remote, say: hub.Say = lambda text: None) -> ModelInfo:
    """Return the facts of a model on the hub. Reads its small files and headers, and stores nothing.

    Raises FormatError for damaged files, and DownloadError.
    """
    files = {f.path: f for f in found.files}

    def table(path: str) -> dict[str, Any]:
        return hub.read_json(found, files[path], say) if path in files else {}

    config = table("config.json")
    tensors: dict[str, tuple[str, Shape]] = {}
    try:
        for file in found.files:
            if file.path.endswith(".safetensors"):
                tensors |= hub.read_header(found, file, say)
    except FormatError:
        if not _refused(config):
            raise
        tensors = {}  # a format named in config.json that is not supported
    template = "chat_template.jinja" in files or "chat_template" in table("tokenizer_config.json")
    generation = table("generation_config.json")
    about = _facts(str(found.ref), None, config, generation, Listing(tensors), template, found.licence)
    return about if tensors else replace(about, nbytes=found.weight_bytes)


def _refused(config: dict[str, Any]) -> bool:
    """Whether config.json shows that a model does not run here."""
    try:
        parse_config(config)
        detect.declared(config)
    except TinychatError:
        return True
    return False


def _facts(
    name: str,
    folder: Path | None,
    config: dict[str, Any],
    generation: Mapping[str, Any],
    listing: Listing,
    template: bool,
    licence: str,
    checkpoint: Checkpoint | None = None,
) -> ModelInfo:
    trouble: TinychatError | None = None
    parsed, layout = None, None
    try:
        parsed = parse_config(config)
        layout = detect.choose(detect.declared(config), listing, listing.tensors)
    except TinychatError as error:
        trouble = error
    modules = tuple(modules_of(listing, layout)) if not trouble or parsed else ()
    parts = parts_of(modules, listing, layout, parsed, checkpoint)
    nbytes = sum(listing.size(n)[1] for n in listing.tensors)
    architecture = str(config.get("model_type", "unknown"))
    about = nbytes, parsed, generation, template, licence, trouble
    return ModelInfo(name, folder, architecture, parts, modules, *about)


def _licence(folder: Path) -> str:
    """Return the licence in the model card's metadata."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:4000]
    except OSError:
        return ""
    found = re.search(r"^license:\s*[\"']?([\w.-]+)", head, re.MULTILINE) if head.startswith("---") else None
    return found[1] if found else ""
