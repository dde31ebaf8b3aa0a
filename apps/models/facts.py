"""What is a model: its weights part by part, its sizes, its defaults? From the headers alone, here or on the hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_mlx import hub
from tinychat_mlx.backend import CacheShape
from tinychat_mlx.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from tinychat_mlx.config import ModelConfig, parse_config
from tinychat_mlx.errors import FormatError, TinychatError
from tinychat_mlx.formats import detect
from tinychat_mlx.formats.detect import Layout
from tinychat_mlx.formats.mlx import Mlx
from tinychat_mlx.formats.stored import Shape, Stored
from tinychat_mlx.sampler import from_generation_config
from tinychat_mlx.tensorfile import MAX_HEADER, TensorFile
from tinychat_mlx.weight import Array

ITEM = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
FLOATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
HEAD_BYTES = 1 << 17  # of a remote file: holds the header of most
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Part:
    """Weights of one kind stored in one form: the layers' matrices in int4 g128, the head in int8 g64 …"""

    name: str
    form: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Facts:
    """What can be said of a model without computing; trouble: why it does not run here, or ""."""

    name: str
    folder: Path | None
    architecture: str
    parts: tuple[Part, ...]
    nbytes: int  # of the weight files' tensors
    config: ModelConfig | None
    generation: Mapping[str, Any]
    template: bool
    licence: str
    trouble: str = ""

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
        """Bytes of keys and values a token."""
        c = self.config
        if c is None:
            return 0
        return CacheShape(c.num_hidden_layers, c.num_key_value_heads, c.head_dim).bytes_per_token(itemsize)

    def sampling(self) -> dict[str, tuple[Any, str]]:
        """Sampling defaults, each with its origin. Raises ConfigError for nonsense in generation_config.json."""
        found = from_generation_config(self.generation)
        return {
            name: (getattr(found, name), "generation_config.json" if name in self.generation else "built in")
            for name in SAMPLING
        }


class Listing:
    """The tensors of a model by name, as their headers list them: enough to tell how they are stored."""

    def __init__(self, tensors: Mapping[str, tuple[str, Shape]]) -> None:
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> tuple[str, Shape]:
        return self.tensors[name]

    def read(self, name: str) -> Array:
        raise NotImplementedError

    def where(self, name: str) -> str:
        return "the model"

    def size(self, name: str) -> tuple[int, int]:
        """-> numbers in a tensor, bytes of it."""
        dtype, shape = self.tensors[name]
        return math.prod(shape), math.prod(shape) * ITEM.get(dtype, 1)


def local(name: str, folder: Path) -> Facts:
    """Of a folder. Raises a TinychatError if its files are damaged or do not belong together."""
    Checkpoint.open(folder)
    files = sorted(hub.shards_of(read_json(folder / INDEX))) if (folder / INDEX).exists() else [SINGLE]
    opened = [TensorFile(folder / file) for file in files]
    listing = Listing({n: f.info(n) for f in opened for n in f.names})
    config = read_json(folder / "config.json")
    generation = _optional(folder / "generation_config.json")
    template = (folder / "chat_template.jinja").exists() or "chat_template" in _optional(
        folder / "tokenizer_config.json"
    )
    return _facts(name, folder, config, generation, listing, template, _licence(folder))


def remote(found: hub.Remote, say: hub.Say = lambda text: None) -> Facts:
    """Of a model on the hub: its small files and the headers of its large ones are read, nothing is kept."""
    names = {f.path for f in found.files}

    def table(path: str) -> dict[str, Any]:
        parsed = json.loads(hub.read(found, path, say)) if path in names else {}
        return parsed if isinstance(parsed, dict) else {}

    tensors: dict[str, tuple[str, Shape]] = {}
    for file in found.files:
        if file.path.endswith(".safetensors"):
            tensors |= _remote_header(found, file, say)
    template = "chat_template.jinja" in names or "chat_template" in table("tokenizer_config.json")
    config, generation = table("config.json"), table("generation_config.json")
    return _facts(str(found.ref), None, config, generation, Listing(tensors), template, found.licence)


