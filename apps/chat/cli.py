"""`tinychat chat`: options -> a model, a conversation, a chat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx.apps.options import load_model, model_options, sampling, sampling_options, text_or_file
from tinychat_mlx.apps.terminal import detect

if TYPE_CHECKING:
    from pathlib import Path

    from tinychat_mlx.apps.chat.view import View


@click.command()
@model_options
@click.option("--system", envvar="TINYCHAT_SYSTEM", metavar="TEXT", help="System prompt, or @FILE.")
@click.option(
    "--on-full",
    type=click.Choice(["stop", "slide"]),
    default="stop",
    envvar="TINYCHAT_ON_FULL",
    help="When the context is full: stop and say so, or forget the oldest messages (and say so).",
)
@click.option("--plain", is_flag=True, envvar="TINYCHAT_PLAIN", help="No colour, no Markdown, no redraws.")
@click.option(
    "--no-save", is_flag=True, envvar="TINYCHAT_NO_SAVE", help="Keep this chat and its prompts off the disk."
)
@sampling_options
def chat(plain: bool, no_save: bool, on_full: str, **options: Any) -> int:
    """Chat with a model. /help inside lists the commands."""
    system = text_or_file(options["system"]) or ""
    terminal = detect(plain)
    notice(f"loading {options['model']} {terminal.glyphs.ellipsis}", terminal.live)
    try:
        model = load_model(options)
    finally:
        notice("", terminal.live)
    from tinychat_mlx.apps.chat.app import Chat, Settings
    from tinychat_mlx.apps.chat.session import Session
    from tinychat_mlx.apps.chat.view import View

    view = View(terminal)
    data = None if no_save else open_data(view)
    settings = Settings(sampling(options), on_full)
    return Chat(model, view, Session.new(data, model.name, system), settings, data).run()


def notice(text: str, live: bool) -> None:
    """A passing word in the current row."""
    if live:
        sys.stdout.write(f"\r{text}\x1b[K\r" if text else "\r\x1b[K")
        sys.stdout.flush()


def open_data(view: View) -> Path | None:
    """The folder for chats and history; a chat must work where nothing can be written."""
    from tinychat_mlx.apps.chat.session import data_folder

    try:
        return data_folder()
    except OSError as e:
        view.warn(f"this chat is not saved: {e}")
        return None
