"""Writing a model folder: shards one by one, the index last, what lies beside the weights byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinychat_mlx.checkpoint import INDEX, SINGLE, inside
from tinychat_mlx.errors import FormatError
from tinychat_mlx.tensorfile import Entry, TensorFile, open_regular, replacing, write

MAX_SHARD = 5_000_000_000  # bytes; what the hub and its tools expect
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece.*", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
    "generation_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


class ShardWriter:
    """A folder's shards, of a number known before: shard `i` of `total`, in any order, e.g. one a layer.

    A shard is whole or absent, and its bytes depend on nothing but its tensors: a killed run skips what
    `has` and writes the rest, and ends with the same files as one that was not killed. Until `finish`
    writes the index, several shards are no model.
    """

    def __init__(self, folder: Path, total: int, metadata: Mapping[str, str] | None = None) -> None:
        self.folder, self.total = folder, total
        self.metadata = {"format": "pt"} if metadata is None else metadata

    def path(self, i: int) -> Path:
        """-> where shard i (from 0) lies; an only one needs no number and no index."""
        if self.total == 1:
            return self.folder / SINGLE
        return self.folder / f"model-{i + 1:05}-of-{self.total:05}.safetensors"

    def has(self, i: int) -> bool:
        """Whether shard i is written, now or by an earlier run."""
        return self.path(i).exists()

    def write(self, i: int, tensors: Iterable[Entry]) -> None:
        """Write one shard; see `tensorfile.write`."""
        write(self.path(i), tensors, self.metadata)

    def finish(self) -> None:
        """Make the folder whole. Raises FormatError if a shard is missing or does not belong."""
        shards = [self.path(i) for i in range(self.total)]
        others = set(self.folder.glob("*.safetensors")) - set(shards)
        absent = [path for path in shards if not path.exists()]
        if others or absent:
            where, what = (
                (min(others), "a file of another run") if others else (absent[0], "the file is missing")
            )
            raise FormatError(what, where=where, remedy="delete the folder and start again")
        if self.total > 1:
            write_index(self.folder, shards)


def write_index(folder: Path, shards: Iterable[Path]) -> None:
    """Write the index of finished shards. Raises FormatError if two hold the same tensor."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in shards:
        file = TensorFile(path)
        for name in file.names:
            if name in weight_map:
                raise FormatError(
                    f"{name} is also in {weight_map[name]}",
                    where=path,
                    remedy="delete the folder and start again",
                )
            weight_map[name] = path.name
            total_size += file.nbytes(name)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def write_sharded(
    folder: Path,
    tensors: Iterable[Entry],
    max_bytes: int = MAX_SHARD,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in their order as model.safetensors, or as shards of at most max_bytes with an index.

    A tensor larger than that has a shard of its own. One tensor is in memory at a time.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    writer = ShardWriter(folder, len(shards), metadata)
    for i, shard in enumerate(shards):
        writer.write(i, shard)
    writer.finish()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face does, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, templates, generation config and licences byte for byte; -> their names.

    Never weights, config.json, the model card or code. Raises FormatError for a link out of the folder,
    which would carry a stranger's file along, and for what is no regular file.
    """
    copied = []
    for path in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)}):
        name = path.relative_to(source).as_posix()
        if path.is_dir():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(inside(source, name)) as original, replacing(target / name) as copy:
            shutil.copyfileobj(original, copy)
        copied.append(name)
    return copied
