"""Settings of a chat that affect the answers, from flags, config file and /set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ChatSettings:
    """Settings that /set and /think can change during a chat."""

    sampling: dict[str, Any] = field(default_factory=dict)
    on_full: str = "stop"  # stop | slide | compact
    think: bool | None = None  # None: the default of the model's template
    unfold: bool = False  # show thoughts
    budget: int = 0  # limit of a thought in tokens; 0: no limit

    @property
    def template(self) -> dict[str, Any]:
        return {} if self.think is None else {"enable_thinking": self.think}
