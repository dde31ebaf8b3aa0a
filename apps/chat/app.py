"""A conversation with the user: the model, the session, answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat_mlx.apps.chat import attach
from tinychat_mlx.apps.chat.answer import Answer
from tinychat_mlx.apps.chat.commands.compact import compact
from tinychat_mlx.apps.chat.prompt import Fragments
from tinychat_mlx.apps.chat.session import Message, Session
from tinychat_mlx.apps.chat.settings import ChatSettings
from tinychat_mlx.apps.chat.view import View, colour_of
from tinychat_mlx.base.errors import ContextFullError, TinychatError
from tinychat_mlx.base.wording import size

if TYPE_CHECKING:
    from tinychat_mlx.loaded_model import Model

COMPACT_AT = 0.85  # share of the context at which the policy "compact" summarises


class Chat:
    """A model, a conversation and a view.

    `loading` holds the options of the loaded model (model, backend, exact, threads, context). `load` loads another one;
    its second argument is the number of bytes that unloading the present one frees.
    """

    def __init__(
        self,
        model: Model,
        view: View,
        session: Session,
        settings: ChatSettings,
        data: Path | None = None,
        loading: dict[str, Any] | None = None,
        load: Callable[[dict[str, Any], int], Model] | None = None,
    ) -> None:
        self.model, self.view, self.session, self.settings, self.data = model, view, session, settings, data
        self.loading, self.load = loading or {}, load
        self.origins: dict[str, str] = {}  # setting -> source of its value
        self.used = 0  # tokens of the conversation in the context
        self.prefill = ""  # initial text of the next prompt
        self.attached: list[attach.Attachment] = []
        self.hints = 0
        self.last: Answer | None = None
        self.priming: threading.Thread | None = None

    def go_to(self, session: Session) -> None:
        """Switch to another conversation."""
        self.model.keep(whole=True)
        self.session, self.used, self.attached, self.last = session, 0, [], None

    def recall(self) -> None:
        """Show a resumed conversation's size and last exchange."""
        messages = self.session.messages
        if not messages:
            return
        self.view.note(f"resumed: {self.session.name} ({len(messages)} messages)")
        at = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        for message in messages[at:]:
            if message["role"] == "user":
                self.view.say(f"{self.view.glyphs.prompt}{message['content']}")
            else:
                self.view.replay(message["content"])
        self.view.say()

    # answers ----------------------------------------------------------------------------------------
    def ask(self, text: str) -> None:
        """Send a message and show the answer. A message that cannot be answered returns to the prompt."""
        content, found = attach.expand(text, self.attached)
        for each in found:
            self.view.note(f"attached {each.describe()}")
        if self.settings.on_full == "compact" and self.used > COMPACT_AT * self.model.context:
            compact(self)
        self.session.add({"role": "user", "content": content})
        try:
            self.answer()
        except KeyboardInterrupt:  # before the answer began, or a second Ctrl-C
            self._take_back(text)
            raise
        except TinychatError as e:
            self._take_back(text)
            if (
                not isinstance(e, ContextFullError)
                or self.settings.on_full != "compact"
                or not self.session.messages
            ):
                raise
            compact(self)
            self.prefill = ""
            self.session.add({"role": "user", "content": content})
            self.answer()
        self.attached = []

    def _take_back(self, text: str) -> None:
        if self.session.messages and self.session.messages[-1]["role"] == "user":
            self.session.keep(len(self.session.messages) - 1)
            self.prefill = text

    def answer(self) -> None:
        """Generate an answer to the last message."""
        self._wait_primed()
        self.last = Answer(self.model, self.view, self.session, self.settings)
        try:
            self.last.run()
        finally:
            stats = self.last.stats
            self.used = stats.context_used if stats else self.model.context_used
            self.model.keep()

    def prime(self) -> None:
        """Restore the computed state of a resumed conversation in the background."""
        self._wait_primed()
        messages, template = self.session.for_model(), self.settings.template
        if messages:
            args = (self.model, messages, template)
            self.priming = threading.Thread(target=_prime, args=args, daemon=True)
            self.priming.start()

    def _wait_primed(self) -> None:
        """Wait for the background restore: running it with an answer would rewind the cache."""
        if self.priming is not None:
            self.priming.join()

    def toolbar(self) -> Fragments:
        """Return the toolbar: model, backend, speed, use of the context, memory."""
        g, most = self.view.glyphs, self.model.context
        share, held = self.used / most, self.model.memory().used
        stats = self.last.stats if self.last else None
        speed = f"{stats.decode_tok_s:.0f} tok/s, first {stats.ttft_s:.2f} s{g.dot}" if stats else ""
        if self.view.terminal.width < 80:
            speed = ""
        return [
            ("", f" {self.model.name}{g.dot}{self.model.device.backend}{g.dot}{speed}"),
            (f"fg:ansi{colour_of(share)}", f"{self.used:,} / {most:,} {share:.0%}"),
            ("", f"{g.dot}{size(held)}" if held else ""),
        ]


def _prime(model: Model, messages: list[Message], template: dict[str, Any]) -> None:
    with suppress(TinychatError, OSError):  # costs only time; the next answer reports the error
        model.prime(messages, template)