def _remote_header(found: hub.Remote, file: hub.File, say: hub.Say) -> dict[str, tuple[str, Shape]]:
    head = hub.read(found, file.path, say, (0, min(HEAD_BYTES, file.size)))
    length = int.from_bytes(head[:8], "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise FormatError(f"{found.ref}: {file.path} is no safetensors file — take another upload")
    if 8 + length > len(head):
        head = hub.read(found, file.path, say, (0, 8 + length))
    header = json.loads(head[8 : 8 + length])
    return {n: (str(t["dtype"]), tuple(t["shape"])) for n, t in header.items() if n != "__metadata__"}


def _facts(
    name: str,
    folder: Path | None,
    config: dict[str, Any],
    generation: Mapping[str, Any],
    listing: Listing,
    template: bool,
    licence: str,
) -> Facts:
    trouble, parsed, layout = "", None, None
    try:
        parsed = parse_config(config)
        layout = detect.choose(detect.declared(config), listing, listing.tensors)
    except TinychatError as error:
        trouble = str(error)
    parts = _parts(listing, layout, parsed) if not trouble or parsed else ()
    nbytes = sum(listing.size(n)[1] for n in listing.tensors)
    architecture = str(config.get("model_type", "unknown"))
    return Facts(
        name, folder, architecture, tuple(parts), nbytes, parsed, generation, template, licence, trouble
    )


def _parts(listing: Listing, layout: Layout | None, config: ModelConfig | None) -> list[Part]:
    rows: dict[tuple[str, str], list[int]] = {}
    for module, form, parameters, nbytes, flat in _weights(listing, layout):
        row = rows.setdefault((_role(module, flat, listing, config), form), [0, 0, 0])
        row[:] = row[0] + 1, row[1] + parameters, row[2] + nbytes
    made = [Part(name, form, *numbers) for (name, form), numbers in rows.items()]
    return sorted(made, key=lambda p: -p.nbytes)


def _weights(listing: Listing, layout: Layout | None) -> Iterator[tuple[str, str, int, int, bool]]:
    """Each module or plain tensor -> its name, form, parameters, bytes, whether it is a vector."""
    packed: set[str] = set()
    if layout is not None:
        for module in [n[: -len(layout.key) - 1] for n in listing.tensors if n.endswith(f".{layout.key}")]:
            mine = [f"{module}.{s}" for s in layout.suffixes if f"{module}.{s}" in listing]
            packed.update(mine)
            bits, group = _form(Stored(listing, module), layout)
            codes = max(mine, key=lambda n: listing.size(n)[1])
            form = f"int{bits} {'per channel' if group < 0 else f'g{group}'}"
            yield (
                module,
                form,
                listing.size(codes)[1] * 8 // bits,
                sum(listing.size(n)[1] for n in mine),
                False,
            )
    for name, (dtype, shape) in listing.tensors.items():
        if name not in packed:
            yield name, FLOATS.get(dtype, dtype.lower()), *listing.size(name), len(shape) < 2


def _form(stored: Stored, layout: Layout) -> tuple[int, int]:
    if not isinstance(layout, Mlx):
        return layout.w_bit, layout.group_size
    words, groups = stored.info("weight")[1][-1], stored.info("scales")[1][-1]
    return layout.form(stored, words, groups)


def _role(name: str, flat: bool, listing: Listing, config: ModelConfig | None) -> str:
    """The part of a model that a module belongs to, in words."""
    if config is None:
        return "weights"
    module = name.removesuffix(".weight")
    if module == config.spec.name("embed"):
        head = config.spec.name("head")
        return (
            "embedding"
            if f"{head}.weight" in listing or f"{head}.qweight" in listing
            else "embedding and head"
        )
    if module == config.spec.name("head"):
        return "head"
    if flat:
        return "norms and biases"
    return "layers" if re.match(rf"{re.escape(config.spec.name('layers'))}\.\d", name) else "other"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _licence(folder: Path) -> str:
    """What the model card's head says."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:4000]
    except OSError:
        return ""
    found = re.search(r"^license:\s*[\"']?([\w.-]+)", head, re.MULTILINE) if head.startswith("---") else None
    return found[1] if found else ""
