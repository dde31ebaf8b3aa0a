"""Commands that change the model and its settings: /model /backend /system /set /show /think /stats /context."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from tinychat_mlx import memory_plan
from tinychat_mlx.apps.chat.commands.table import command, one_of
from tinychat_mlx.apps.models import installed
from tinychat_mlx.apps.models.prepare import facts_of, settle
from tinychat_mlx.apps.options import text_or_file
from tinychat_mlx.apps.setting_table import BACKENDS, CHATTING, SAMPLING
from tinychat_mlx.base.errors import TinychatError, UsageError
from tinychat_mlx.base.wording import size

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat

POLICIES: tuple[str, ...] = tuple(CHATTING["on_full"][0].choices)


# model -------------------------------------------------------------------------------------------------
@command(
    "model",
    "[NAME]",
    words=lambda chat, typed: ((m, -len(typed), "") for m in installed.names() if m.startswith(typed)),
)
def model(chat: Chat, name: str) -> None:
    """List the installed models, or switch to one (a folder, a hub id, demo)."""
    if name:
        switch(chat, chat.loading | {"model": name})
        return
    for each in installed.names():
        chat.view.say(f"{'*' if each == chat.loading.get('model') else ' '} {each}")
    chat.view.note("also accepted: a folder with a config.json, or a Hugging Face id")


@command("backend", "[NAME]", words=one_of(*BACKENDS))
def backend(chat: Chat, name: str) -> None:
    """Show the device, or load the model on another backend."""
    if name and name not in BACKENDS:
        raise UsageError(
            f"unknown backend {name!r}", where="/backend", remedy=f"use one of {', '.join(BACKENDS)}"
        )
    if name:
        switch(chat, chat.loading | {"backend": name})
        return
    device = chat.model.device
    chat.view.say(f"{device.backend}: {device.name} ({device.detail}) {chat.view.glyphs.dash} {device.why}")


def switch(chat: Chat, loading: dict[str, Any]) -> None:
    """Load another model, or the same on another device. The conversation continues. On failure the old model stays."""
    if chat.load is None:
        raise UsageError("the model cannot be changed here", remedy="start `tinychat chat -m MODEL`")
    before, freed = chat.loading, chat.model.nbytes
    # downloads, asks and converts before the old model is unloaded
    name = settle(loading, chat.view.note, freed)
    both = True
    if name != "demo" and (found := facts_of(name, loading)):
        backend, asked = memory_plan.chosen(loading), loading.get("context")
        chat.view.note(memory_plan.describe(found, backend, asked, freed))
        memory_plan.context_for(found, backend, asked, lambda text: None, freed)
        both = memory_plan.fits(found, backend, asked)
    chat.model.keep(whole=True)
    if not both:  # the old one must be unloaded first
        del chat.model
        chat.last = None
        gc.collect()
    try:
        chat.model = chat.load(loading, freed if both else 0)
        chat.loading = loading
        chat.session.set_model(loading["model"])
    except (TinychatError, OSError, KeyboardInterrupt):
        if not both:
            chat.model = chat.load(before, 0)
        chat.used = chat.model.context_used
        raise
    chat.used = 0
    chat.view.header(chat.model)
    chat.prime()


# settings ----------------------------------------------------------------------------------------------
@command("system", "[TEXT|@FILE|none]")
def system(chat: Chat, text: str) -> None:
    """Show or change the system prompt."""
    if text:
        chat.session.set_system("" if text == "none" else text_or_file(text) or "")
    chat.view.note(f"system prompt: {chat.session.system or 'none'}")


def _settings(chat: Chat, typed: str) -> Iterable[tuple[str, int, str]]:
    name, space, value = typed.partition(" ")
    if not space:
        choices = {n: text for n, (_, text) in SAMPLING.items()} | {"on_full": "When the context is full."}
        yield from ((n, -len(typed), text) for n, text in choices.items() if n.startswith(name))
    elif name == "on_full":
        yield from one_of(*POLICIES)(chat, value)


@command("set", "NAME VALUE", words=_settings)
def set_(chat: Chat, text: str) -> None:
    """Change a setting (temperature, top_p, seed, max_tokens, on_full …); the value "default" resets it."""
    name, _, value = text.replace("=", " ").partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name not in (*SAMPLING, "stop", "on_full") or not value:
        raise UsageError(
            "it needs a name and a value" if not value else f"unknown setting {name!r}",
            where="/set",
            remedy=f"write /set NAME VALUE, with NAME one of {', '.join([*SAMPLING, 'stop', 'on_full'])}",
        )
    if name == "on_full":
        if value not in POLICIES:
            raise UsageError(
                f"unknown value {value!r}", where="/set on_full", remedy=f"use one of {', '.join(POLICIES)}"
            )
        chat.settings.on_full = value
    elif value == "default":
        chat.settings.sampling.pop(name, None)
    elif name == "stop":
        chat.settings.sampling["stop"] = (value,)
    else:
        try:
            chat.settings.sampling[name] = SAMPLING[name][0].convert(value, None, None)
        except click.BadParameter as e:
            raise UsageError(
                e.message.rstrip("."), where=f"/set {name}", remedy="give another value"
            ) from None
    chat.origins[name] = "/set"
    show(chat, name)


@command("show")
def show(chat: Chat, only: str) -> None:
    """Show the settings and the source of each."""
    given, file = chat.settings.sampling, chat.model.generation_config
    rows: list[tuple[str, object, str]] = []
    for name in [*SAMPLING, "stop"]:
        if name in given:
            rows.append((name, given[name], chat.origins.get(name, "flag")))
        else:
            rows.append((name, getattr(chat.model.defaults, name), "model" if name in file else "built in"))
    rows.append(("on_full", chat.settings.on_full, chat.origins.get("on_full", "built in")))
    if not only:
        rows = [("model", chat.model.name, ""), ("system", chat.session.system or None, ""), *rows]
    for name, value, origin in rows:
        if only in ("", name):
            shown = "unset" if value in (None, ()) else value
            chat.view.say(Text(f"  {name:<20}{shown}").append(f"  ({origin})" if origin else "", "dim"))


@command("think", "[on|off|show|hide|budget N]", words=one_of("on", "off", "show", "hide", "budget "))
def think(chat: Chat, text: str) -> None:
    """Turn thinking on or off, show or fold thoughts, or limit their length."""
    word, _, rest = text.partition(" ")
    s = chat.settings
    if word in ("on", "off"):
        s.think = word == "on"
    elif word in ("show", "hide"):
        s.unfold = word == "show"
    elif word == "budget" and rest.isdecimal():
        s.budget = int(rest)
    elif word:
        raise UsageError(
            f"unknown argument {word!r}",
            where="/think",
            remedy="use on, off, show, hide, or budget N (tokens; 0 is no limit)",
        )
    state = {None: "by the model's default", True: "on", False: "off"}[s.think]
    bound = f"at most {s.budget:,} tokens" if s.budget else "no limit"
    chat.view.note(f"thinking {state}, {'shown' if s.unfold else 'folded'}, {bound}")


# statistics --------------------------------------------------------------------------------------------
@command("stats")
def stats(chat: Chat, _: str) -> None:
    """Show the speed of this conversation's answers, and the memory in use."""
    answers = [m for m in chat.session.messages if m.get("tokens")]
    held, view = chat.model.memory(), chat.view
    if answers:
        tokens = sum(m["tokens"] for m in answers)
        seconds = sum(m["tokens"] / m["decode_tok_s"] for m in answers if m.get("decode_tok_s"))
        first = sorted(m["ttft_s"] for m in answers)[len(answers) // 2]
        view.say(f"  answers         {len(answers)}, {tokens:,} tokens")
        view.say(f"  speed           {tokens / seconds if seconds else 0:.1f} tok/s on average")
        view.say(f"  first token     {first:.2f} s (median)")
    if chat.last is not None and chat.last.stats is not None:
        s = chat.last.stats
        view.say(f"  last prompt     {s.prompt_tokens:,} tokens, {s.cached_tokens:,} of them reused")
        view.say(f"  prefill         {s.prefill_tok_s:.0f} tok/s")
    view.say(f"  weights         {size(chat.model.nbytes)}")
    if held.used:
        limit = f" of {size(held.limit)}" if held.limit else ""
        view.say(f"  memory          {size(held.used)} now, peak {size(held.peak)}{limit}")


@command("context")
def context(chat: Chat, _: str) -> None:
    """Show the tokens of each message in the context."""
    view, most = chat.view, chat.model.context
    messages = chat.session.for_model()
    counts = [len(chat.model.tokenizer.encode(m["content"], special=False)) for m in messages]
    for message, count in zip(messages, counts, strict=True):
        flat = " ".join(message["content"].split())
        room = max(10, view.terminal.width - 30)
        view.say(Text(f"  {count:>7,}  {message['role']:<10}").append(flat[:room], "dim"))
    view.say(view.meter(max(chat.used, sum(counts)), most, 20))
    what = {
        "stop": "an answer that does not fit is cut, with a note",
        "slide": "the oldest messages are dropped, with a note",
        "compact": "earlier messages are summarised",
    }
    view.note(f"when it is full: {what[chat.settings.on_full]} (/set on_full)")
