"""Calibration tokens: from a file, from a dataset on the hub, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinychat_mlx.awq.selftext import write_text
from tinychat_mlx.awq.settings import Settings, default_tokens
from tinychat_mlx.awq.stream import Ids, Progress, Watch
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig, token_ids
from tinychat_mlx.errors import ModelNotFoundError, UsageError
from tinychat_mlx.tokenizer import Tokenizer

TEXT_FILES = (".txt", ".md", ".jsonl")
Document = str | list[dict[str, Any]]  # a text, or the messages of a chat
LEAST = 128  # tokens; fewer say nothing about an input of hundreds of channels


def calibration_ids(
    config: ModelConfig,
    source: Checkpoint,
    backend: Callable[[], Backend],
    settings: Settings,
    window: int,
    watch: Watch,
) -> Ids:
    """-> tokens (T,), documents end to end; what is left out is said. Raises UsageError, TokenizerError.

    backend: makes the device on which the model writes its own text, if it is to.
    """
    tokenizer = Tokenizer.load(source.folder)
    wanted = settings.tokens or default_tokens(config)
    if settings.calib == "self":
        file = token_ids(source.generation_config.get("eos_token_id"), "generation_config.json")
        stops = tokenizer.stop_ids(config.eos_token_ids, file)
        return write_text(config, source, backend(), tokenizer, stops, wanted, window, settings.seed, watch)
    documents = read_documents(settings.calib)
    ids, used = packed(documents, tokenizer, wanted, settings.seed)
    note = f"{len(ids)} tokens, {used} of {len(documents)} documents of {settings.calib}"
    if ids.max() >= config.vocab_size:
        raise UsageError(f"{source.folder}: its tokenizer has tokens the model lacks ({int(ids.max())})")
    watch(Progress("calibrate", 1, 1, note))
    return ids


def packed(documents: Sequence[Document], tokenizer: Tokenizer, wanted: int, seed: int) -> tuple[Ids, int]:
    """Documents in a seeded order, end to end, until there are `wanted` tokens -> tokens, documents used.

    The last document is cut where the budget ends; nothing else is left out.
    """
    ids: list[int] = []
    used = 0
    for i in np.random.default_rng(seed).permutation(len(documents)):
        if len(ids) >= wanted:
            break
        document = documents[i]
        ids += tokenizer.encode(document) if isinstance(document, str) else tokenizer.encode_chat(document)
        used += 1
    if len(ids) < LEAST:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, at least {LEAST} are needed: give more text"
        )
    return np.array(ids[:wanted], np.int32), used


def read_documents(calib: str) -> list[Document]:
    """A file, or the text files of a hub dataset -> texts and chats. Raises UsageError."""
    path = Path(calib).expanduser()
    if path.is_file():
        return list(_documents(path))
    if path.is_dir() or calib.startswith((".", "/", "~")) or calib.count("/") != 1:
        raise UsageError(f"--calib {calib}: neither a file, nor `self`, nor a dataset's id (ORG/NAME)")
    return [d for file in _download(calib) for d in _documents(file)]


def _documents(path: Path) -> Iterator[Document]:
    if path.suffix not in TEXT_FILES:
        raise UsageError(f"{path}: read are {', '.join(TEXT_FILES)} (parquet is not): convert it to .jsonl")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        if text.strip():
            yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _document(line, f"{path}, line {number}")


def _document(line: str, where: str) -> Document:
    """A line of JSONL: {"messages": […]}, {"text": "…"}, or a string."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("messages", value.get("text"))
    chat = isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    if isinstance(value, str) or (chat and value):
        document: Document = value
        return document
    raise UsageError(f'{where}: holds neither "messages" (role and content each) nor "text"')


def _download(dataset: str) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        names = HfApi().list_repo_files(dataset, repo_type="dataset")
        usable = [n for n in sorted(names) if n.endswith(".jsonl") or (n.endswith(".txt") and "/" not in n)]
        if not usable:
            raise UsageError(f"dataset {dataset} has no .jsonl or .txt file (parquet is not read)")
        return [Path(hf_hub_download(dataset, usable[0], repo_type="dataset"))]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"dataset {dataset}: the hub does not give it ({type(error).__name__}): give a file, or --calib self"
        ) from None


def encoded(file: str, tokenizer: Tokenizer) -> list[int]:
    """All documents of a file or dataset, in their order, end to end -> tokens."""
    ids: list[int] = []
    for document in read_documents(file):
        ids += tokenizer.encode(document) if isinstance(document, str) else tokenizer.encode_chat(document)
    return ids
