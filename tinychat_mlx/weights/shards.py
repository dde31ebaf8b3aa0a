"""Writer of model folders: shards in any order, the index last, side files copied byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.base.files import open_regular
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE, inside
from tinychat_mlx.weights.safetensors import Entry, TensorFile, replacing, write

MAX_SHARD = 5_000_000_000  # bytes; the limit of the hub's tools
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece.*", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
    "generation_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


class ShardWriter:
    """Writes a folder's shards: shard `i` of `total`, known in advance, in any order, e.g. one per layer.

    A shard is complete or absent, and its bytes depend only on its tensors. An interrupted run can skip the shards for
    which `has` is true and write the rest; the files are the same as those of an uninterrupted run. Several shards are
    not a valid model until `finish` writes the index.
    """

    def __init__(self, folder: Path, total: int, metadata: Mapping[str, str] | None = None) -> None:
        self.folder, self.total = folder, total
        self.metadata = {"format": "pt"} if metadata is None else metadata

    def path(self, i: int) -> Path:
        """Return the path of shard i (from 0). A single shard has no number and no index."""
        if self.total == 1:
            return self.folder / SINGLE
        return self.folder / f"model-{i + 1:05}-of-{self.total:05}.safetensors"

    def has(self, i: int) -> bool:
        """Whether shard i exists, written now or by an earlier run."""
        return self.path(i).exists()

    def write(self, i: int, tensors: Iterable[Entry]) -> None:
        """Write one shard. See `tensorfile.write`."""
        write(self.path(i), tensors, self.metadata)

    def finish(self) -> None:
        """Write the index. Raises FormatError if a shard is missing or another file is present."""
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
    """Write the index of finished shards. Raises FormatError if two have the same tensor."""
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
    """Write tensors in order to model.safetensors, or to shards of at most max_bytes with an index.

    A larger tensor gets its own shard. One tensor is in memory at a time.
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
    """Write a JSON file in Hugging Face's style, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, templates, generation config and licences byte for byte -> their names.

    Weights, config.json, the model card and code are not copied. Raises FormatError for a link out of the folder, which
    would copy an unrelated file, and for anything but a regular file.
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
