"""Read calibration tokens from a file or a hub dataset, or let the model generate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinychat_mlx.awq.calibration.documents import Document, documents, kind_of
from tinychat_mlx.awq.calibration.selftext import write_text
from tinychat_mlx.awq.layer_stream import Ids, Progress, Watch
from tinychat_mlx.awq.settings import LEAST, Settings, default_tokens
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig, token_ids
from tinychat_mlx.text.tokenizer import Tokenizer
from tinychat_mlx.weights.checkpoint import Checkpoint

CHARACTERS = 5  # average characters per token; limits how much of a dataset is read
LEFT = 2048  # minimum held-out tokens from a calibration text; fewer give no usable standard error


def calibration_ids(
    config: ModelConfig,
    source: Checkpoint,
    backend: Callable[[], Backend],
    settings: Settings,
    window: int,
    watch: Watch,
) -> Ids:
    """Return calibration tokens (T,), with the documents concatenated.

    The progress note states how many documents are used. `backend` creates the device that generates text
    when `settings.calib` is "self". Raises UsageError and TokenizerError.
    """
    tokenizer = Tokenizer.load(source.folder)
    wanted = settings.tokens or default_tokens(config)
    if settings.calib == "self":
        return _own_text(config, source, backend(), tokenizer, wanted, window, [settings.seed], watch)
    found, origin = read_documents(settings.calib, wanted)
    ids, used = packed(found, tokenizer, wanted, settings.seed)
    if len(ids) < LEAST:
        raise UsageError(
            f"the text has {len(ids)} tokens, at least {LEAST} are needed",
            where=origin,
            remedy="give more text",
        )
    note = f"{len(ids)} tokens, {used} of {len(found)} documents of {origin}"
    if ids.max() >= config.vocab_size:
        raise UsageError(
            f"its tokenizer has tokens the model lacks ({int(ids.max())})",
            where=source.folder,
            remedy="download the model and its tokenizer again; they are of different models",
        )
    watch(Progress("calibrate", 1, 1, note))
    return ids


def _own_text(
    config: ModelConfig,
    source: Checkpoint,
    device: Backend,
    tokenizer: Tokenizer,
    wanted: int,
    window: int,
    seed: Sequence[int],
    watch: Watch,
) -> Ids:
    file = token_ids(source.generation_config.get("eos_token_id"), "generation_config.json")
    stops = tokenizer.stop_ids(config.eos_token_ids, file)
    return write_text(config, source, device, tokenizer, stops, wanted, window, seed, watch)


@dataclass(frozen=True)
class HeldOut:
    """Text that the calibration did not use. `origin` describes its source."""

    ids: list[int]
    origin: str


def held_out(
    config: ModelConfig,
    source: Checkpoint,
    backend: Callable[[], Backend],
    settings: Settings,
    window: int,
    file: str | None,
    watch: Watch,
) -> HeldOut:
    """Return the text that a report measures on.

    The text is `file` if given, else the documents that calibration left unused, else text that the model
    generates.
    """
    tokenizer, calibrated = Tokenizer.load(source.folder), settings.tokens or default_tokens(config)
    wanted = default_tokens(config) // 2
    if file is not None:
        return HeldOut(encoded(file, tokenizer)[:wanted], Path(file).name)
    why = "with a different seed"
    if settings.calib != "self":
        found, origin = read_documents(settings.calib, calibrated)
        ids = left_over(found, tokenizer, calibrated, wanted, settings.seed)
        if len(ids) >= LEFT:
            return HeldOut(ids, f"the part of {origin} that the calibration did not use")
        why = f"because the calibration left only {len(ids)} tokens of {origin}"
    seed = [settings.seed, 1]
    own = _own_text(config, source, backend(), tokenizer, wanted, window, seed, watch)
    return HeldOut(own.tolist(), f"text the model wrote itself, {why}")


def packed(found: Sequence[Document], tokenizer: Tokenizer, wanted: int, seed: int) -> tuple[Ids, int]:
    """Concatenate documents in a seeded order until there are `wanted` tokens.

    Returns (tokens, number of documents used). The last document is cut at the budget. Nothing else is
    dropped.
    """
    ids: list[int] = []
    used = 0
    for one in _encoded(found, tokenizer, seed):
        ids += one
        used += 1
        if len(ids) >= wanted:
            break
    return np.array(ids[:wanted], np.int32), used


def _encoded(found: Sequence[Document], tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    for i in np.random.default_rng(seed).permutation(len(found)):
        one = found[i]
        yield tokenizer.encode(one) if isinstance(one, str) else tokenizer.encode_chat(one)


def left_over(
    found: Sequence[Document], tokenizer: Tokenizer, taken: int, wanted: int, seed: int
) -> list[int]:
    """Return at most `wanted` tokens of the documents that `packed` does not use after `taken` tokens.

    The tokens start with the document after the one that was cut. If the cut document is the last one, they
    are the rest of that document.
    """
    ids: list[int] = []
    rest: list[int] = []
    before = 0
    for one in _encoded(found, tokenizer, seed):
        if before >= taken:
            ids += one
        elif before + len(one) > taken:
            rest = one[taken - before :]
        before += len(one)
        if len(ids) >= wanted:
            break
    return (ids or rest)[:wanted]


def read_documents(calib: str, wanted: int = 0) -> tuple[list[Document], str]:
    """Read a file or a hub dataset. Returns (documents, origin). Raises UsageError and ModelNotFoundError.

    `wanted` is the number of tokens needed. From a dataset about four times as many are read, so that seeds
    give different text and some text remains for measurements.
    """
    path = Path(calib).expanduser()
    if path.is_file():
        return _read(path), path.name
    if path.exists() or calib.startswith((".", "/", "~")) or "/" not in calib:
        raise UsageError(
            "not a file, not `self`, and not the id of a dataset (ORG/NAME)",
            where=f"--calib {calib}",
            remedy="check the name",
        )
    if ":" not in calib and kind_of(calib) is not None:
        raise UsageError("no such file", where=f"--calib {calib}", remedy="check the path")
    from tinychat_mlx.awq.calibration.dataset import fetch

    return fetch(calib, 4 * CHARACTERS * wanted)


def _read(path: Path) -> list[Document]:
    try:
        with path.open("rb") as file:
            return list(documents(str(path), file))
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror or error}", where=path, remedy="check the path"
        ) from None


def encoded(file: str, tokenizer: Tokenizer) -> list[int]:
    """Encode all documents of a file in order and concatenate the tokens. Raises UsageError."""
    ids: list[int] = []
    for one in _read(Path(file).expanduser()):
        ids += tokenizer.encode(one) if isinstance(one, str) else tokenizer.encode_chat(one)
    return ids
