"""Score the answers of a model to the held-out prompts, the same for every engine.

`generate(messages) -> str` must be greedy; items come from `demo_heldout.jsonl`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, str]
Item = dict[str, Any]


@dataclass
class Scores:
    """Share of correct answers, per skill and in total, and the wrong ones."""

    skills: dict[str, float]
    total: float
    wrong: list[tuple[Item, str]] = field(default_factory=list)


def load_items(path: Path) -> list[Item]:
    """Read held-out prompts, one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right(check: dict[str, Any], reply: str) -> bool:
    """Return whether the reply passes the check."""
    low = reply.lower()
    if check["kind"] == "number":
        numbers = re.findall(r"-?\d+", reply)
        return bool(numbers) and int(numbers[-1]) == check["value"]
    if check["kind"] == "contains":
        return all(re.search(rf"(?<!\w){re.escape(w.lower())}(?!\w)", low) for w in check["all"])
    if check["kind"] == "regex":
        return re.search(check["pattern"], reply, re.DOTALL) is not None
    if check["kind"] == "story":
        sentences = len(re.findall(r"[.!?](?:\s|\*|$)", reply))
        return sentences >= 5 and all(w.lower() in low for w in check["words"])
    raise ValueError(f"unknown check {check['kind']!r}")


def score(generate: Callable[[list[Message]], str], items: Sequence[Item]) -> Scores:
    """Answer every item and count."""
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for item in items:
        reply = generate(item["messages"])
        ok = is_right(item["check"], reply)
        right[item["skill"]].append(ok)
        if not ok:
            wrong.append((item, reply))
    skills = {skill: sum(oks) / len(oks) for skill, oks in right.items()}
    every = [ok for oks in right.values() for ok in oks]
    return Scores(skills, sum(every) / len(every), wrong)
