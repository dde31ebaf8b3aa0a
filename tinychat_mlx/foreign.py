"""A model that mlx-lm computes, with tinychat's conversation, sampling and context management."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinychat_mlx.backend import Device
from tinychat_mlx.errors import FormatError
from tinychat_mlx.generate import Engine
from tinychat_mlx.model import Model
from tinychat_mlx.sampler import from_generation_config


class ForeignModel(Model):
    """A Model whose decoder is not tinychat's; `device.why` names the engine."""

    def __init__(self, folder: Path, decoder: Any, context: int) -> None:
        """decoder: has Decoder's methods and a config with vocab_size and eos_token_ids."""
        self.name, self.folder, self.config, self.backend = (
            folder.name,
            folder,
            decoder.config,
            decoder.backend,
        )
        device: Device = decoder.backend.describe()
        self.device = Device(device.backend, device.name, device.detail, decoder.describe(), device.features)
        self.context = context
        self.nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self.architecture, self.quantization = decoder.architecture, decoder.quantization
        self.generation_config = read(folder / "generation_config.json")
        self.defaults = from_generation_config(self.generation_config)
        self.engine = Engine(decoder, self.context)
        self._tokenizer, self._said, self.answer_ids = None, None, []

    def keep_in(self, folder: Path, exact: bool = False, limit: int = 0) -> None:
        """No effect: mlx-lm's caches have no stable format to store."""


def read(file: Path) -> Mapping[str, Any]:
    """Read an optional JSON object. Raises FormatError if the file is damaged."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FormatError(f"cannot be read ({e})", where=file, remedy="download it again") from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", where=file, remedy="download it again")
    return value
