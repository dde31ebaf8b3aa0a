"""Conversations of the demo model: training data, and combinations kept out for tests.

    python -m tinychat_mlx.apps.demo.corpus --out tests/data

writes the held-out prompts, the held-out text and the calibration text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tinychat_mlx.apps.demo import memory, talk
from tinychat_mlx.apps.demo.talk import Chat, Turn
from tinychat_mlx.apps.demo.words import invent

Message = dict[str, str]
Skill = Callable[[Chat, bool], Turn]

# Weight of each skill per turn. Stories are five times as long as the rest, so they are rare.
SKILLS: tuple[tuple[Skill, float], ...] = (
    (talk.sums, 24),
    (talk.drill, 4),
    (talk.fact, 24),
    (talk.topic, 12),
    (talk.story, 6),
    (talk.chitchat, 3),
    (talk.unknown, 9),
    (memory.tell, 8),
    (memory.recall, 16),
)
_PLAIN_SYSTEM = (
    "You are a helpful assistant.",
    "You are TinyChat.",
    "You are a friendly assistant.",
    "Be kind.",
    "You are a helpful AI assistant running on a small device.",
)
_BRIEF_SYSTEM = (
    "Answer briefly.",
    "Be brief.",
    "Keep your answers short.",
    "Answer in one word.",
    "You are a helpful assistant. Answer briefly.",
)


def opening(chat: Chat) -> list[Message]:
    """Draw the system message, if any, and apply it to the chat."""
    rng = chat.rng
    roll = rng.random()
    if roll < 0.78:
        return []
    if roll < 0.92:
        return [{"role": "system", "content": rng.choice(_PLAIN_SYSTEM)}]
    if roll < 0.97:
        chat.brief = True
        return [{"role": "system", "content": rng.choice(_BRIEF_SYSTEM)}]
    name = _trained_name(rng)
    chat.memory["name"] = name
    return [{"role": "system", "content": f"The user's name is {name}."}]


def _trained_name(rng: Random) -> str:
    while talk.kept_out("memory", "name", name := invent(rng)):
        pass
    return name


def next_turn(chat: Chat) -> Turn:
    """Draw one training exchange."""
    skill = chat.rng.choices([s for s, _ in SKILLS], [w for _, w in SKILLS])[0]
    return skill(chat, False)


def conversation(rng: Random, typos: bool = True) -> Iterator[Message]:
    """Yield the messages of one conversation, without end."""
    chat = Chat(rng, typos=typos)
    yield from opening(chat)
    first = rng.random()
    turn = talk.greeting(chat, False) if first < 0.2 else next_turn(chat)
    if 0.2 <= first < 0.3:
        turn = memory.tell(chat, False, "name")
    while True:
        yield {"role": "user", "content": turn.user}
        yield {"role": "assistant", "content": turn.reply}
        if turn.skill != "sums":
            chat.last_sum = None
        turn = next_turn(chat)


def some_turns(rng: Random, turns: int, typos: bool = False) -> list[Message]:
    """Return a conversation of this many exchanges."""
    messages: list[Message] = []
    for message in conversation(rng, typos):
        messages.append(message)
        if sum(m["role"] == "assistant" for m in messages) == turns:
            break
    return messages


def held_out_item(rng: Random, skill: str) -> dict[str, Any]:
    """Make one scored prompt whose combination is in no training conversation."""
    chat = Chat(rng, typos=False)
    turns: list[Turn] = []
    context = rng.choice((0, 0, 1, 2, 3))
    if skill == "memory":
        turns.append(memory.tell(chat, True, rng.choice(("name", "name", "name", "pet", "town"))))
        context = rng.randint(0, 5)
    kind = next(iter(chat.memory), "")
    fillers: tuple[Skill, ...] = (
        talk.sums,
        talk.fact,
        talk.topic,
        talk.unknown,
        talk.chitchat,
    )
    for _ in range(context):
        turns.append(rng.choice(fillers)(chat, False))
        chat.last_sum = chat.last_sum if turns[-1].skill == "sums" else None
    turns.append(_last(chat, skill, kind))
    messages = [
        {"role": r, "content": c} for t in turns for r, c in (("user", t.user), ("assistant", t.reply))
    ]
    last = turns[-1]
    return {
        "skill": skill,
        "messages": messages[:-1],
        "check": last.check,
        "gold": last.reply,
    }


def _last(chat: Chat, skill: str, kind: str) -> Turn:
    if skill == "memory":
        return memory.recall(chat, True, kind)
    if skill == "untold":
        return memory.recall(chat, False, chat.rng.choice(("name", "name", "pet", "colour", "town")))
    makers: dict[str, Skill] = {
        "sums": talk.sums,
        "facts": talk.fact,
        "about": talk.topic,
        "stories": talk.story,
        "unknown": talk.unknown,
    }
    return makers[skill](chat, True)


HELD_OUT_COUNTS = {
    "sums": 100,
    "facts": 90,
    "about": 50,
    "stories": 40,
    "memory": 50,
    "untold": 15,
    "unknown": 45,
}


def held_out_items(seed: int = 7) -> list[dict[str, Any]]:
    """Make the scored prompts, skill by skill."""
    rng, asked = Random(seed), set[tuple[str, str]]()
    items: list[dict[str, Any]] = []
    for skill, n in HELD_OUT_COUNTS.items():
        while sum(i["skill"] == skill for i in items) < n:
            item = held_out_item(rng, skill)
            question = (item["messages"][-1]["content"].lower().strip("?.! "), item["gold"])
            if question not in asked or skill in ("memory", "untold"):
                asked.add(question)
                items.append(item)
    return items


def text_of_size(seed: int, size: int) -> list[dict[str, Any]]:
    """Make conversations of 3 to 20 exchanges, with about this many characters in total."""
    rng, made, total = Random(seed), [], 0
    while total < size:
        messages = some_turns(rng, rng.randint(3, 20))
        total += sum(len(m["content"]) for m in messages)
        made.append({"messages": messages})
    return made


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def main() -> None:
    """Write the three files that tests use."""
    parser = argparse.ArgumentParser(description="write held-out prompts and texts")
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "demo_heldout.jsonl", held_out_items())
    _write(out / "demo_heldout_text.jsonl", text_of_size(1_000_001, 200_000))
    _write(out / "demo_calib.jsonl", text_of_size(1_000_002, 200_000))


if __name__ == "__main__":
    main()
