"""One conversation with a person: read, answer, again, until they leave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from tinychat_mlx.apps.chat import commands
from tinychat_mlx.apps.chat.prompt import Fragments, Reader, make_reader
from tinychat_mlx.apps.chat.session import Message, Session
from tinychat_mlx.apps.chat.view import View, colour_of, size
from tinychat_mlx.apps.terminal import quiet_keys
from tinychat_mlx.errors import ContextFullError, TinychatError

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.stream import MarkdownAnswer, PlainAnswer
    from tinychat_mlx.generate import Event, Stats
    from tinychat_mlx.model import Model

PATIENCE_S = 1.0  # a wait longer than this is explained


@dataclass
class Settings:
    """What shapes the answers, as the flags and /set have it."""

    sampling: dict[str, Any] = field(default_factory=dict)
    on_full: str = "stop"


class Chat:
    """A model, a conversation, a person."""

    def __init__(
        self, model: Model, view: View, session: Session, settings: Settings, data: Path | None = None
    ) -> None:
        self.model, self.view, self.session, self.settings, self.data = model, view, session, settings, data
        self.used = 0  # tokens of the context the conversation takes up
        self.prefill = ""  # what the next prompt begins with
        self.hints = 0

    def run(self) -> int:
        """Talk until the person leaves -> exit code."""
        history = self.data / "history" if self.data else None
        reader = make_reader(self.view.terminal, history, self.complete, self.toolbar)
        self.view.header(self.model)
        with quiet_keys() if self.view.terminal.live else nullcontext():
            while self._turn(reader):
                pass
        return 0

    def _turn(self, reader: Reader) -> bool:
        """One thing typed, and what follows from it -> whether to go on."""
        prefill, self.prefill = self.prefill, ""
        try:
            text = reader.read(prefill)
            if not text.strip():
                return True
            if text.startswith("/") and not text.startswith("//"):
                commands.dispatch(self, text)
            else:
                self.ask(text.removeprefix("/") if text.startswith("//") else text)
        except KeyboardInterrupt:
            self.hints += 1
            more = " (Ctrl-C only stops answers)" if self.hints > 1 else ""
            self.view.note(f"to leave, press Ctrl-D or type /exit{more}")
        except (EOFError, commands.Leave):
            return False
        except (TinychatError, OSError) as e:
            self.view.error(" ".join(str(e).split()))
        return True

    def start_anew(self) -> None:
        self.session = Session.new(self.data, self.model.name, self.session.system)
        self.used = 0

    # answers ----------------------------------------------------------------------------------------
    def ask(self, text: str) -> None:
        """Send a message and show the answer; a message that cannot be answered comes back to the prompt."""
        self.session.add({"role": "user", "content": text})
        try:
            self.answer()
        except ContextFullError:
            self.session.keep(len(self.session.messages) - 1)
            self.prefill = text
            raise

    def answer(self) -> None:
        """Let the model answer the last message; Ctrl-C ends the answer and keeps what was said."""
        started, shown, said = time.perf_counter(), self.view.answer(), Said()
        interrupt, waiting = Interrupt(), Waiting(shown)
        with interrupt, waiting:
            events = self.model.chat(
                self.session.for_model(), on_full=self.settings.on_full, **self.settings.sampling
            )
            try:
                for event in _until(interrupt, events):
                    waiting.see(event)
                    self._take(event, said, shown)
            finally:
                events.close()  # type: ignore[attr-defined]  # a generator; cancels within one token
                waiting.stop()
                shown.finish()
                self._keep(said, interrupt.pressed)
        self._sum_up(said, time.perf_counter() - started)

    def _take(self, event: Event, said: Said, shown: MarkdownAnswer | PlainAnswer) -> None:
        if event.text:
            said.text += event.text
            said.pieces += 1
            self.session.piece(event.text)
            shown.feed(event.text)
        said.stats = event.stats or said.stats

    def _keep(self, said: Said, stopped: bool) -> None:
        """Put what was said into the conversation."""
        self.used = said.stats.context_used if said.stats else len(self.model.engine.ids)
        reason = said.stats.finish_reason if said.stats else "cancelled" if stopped else "error"
        message: Message = {"role": "assistant", "content": said.text, "finish_reason": reason}
        if said.stats:
            message["stats"] = {"ttft_s": said.stats.ttft_s, "decode_tok_s": said.stats.decode_tok_s}
        if said.text or said.stats:
            self.session.add(message)

    def _sum_up(self, said: Said, seconds: float) -> None:
        """The numbers under the answer, and why it ended if not by itself."""
        view, stats = self.view, said.stats
        if stats is None:
            kept = "what was said is kept" if said.text else "nothing was said"
            view.note(f"stopped after {seconds:.1f} s; {kept}")
            return
        view.stats(stats)
        if stats.dropped_messages:
            view.warn(
                f"the context was full: the oldest {stats.dropped_messages} messages are no longer seen by the model"
            )
        if stats.finish_reason == "length":
            view.warn("the answer was cut at max_tokens")
        elif stats.finish_reason == "context":
            view.warn(
                f"the context of {stats.context_max:,} tokens is full, the answer was cut: /clear starts anew"
            )

    # the prompt's furniture -------------------------------------------------------------------------
    def complete(self, before: str) -> Iterable[tuple[str, int, str]]:
        """What may follow the text before the cursor -> (insert, where from, what it is)."""
        if before.startswith("/") and " " not in before:
            for name, c in commands.COMMANDS.items():
                if name.startswith(before[1:]):
                    yield f"/{name}", -len(before), c.help

    def toolbar(self) -> Fragments:
        """Always visible: model, backend, how full the context is, memory."""
        g, most = self.view.glyphs, self.model.context
        share = self.used / most
        held = self.model.memory().used
        return [
            ("", f" {self.model.name}{g.dot}{self.model.device.backend}{g.dot}"),
            (f"fg:ansi{colour_of(share)}", f"{self.used:,} / {most:,} {share:.0%}"),
            ("", f"{g.dot}{size(held)}" if held else ""),
        ]


@dataclass
class Said:
    """An answer in the making."""

    text: str = ""
    pieces: int = 0
    stats: Stats | None = None


def _until(interrupt: Interrupt, events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        if interrupt.pressed and not event.stats:
            return


class Interrupt:
    """Ctrl-C as a flag that the loop looks at, so that it never tears through the engine or a half-drawn row.

    A second Ctrl-C, for an engine that does not come back, interrupts as usual.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGINT, self._press)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class Waiting(threading.Thread):
    """Says what takes so long until the first text comes: how much of the prompt is read, how many seconds."""

    def __init__(self, shown: MarkdownAnswer | PlainAnswer) -> None:
        super().__init__(daemon=True)
        self.shown, self.over, self.progress = shown, threading.Event(), ""

    def __enter__(self) -> None:
        self.started = time.monotonic()
        self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    def run(self) -> None:
        pause = PATIENCE_S
        while not self.over.wait(pause):
            pause = 0.2
            self.shown.status(f"reading the prompt{self.progress} ({time.monotonic() - self.started:.0f} s)")

    def see(self, event: Event) -> None:
        if event.kind == "prefill":
            self.progress = f": {event.done:,} of {event.total:,} tokens"
        elif event.text:
            self.stop()

    def stop(self) -> None:
        """No word is shown after this returns."""
        self.over.set()
        if self.is_alive():
            self.join()
