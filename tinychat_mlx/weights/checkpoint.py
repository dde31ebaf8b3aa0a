"""A model folder as a source of canonical weights: files are mapped and checked, weights decoded on demand."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import FormatError, ModelNotFoundError, TinychatError
from tinychat_mlx.base.json_file import read_json
from tinychat_mlx.weights.formats import detect
from tinychat_mlx.weights.formats.stacked import File, unstacked
from tinychat_mlx.weights.formats.stored import FLOATS, Shape, Stored
from tinychat_mlx.weights.model_identity import fingerprint
from tinychat_mlx.weights.safetensors import TensorFile, show
from tinychat_mlx.weights.weight import F32, Array, Dense, Weight, to_float32

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNREAD = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".h5", ".msgpack")  # weights, but never opened


@dataclass(frozen=True)
class Quantization:
    """The quantisation of most weights of a checkpoint."""

    format: str  # "dense", "mlx", "awq-gemm", "awq-gemv", "awq-gemv-fast", "llm-awq", "compressed-tensors"
    w_bit: int
    group_size: int  # 0: no groups; -1: one group per row

    def describe(self) -> str:
        groups = "per channel" if self.group_size < 0 else f"g{self.group_size}"
        return f"int{self.w_bit} {groups}" if self.group_size else f"{self.w_bit}-bit floats"


class Checkpoint:
    """The tensors of a model folder; `folder`, `config`, `generation_config`, `quantization`, `nbytes`.

    Names are Hugging Face's without storage details: a quantised linear `m` has the names "m" and "m.weight" in any
    layout. Arrays stay valid after the checkpoint is deleted: the file stays mapped until the last one is deleted.
    """

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Read config.json, map the weight files and check that they are consistent.

        Raises ModelNotFoundError, ConfigError, FormatError. Damaged files are never used in part.
        """
        return cls(Path(folder))

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ModelNotFoundError("no such folder", where=folder, remedy="check the path")
        if not os.path.lexists(folder / "config.json"):
            raise ModelNotFoundError(
                "not a model folder: it has no config.json", where=folder, remedy="check the path"
            )
        self.folder = folder
        self.fingerprint = fingerprint(folder)  # must precede the opening of any file
        self.config = read_json(folder / "config.json")
        completed = _with_side_files(folder, self.config)
        layouts = detect.declared(completed)
        self._files = dict(unstacked(_open_files(folder)))
        self._layout = detect.choose(layouts, self, self._files)
        generation = folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.nbytes = sum(file.nbytes(name) for name, file in self._files.items())
        self.modules = frozenset(self._quantised())
        self._names = frozenset(self._logical())
        detect.check_left_out(completed, self.modules)
        self.quantization = self._describe()

    @property
    def key(self) -> str:
        """A file name that is unique to this folder, for caches."""
        place = self.folder.resolve()
        plain = re.sub(r"[^\w.-]", "_", place.name, flags=re.ASCII)[:60]
        return f"{plain}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"

    def names(self) -> frozenset[str]:
        """Return the logical names of all tensors, and of all modules that have a weight."""
        return self._names

    def has(self, name: str) -> bool:
        """Whether a module ("lm_head") or a tensor ("model.norm.weight") exists."""
        return name in self._names

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """Return the canonical weight of a linear or an embedding, with its bias.

        shape: the (N, K) that config.json requires; it is checked. Raises FormatError.
        """
        stored = Stored(self, module, shape)
        if module in self.modules:
            assert self._layout is not None
            return self._layout.read(stored)
        n, k = stored.matrix("weight", *FLOATS)
        stored.expect(n, k, "weight")
        return Dense(module, stored.take("weight", (n, k), *FLOATS), stored.bias(n))

    def vector(self, name: str) -> F32:
        """Return a one-dimensional tensor ("model.norm.weight") as float32. Raises FormatError."""
        dtype, shape = self.info(name)
        if dtype not in FLOATS or len(shape) != 1:
            raise FormatError(
                f"{show(name)} is {dtype} {list(shape)}, not a float vector", where=self.where(name)
            )
        return to_float32(self.read(name))

    # The stored tensors, for formats/.

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> tuple[str, Shape]:
        """Return dtype and shape of a stored tensor. Raises FormatError if it does not exist."""
        return self._file(name).info(name)

    def read(self, name: str) -> Array:
        """Return a stored tensor as a view of its file."""
        return self._file(name).read(name)

    def where(self, name: str) -> str:
        file = self._files.get(name)
        return str(file.path if file else self.folder)

    def _file(self, name: str) -> File:
        file = self._files.get(name)
        if file is None:
            raise FormatError(
                f"tensor {show(name)} is missing, but config.json requires it", where=self.folder
            )
        return file

    def _quantised(self) -> Iterator[str]:
        if self._layout is not None:
            end = f".{self._layout.key}"
            yield from (name.removesuffix(end) for name in self._files if name.endswith(end))

    def _logical(self) -> Iterator[str]:
        parts = self._layout.suffixes if self._layout else ()
        for name in self._files:
            module, _, suffix = name.rpartition(".")
            if module in self.modules and suffix in parts:
                yield from (module, f"{module}.weight")
            else:
                yield from (name, module) if suffix == "weight" else (name,)

    def _describe(self) -> Quantization:
        if self._layout is None:
            largest = max(self._files, key=lambda name: self._files[name].nbytes(name), default=None)
            wide = largest is not None and self.info(largest)[0] == "F32"
            return Quantization("dense", 32 if wide else 16, 0)
        return Quantization(self._layout.name, self._layout.w_bit, self._layout.group_size)


