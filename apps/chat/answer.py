"""One answer: generate, show, save and summarise it. Ctrl-C stops the answer, never the program."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat.session import Message, Session
from tinychat_mlx.apps.chat.settings import ChatSettings
from tinychat_mlx.apps.chat.thinking import CLOSE, OPEN, Splitter, Thought
from tinychat_mlx.apps.chat.view import View

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.stream import MarkdownAnswer, PlainAnswer
    from tinychat_mlx.engine.engine import Event, Stats
    from tinychat_mlx.loaded_model import Model

PATIENCE_S = 1.0  # seconds; a longer wait shows a status line


class Answer:
    """The state of an answer while it is generated."""

    def __init__(self, model: Model, view: View, session: Session, settings: ChatSettings) -> None:
        self.model, self.view, self.session, self.settings = model, view, session, settings
        self.shown: MarkdownAnswer | PlainAnswer = view.answer()
        self.text, self.thought = "", ""
        self.thinking: Thought | None = None
        self.thought_tokens = 0
        self.stats: Stats | None = None
        self.stopped = False

    def run(self) -> None:
        """Generate, show and save the answer. Raises the model's errors that occur before the first text."""
        started = time.perf_counter()
        interrupt, waiting = Interrupt(), Waiting(self.shown)
        with interrupt, waiting:
            messages = self.session.for_model()
            on_full = "slide" if self.settings.on_full == "slide" else "stop"
            template, sampling = self.settings.template, self.settings.sampling
            events = self.model.chat(messages, on_full=on_full, template=template, **sampling)
            splitter = Splitter(self._template_opens_thought(messages))
            try:
                if self._follow(events, splitter, interrupt, waiting):
                    self._cut_thought(messages, interrupt, waiting)
            finally:
                self.stopped = interrupt.pressed
                for piece in splitter.flush():
                    self._take(*piece)
                self._end_thought()
                waiting.stop()
                self.shown.finish()
                self._keep()
        self._sum_up(time.perf_counter() - started)

    def _follow(
        self, events: Iterator[Event], splitter: Splitter, interrupt: Interrupt, waiting: Waiting
    ) -> bool:
        """Process events until the end or Ctrl-C -> whether the thought used up its budget."""
        try:
            for event in events:
                waiting.see(event)
                self.stats = event.stats or self.stats
                for piece in splitter.feed(event.text):
                    self._take(*piece)
                if interrupt.pressed and not event.stats:
                    return False
                self.thought_tokens += bool(event.text) and splitter.state == "thought"
                if 0 < self.settings.budget <= self.thought_tokens and splitter.state == "thought":
                    return True
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator; cancels within one token
        return False

    def _take(self, is_thought: bool, text: str) -> None:
        if is_thought:
            if self.thinking is None:
                self.thinking = Thought(self.view, self.settings.unfold)
            self.thought += text
            self.thinking.feed(text)
        else:
            self._end_thought()
            self.text += text
            self.shown.feed(text)
            self.session.piece(text)

    def _end_thought(self) -> None:
        if self.thinking is not None:
            self.thinking.finish()
        self.thinking = None

    def _template_opens_thought(self, messages: list[Message]) -> bool:
        """Whether the template writes the opening tag at the end of the prompt."""
        rendered: str = self.model.tokenizer.render(messages, **self.settings.template)
        return rendered.rstrip().endswith(OPEN)

    def _cut_thought(self, messages: list[Message], interrupt: Interrupt, waiting: Waiting) -> None:
        """Close the thought for the model and let it continue with the answer."""
        self._end_thought()
        self.view.note(f"thinking reached its budget of {self.settings.budget:,} tokens; answering now")
        tokenizer = self.model.tokenizer
        prompt = tokenizer.render(messages, **self.settings.template)
        opened = prompt if prompt.rstrip().endswith(OPEN) else f"{prompt}{OPEN}\n"
        ids = tokenizer.encode(f"{opened}{self.thought.rstrip()}\n{CLOSE}\n\n", special=False)
        self.stats, splitter = None, Splitter()
        splitter.state = "gap"
        self._follow(self.model.generate(ids, **self.settings.sampling), splitter, interrupt, waiting)

    def _keep(self) -> None:
        """Add the answer to the conversation."""
        reason = self.stats.finish_reason if self.stats else "cancelled" if self.stopped else "error"
        message: Message = {"role": "assistant", "content": self.text, "finish_reason": reason}
        if self.thought:
            message["reasoning_content"] = self.thought.strip()
        if self.stats:
            message |= {
                "ttft_s": round(self.stats.ttft_s, 4),
                "decode_tok_s": round(self.stats.decode_tok_s, 2),
            }
            message["tokens"] = self.stats.completion_tokens
        if self.model.answer_ids:
            message["ids"] = self.model.answer_ids
        if self.text or self.stats:
            self.session.add(message)

    def _sum_up(self, seconds: float) -> None:
        """Print the statistics below the answer, and the reason if it did not end normally."""
        view, stats = self.view, self.stats
        if stats is None:
            kept = "the partial answer is saved" if self.text else "there is no answer"
            view.note(f"stopped after {seconds:.1f} s; {kept}")
            view.say()
            return
        view.stats(stats)
        if stats.dropped_messages:
            view.warn(
                f"the context was full: the model no longer sees the oldest {stats.dropped_messages} messages"
            )
        if stats.finish_reason == "length":
            view.warn("the answer was cut at max_tokens")
        elif stats.finish_reason == "context":
            view.warn(
                f"the context of {stats.context_max:,} tokens is full and the answer was cut: "
                "/compact summarises the conversation, /clear empties it"
            )


class Interrupt:
    """Sets a flag on Ctrl-C, so that the engine and the drawing of rows are never interrupted.

    A second Ctrl-C raises KeyboardInterrupt as usual, in case the engine hangs.
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
    """Shows a status line until the first text arrives: the progress of the prefill, and the seconds."""

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
        """Stop the status line. Nothing is drawn after this returns."""
        self.over.set()
        if self.is_alive():
            self.join()
            self.shown.status("")
