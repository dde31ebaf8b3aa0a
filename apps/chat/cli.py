"""`tinychat chat`: load a model and a conversation from the options, and start the chat."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tinychat_mlx.apps.chat.settings import ChatSettings
from tinychat_mlx.apps.options import (
    chat_options,
    load_model,
    model_options,
    origins,
    sampling,
    sampling_options,
    text_or_file,
)
from tinychat_mlx.apps.setting_table import LOADING
from tinychat_mlx.apps.terminal import Terminal, detect, quiet_keys
from tinychat_mlx.base.wording import of_the_system

if TYPE_CHECKING:
    from pathlib import Path

    from tinychat_mlx.apps.chat.session import Session
    from tinychat_mlx.apps.chat.view import View
    from tinychat_mlx.loaded_model import Model


@click.command()
@model_options
@click.option("-c", "--continue", "latest", is_flag=True, help="Resume the latest saved chat.")
@click.option("--session", metavar="NAME", help="Resume a saved chat, by its id or title.")
@chat_options
@sampling_options
@click.pass_context
def chat(
    ctx: click.Context, /, plain: bool, no_save: bool, on_full: str, think: bool | None, **options: Any
) -> int:
    """Chat with a model. Type /help in the chat for its commands."""
    terminal = detect(plain)
    if terminal.interactive and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # shells ignore SIGINT for background jobs; restore it
    with quiet_keys() if terminal.live else nullcontext():
        return open_chat(ctx, terminal, no_save, ChatSettings(sampling(options), on_full, think), options)


def open_chat(
    ctx: click.Context, terminal: Terminal, no_save: bool, settings: ChatSettings, options: dict[str, Any]
) -> int:
    """Load the model, find the conversation, run the chat -> exit code."""
    system = text_or_file(options["system"])
    notice(f"loading {terminal.glyphs.ellipsis}", terminal)
    from tinychat_mlx.apps.chat.app import Chat
    from tinychat_mlx.apps.chat.loop import run
    from tinychat_mlx.apps.chat.session import Session
    from tinychat_mlx.apps.chat.view import View

    view = View(terminal)
    data = None if no_save else open_data(view)
    session = resume(data, options["session"], options["latest"], view)
    asked = ctx.get_parameter_source("model") in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    if session is not None and not asked:
        options["model"] = session.model or options["model"]
    model = load(options, view, save=data is not None)
    session = session or Session.new(data)
    session.set_model(options["model"])
    if system is not None and system != session.system:
        session.set_system(system)
    loading = {name: options[name] for name in LOADING}
    made = Chat(
        model,
        view,
        session,
        settings,
        data,
        loading,
        lambda wanted, freed: load(wanted, view, freed, data is not None),
    )
    made.origins = origins(ctx)
    return run(made)


def load(options: dict[str, Any], view: View, freed: int = 0, save: bool = False) -> Model:
    """Load a model with a progress line. freed: bytes that unloading the present model frees.

    save: store computed keys and values on disk.
    """
    name, dots = options["model"], view.glyphs.ellipsis
    drawn = time.monotonic()

    def say(text: str) -> None:
        notice("", view.terminal)
        view.note(text)
        notice(f"loading {name} {dots}", view.terminal)

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > 0.1:
            drawn = time.monotonic()
            notice(f"loading {name} {dots} {done / max(1, total):.0%}", view.terminal)

    notice(f"loading {name} {dots}", view.terminal)
    try:
        model = load_model(options, say, progress, freed)
        if save:
            keep_prefixes(model, options["exact"])
        return model
    finally:
        notice("", view.terminal)


def keep_prefixes(model: Model, exact: bool) -> None:
    """Keep what is computed of chats, in at most TINYCHAT_PREFIX_MB (1024; 0: not at all). Raises UsageError."""
    from tinychat_mlx.base import disk_cache
    from tinychat_mlx.base.errors import UsageError

    text = os.environ.get("TINYCHAT_PREFIX_MB", "1024")
    if not text.isdecimal():
        raise UsageError(
            f"{text!r} is not a number of megabytes",
            where="TINYCHAT_PREFIX_MB",
            remedy="set it to 0, 1024, …",
        )
    if int(text):
        with suppress(OSError):  # a model whose files have gone is chatted with all the same
            model.keep_in(disk_cache.place("prefixes"), exact, int(text) << 20)


def notice(text: str, terminal: Terminal) -> None:
    """Show a temporary status in the current row."""
    if terminal.live:
        sys.stdout.write(f"\r{text}\x1b[K\r")
        sys.stdout.flush()


def open_data(view: View) -> Path | None:
    """Return the folder of chats and history, or None with a warning if it is not writable."""
    from tinychat_mlx.apps.chat.session import data_folder

    try:
        return data_folder()
    except OSError as e:
        view.warn(f"this chat is not saved: {of_the_system(e)}")
        return None


def resume(data: Path | None, name: str | None, latest: bool, view: View) -> Session | None:
    """Return the saved chat for --session or --continue. Raises UsageError for an unknown name."""
    if not (name or latest):
        return None
    from tinychat_mlx.apps.chat.session import Session, find, saved

    if data is None:
        raise click.UsageError("--continue and --session need saved chats, which --no-save disables")
    if not name and not saved(data):
        view.note("no saved chat yet: starting a new one")
        return None
    return Session.load(find(data, name or "last"))