def _with_side_files(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json merged with the separate config files of older quantisers."""
    if any(key in config for key in ("quantization", "quantization_config")):
        return config
    if (folder / "hf_quant_config.json").exists():
        return config | {"quantization_config": {"quant_method": "modelopt"}}
    legacy = folder / "quant_config.json"
    if not legacy.exists():
        return config
    side = read_json(legacy)
    block = {"quant_method": "awq", "bits": side.get("w_bit"), "group_size": side.get("q_group_size")}
    return config | {"quantization_config": side | block}


def _open_files(folder: Path) -> dict[str, File]:
    """Return tensor name -> file. Raises FormatError if a file is missing, damaged or from another model."""
    if (folder / INDEX).exists():
        return _open_shards(folder)
    if not (folder / SINGLE).exists():
        raise _no_weights(folder)
    file = TensorFile(inside(folder, SINGLE))
    return {name: file for name in file.names}


def _open_shards(folder: Path) -> dict[str, File]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        weight_map = {}
    listed = list(weight_map.values())
    if not listed or not all(isinstance(shard, str) for shard in listed):
        raise FormatError(
            "weight_map does not map tensor names to file names", where=index, remedy="download it again"
        )
    shards = sorted(set(listed))
    for shard in shards:
        if not is_plain_name(shard):
            raise FormatError(
                f"weight_map names {show(shard)}, which is not a file of this folder", where=index
            )
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FormatError(
            f"{len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}",
            where=folder,
            remedy="start the interrupted download again",
        )
    if SINGLE not in shards and (folder / SINGLE).exists():
        raise FormatError(
            f"{SINGLE} and {INDEX} are from different models", where=folder, remedy="remove one of them"
        )
    files = {shard: TensorFile(inside(folder, shard)) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise FormatError(
                f"{show(name)} is missing, but {INDEX} lists it in this file",
                where=folder / shard,
                remedy="start the download again",
            )
    return {name: files[shard] for name, shard in weight_map.items()}


def is_plain_name(name: str) -> bool:
    """Whether a name from a file is that of a safetensors file directly in its folder, on every system."""
    return name.endswith(".safetensors") and name[0] not in ".~" and not set(name) & set('/\\:\0*?"<>|')


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file. Raises FormatError for a link that leaves the folder or the hub cache's blobs."""
    path, home = folder / name, folder.resolve()
    allowed = home.parent.parent if home.parent.name == "snapshots" else home
    if not path.resolve().is_relative_to(allowed):
        raise FormatError(
            "a link to a file outside the model folder",
            where=path,
            remedy="put the file itself into the folder",
        )
    return path


def _no_weights(folder: Path) -> TinychatError:
    """Return the error for a folder without readable weights, naming the files found instead."""
    names = sorted(path.name for path in folder.iterdir())
    if shards := [n for n in names if n.endswith(".safetensors")]:
        return FormatError(
            f"{shards[0]} exists, but {INDEX} is missing",
            where=folder,
            remedy="start the interrupted download again",
        )
    if unsafe := [n for n in names if n.endswith(UNREAD)]:
        return FormatError(
            f"the weights are in {unsafe[0]}; tinychat reads only safetensors, because other files may run code",
            where=folder,
            remedy="use a safetensors upload of the model, or save it again with save_pretrained of transformers",
        )
    return FormatError(f"no {SINGLE} in it", where=folder, remedy="check that it is a model folder")
