"""A model that mlx-lm computes, with tinychat's conversation, sampling and context management."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.base.json_file import read_json, read_optional
from tinychat_mlx.contract import Device
from tinychat_mlx.engine.engine import Engine
from tinychat_mlx.engine.sampler import from_generation_config
from tinychat_mlx.loaded_model import Model


class MlxLmModel(Model):
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
        self.generation_config = read_optional(folder / "generation_config.json")
        self.defaults = from_generation_config(self.generation_config)
        self.engine = Engine(decoder, self.context)
        self._tokenizer, self._said, self.answer_ids = None, None, []

    def keep_in(self, folder: Path, exact: bool = False, limit: int = 0) -> None:
        """No effect: mlx-lm's caches have no stable format to store."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; refuses one that names Python code to run. Raises FormatError."""
    config = read_json(folder / "config.json")
    if "model_file" in config:
        raise FormatError(
            "model_file names Python code, which tinychat does not run",
            where=folder / "config.json",
            remedy="use a model without model_file",
        )
    return config
