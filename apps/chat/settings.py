"""What shapes the answers of a chat, as flags, config file and /set have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Settings:
    """Changed by /set and /think while the chat goes on."""

    sampling: dict[str, Any] = field(default_factory=dict)
    on_full: str = "stop"  # stop | slide | compact
    think: bool | None = None  # None: as the model's template has it
    unfold: bool = False  # show thoughts
    budget: int = 0  # tokens a thought may have; 0: no bound

    @property
    def template(self) -> dict[str, Any]:
        return {} if self.think is None else {"enable_thinking": self.think}
