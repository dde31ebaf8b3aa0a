"""The finished folder: shards merged, config.json, side files and a model card; then one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinychat_mlx import __version__
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.tensors import quantization_block, router_names
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.errors import TinychatError
from tinychat_mlx.formats.awq_gemm import awq_config
from tinychat_mlx.shards import copy_side_files, write_json, write_sharded
from tinychat_mlx.tensorfile import Entry, TensorFile, entries, replacing, sync_folder

RENAMING = "renaming"  # a file of the work folder: from here on the target may be the finished folder


def merged(shards: Iterable[Path]) -> list[Entry]:
    """All tensors of several files; each is read when it is written."""
    return [tensor for path in shards for tensor in entries(TensorFile(path))]


def write_folder(
    folder: Path, source: Checkpoint, tensors: Iterable[Entry], config: dict[str, Any], card: str
) -> None:
    """Fill an empty folder that mlx-lm and transformers' readers understand."""
    folder.mkdir()
    write_sharded(folder, tensors, metadata={"format": "mlx" if "quantization" in config else "pt"})
    write_json(folder / "config.json", config)
    copy_side_files(source.folder, folder)
    with replacing(folder / "README.md") as file:
        file.write(card.encode())
    sync_folder(folder)


def put_in_place(folder: Path, target: Path, work: Path) -> None:
    """Rename the finished folder to its name; an older one of that name goes when the new one is there."""
    (work / RENAMING).touch()
    sync_folder(work)
    try:
        if target.exists():
            shutil.rmtree(work / "old", ignore_errors=True)
            os.rename(target, work / "old")
        os.rename(folder, target)
    except OSError as error:
        raise TinychatError(
            f"{target}: cannot be put in place: {error.strerror} — repeat with --resume when it can"
        ) from None
    sync_folder(target.parent)


def model_config(
    raw: dict[str, Any], settings: Settings, config: ModelConfig, source: Checkpoint
) -> dict[str, Any]:
    """config.json with every key it had, the weights' dtype, and what was quantised."""
    out = {key: value for key, value in raw.items() if key not in ("quantization", "quantization_config")}
    for key in ("dtype", "torch_dtype"):
        if key in out:
            out[key] = "float16"
    if not {"dtype", "torch_dtype"} & set(out):
        out["torch_dtype"] = "float16"
    if settings.format == "awq":
        head = [config.spec.name("head")] if source.has(config.spec.name("head")) else []
        kept = (head + router_names(config)) or None
        return out | {"quantization_config": awq_config(settings.group_size, kept)}
    block = quantization_block(config, source, settings.w_bit, settings.group_size, settings.head_bits)
    return out | {"quantization": block, "quantization_config": block}


def card_text(source: Checkpoint, settings: Settings) -> str:
    """The model card: YAML for the hub, then what was done. A change of format says that and no more."""
    front = _front_matter(source.folder / "README.md")
    base = front.get("base_model") or source.config.get("_name_or_path") or source.folder.resolve().name
    requantised = source.quantization.format == "dense"
    w_bit = settings.w_bit if requantised else source.quantization.w_bit
    head = {
        "base_model": base,
        "base_model_relation": "quantized",
        "library_name": "mlx" if settings.format == "mlx" else "transformers",
        "license": front.get("license", "other"),
        "pipeline_tag": "text-generation",
        "tags": ["awq", f"{w_bit}-bit"] + (["mlx"] if settings.format == "mlx" else []),
    }
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    bits = f"{settings.w_bit} bits in groups of {settings.group_size} (method {settings.method})"
    edges = "float16" if settings.head_bits == 16 else f"{settings.head_bits} bits"
    done = (
        f"Weights of {base} in {bits}, embedding and head in {edges}. "
        f"Calibration: {calibration_text(settings)}."
        if requantised
        else f"The {source.quantization.format} weights of {base} in the {settings.format} format, codes unchanged."
    )
    title = f"# {source.folder.resolve().name}, {w_bit}-bit"
    return f"---\n{yaml}\n---\n\n{title}\n\n{done}\nMade by tinychat-mlx {__version__}.\n"


def calibration_text(settings: Settings) -> str:
    if settings.method == "rtn":
        return "none"
    if settings.calib == "self":
        return "text the model wrote itself"
    return Path(settings.calib).name if Path(settings.calib).is_file() else settings.calib


def _front_matter(path: Path) -> dict[str, str]:
    """The simple `key: value` lines of a model card's head; enough for the licence and the base model."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    head = lines[1 : lines.index("---", 1)]
    pairs = (line.partition(":") for line in head if not line.startswith((" ", "-")))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs if value.strip()}
