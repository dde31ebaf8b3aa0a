"""Write the finished folder (merged shards, config.json, side files, model card) and rename it into place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinychat_mlx import __version__
from tinychat_mlx.awq.quality.verdict import Rejected
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.hub.cache import repo_of
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import Entry, TensorFile, entries, replacing, sync_folder
from tinychat_mlx.weights.shards import copy_side_files, write_json, write_sharded
from tinychat_mlx.weights.weight import Packed


def merged(shards: Iterable[Path]) -> list[Entry]:
    """List the tensors of several files. Each is read when it is written."""
    return [tensor for path in shards for tensor in entries(TensorFile(path))]


def write_folder(
    folder: Path, source: Checkpoint, tensors: Iterable[Entry], config: dict[str, Any], card: str
) -> None:
    """Write a folder that mlx-lm and transformers can load."""
    folder.mkdir()
    write_sharded(folder, tensors, metadata={"format": "mlx" if "quantization" in config else "pt"})
    write_json(folder / "config.json", config)
    copy_side_files(source.folder, folder)
    with replacing(folder / "README.md") as file:
        file.write(card.encode())
    sync_folder(folder)


def put_in_place(folder: Path, target: Path, work: Path, renaming: Path) -> None:
    """Rename the finished folder to its final name. An older folder with that name is removed afterwards.

    `renaming` is a marker file: once it exists, the target may be the finished folder.
    """
    old = work / "old"
    renaming.touch()
    sync_folder(work)
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(folder, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise TinychatError(
            f"cannot be put in place: {error.strerror}",
            where=target,
            remedy="allow writing there, then repeat with --resume",
        ) from None
    sync_folder(target.parent)


CARRIED = ("license", "license_name", "license_link", "language")  # keys copied from the source's model card


def card_text(source: Checkpoint, settings: Settings, rejected: Sequence[Rejected] = ()) -> str:
    """Return the model card: YAML front matter for the hub, then a description of the conversion."""
    front, name = _front_matter(source.folder / "README.md"), shown_name(source)
    dense, old = source.quantization.format == "dense", source.quantization
    w_bit, awq = (settings.w_bit, settings.method != "rtn") if dense else (old.w_bit, "awq" in old.format)
    tags = (
        ["awq"] * (awq or settings.format == "awq") + [f"{w_bit}-bit"] + ["mlx"] * (settings.format == "mlx")
    )
    head = [
        *_base_model(source, front),
        f'library_name: "{"mlx" if settings.format == "mlx" else "transformers"}"',
        *(line for key in CARRIED for line in front.get(key, ())),
        'pipeline_tag: "text-generation"',
        f"tags: {json.dumps(tags)}",
    ]
    bits = f"{settings.form_text} (method {settings.method})"
    edges = "float16" if settings.head_bits == 16 else f"{settings.head_bits} bits"
    done = (
        f"Weights of {name} in {bits}, embedding and head in {edges}. "
        f"Calibration: {calibration_text(settings)}."
        if dense
        else f"The {old.format} weights of {name} in the {settings.format} format, codes unchanged."
    )
    yaml = "\n".join(head)
    done += "".join(f"\n{one.text()}." for one in rejected)
    return f"---\n{yaml}\n---\n\n# {name}, {w_bit}-bit\n\n{done}\nMade by tinychat-mlx {__version__}.\n"


def shown_name(source: Checkpoint) -> str:
    """Return the model's hub id, or its folder's name."""
    return repo_of(source.folder) or source.folder.resolve().name


def _base_model(source: Checkpoint, front: dict[str, list[str]]) -> list[str]:
    """Return the YAML lines that name the base model.

    A local folder has no hub id, so its model card is used.
    """
    if name := repo_of(source.folder):
        return [f"base_model: {json.dumps(name)}", "base_model_relation: quantized"]
    relation = "".join(front.get("base_model_relation", ())).partition(":")[2].strip().strip("\"'")
    if source.quantization.format != "dense" and relation == "quantized":
        return [*front.get("base_model", ()), "base_model_relation: quantized"]
    return []


def edge_bits(result: Checkpoint) -> int:
    """Return the bits per weight of the stored embedding (16: float)."""
    weight = result.weight(parse_config(result.config).spec.name("embed"))
    return weight.w_bit if isinstance(weight, Packed) else 16


def calibration_text(settings: Settings) -> str:
    if settings.method == "rtn":
        return "none"
    if settings.calib == "self":
        return "text the model wrote itself"
    return Path(settings.calib).name if Path(settings.calib).is_file() else settings.calib


def _front_matter(path: Path) -> dict[str, list[str]]:
    """Return the lines of each key of a model card's front matter.

    A value may span indented lines and lists.
    """
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    found: dict[str, list[str]] = {}
    own: list[str] = []
    for line in lines[1 : lines.index("---", 1)]:
        if key := re.match(r"([A-Za-z_][\w-]*)\s*:", line):
            own = found.setdefault(key[1], [])
        own.append(line)
    return found
