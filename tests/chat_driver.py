"""The real chat program with a scripted model, for tests/test_chat.py.

    python tests/chat_driver.py SCRIPT.json [tinychat arguments …]

SCRIPT.json: {"answers": ["…", …], "delay": seconds per piece, "piece": letters per piece, "context": tokens,
"load": seconds}. Answers are given in turn, then again from the first. "{echo}" in an answer is replaced by
the last message. A token of this model is a piece.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tinychat_mlx
from tinychat_mlx.backend import Device, Memory
from tinychat_mlx.errors import ContextFullError, ModelNotFoundError
from tinychat_mlx.generate import Event, Stats
from tinychat_mlx.sampler import from_generation_config


class ScriptedModel:
    """A model that answers from a script through the interface of `tinychat_mlx.model.Model`."""

    architecture, quantization, nbytes = "llama", "int4 g128", 7_100_000

    def __init__(self, script: dict[str, Any], name: str = "scripted", backend: str = "cpu") -> None:
        self.script, self.name, self.context = script, name, script.get("context", 2048)
        self.device = Device(backend, "Test CPU", "scalar, 1 thread", "no Apple or NVIDIA GPU found")
        self.engine = SimpleNamespace(ids=[])
        self.turn = 0
        self.answer_ids: list[int] = []
        self.asked: list[Any] = []
        self.generation_config = {"temperature": 0.6}
        self.defaults = from_generation_config(self.generation_config)
        opened = "<think>" if script.get("template_thinks") else ""
        self.tokenizer = SimpleNamespace(
            encode=lambda text, **_: text.split(),
            render=lambda messages, **_: "".join(m["content"] for m in messages) + opened,
        )

    @property
    def context_used(self) -> int:
        return len(self.engine.ids)

    def keep_in(self, folder: Path, exact: bool = False, limit: int = 0) -> None: ...

    def keep(self, whole: bool = False) -> None: ...

    def prime(self, messages: list[dict[str, Any]], template: dict[str, Any] | None = None) -> None: ...

    def memory(self) -> Memory:
        return Memory(12_000_000, 12_000_000, 0)

    def chat(self, messages: list[dict[str, Any]], **settings: Any) -> Iterator[Event]:
        self.asked.append((messages, settings))
        if log := self.script.get("log"):
            with open(log, "a") as f:
                f.write(json.dumps({"messages": messages, **settings}) + "\n")
        prompt = sum(len(m["content"].split()) + 1 for m in messages)
        dropped = 0
        while settings.get("on_full") == "slide" and prompt >= self.context and len(messages) > 2:
            messages, dropped = messages[2:], dropped + 2
            prompt = sum(len(m["content"].split()) + 1 for m in messages)
        if prompt >= self.context:
            raise ContextFullError(f"the prompt has {prompt} tokens", remedy="shorten it")
        return self._answer(messages[-1]["content"], prompt, dropped, settings.get("max_tokens"))

    def generate(self, prompt: list[str], **settings: Any) -> Iterator[Event]:
        self.asked.append((prompt, settings))
        return self._answer(" ".join(prompt), len(prompt))

    def _answer(self, last: str, prompt: int, dropped: int = 0, most: int | None = None) -> Iterator[Event]:
        script, start = self.script, time.perf_counter()
        answers = script.get("answers", ["{echo}"])
        text = answers[self.turn % len(answers)].replace("{echo}", last)
        self.turn += 1
        self.engine.ids = list(range(prompt))
        chunks = script.get("prefill_chunks", 1)
        for chunk in range(chunks):
            time.sleep(script.get("prefill", 0) / chunks)
            yield Event("prefill", done=prompt * (chunk + 1) // chunks, total=prompt)
        n, count = script.get("piece", 4), 0
        first = time.perf_counter() - start
        reason = "stop"
        for at in range(0, len(text), n):
            if len(self.engine.ids) >= self.context:
                reason = "context"
                break
            if most is not None and count >= most:
                reason = "length"
                break
            yield Event("text", text[at : at + n])
            self.engine.ids.append(0)
            count += 1
            time.sleep(script.get("delay", 0))
        yield Event(
            "end",
            stats=Stats(
                prompt, 0, count, first, 100.0, 50.0, len(self.engine.ids), self.context, reason, dropped
            ),
        )


def loader(script: dict[str, Any]) -> Any:
    """Return a `tinychat_mlx.load` that gives the scripted model for every name but "missing"."""

    def load(model: str, backend: str = "auto", **_: Any) -> ScriptedModel:
        time.sleep(script.get("load", 0))
        if model == "missing":
            raise ModelNotFoundError("no such folder", where="missing", remedy="check the path")
        return ScriptedModel(
            script, "scripted" if model == "demo" else model, "cpu" if backend == "auto" else backend
        )

    return load


def main() -> int:
    tinychat_mlx.load = loader(json.loads(Path(sys.argv[1]).read_text()))
    from tinychat_mlx.apps.cli import main as run

    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
