"""`tinychat run`: answer one prompt, for people and for programs.

    tinychat run "why is the sky blue?"
    git diff | tinychat run "a commit message for this"
    tinychat run --json --temperature 0 "2 + 2"

stdout has only the answer (or, with --json, one JSON object); everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx.apps.options import load_model, model_options, sampling, sampling_options, text_or_file
from tinychat_mlx.apps.terminal import detect, safe

if TYPE_CHECKING:
    from tinychat_mlx.engine.engine import Event, Stats
    from tinychat_mlx.loaded_model import Model


@click.command()
@click.argument("prompt", nargs=-1)
@model_options
@click.option("--system", envvar="TINYCHAT_SYSTEM", metavar="TEXT", help="System prompt, or @FILE.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with the answer and its statistics.")
@click.option("-v", "--verbose", is_flag=True, help="Model, device and speed on stderr.")
@sampling_options
def run(prompt: tuple[str, ...], raw: bool, as_json: bool, verbose: bool, **options: Any) -> None:
    """Answer PROMPT. Text from a pipe is appended to it; "-" means only that text."""
    text, system = gather(prompt), text_or_file(options["system"])
    model = load_model(options, lambda note: click.echo(note, err=True))
    if verbose:
        device = model.device
        click.echo(
            f"{model.name} on {device.backend}: {device.name} ({device.detail}) {device.why}".strip(),
            err=True,
        )
    events = ask(model, text, system, raw, sampling(options))
    answer, stats = collect(events) if as_json else show(events)
    if as_json:
        click.echo(
            json.dumps(
                {"text": answer, **asdict(stats), "model": model.name, "backend": model.device.backend}
            )
        )
    elif stats.finish_reason in ("length", "context"):
        limit = (
            "--max-tokens"
            if stats.finish_reason == "length"
            else f"the context of {stats.context_max} tokens"
        )
        click.echo(f"note: the answer was cut at {limit}", err=True)
    if verbose:
        click.echo(
            f"{stats.prompt_tokens} + {stats.completion_tokens} tokens, first after {stats.ttft_s:.2f} s, "
            f"{stats.decode_tok_s:.1f} tok/s",
            err=True,
        )


def gather(words: tuple[str, ...]) -> str:
    """Return the prompt and the piped text with a blank line between. Raises a usage error if both are empty."""
    given = " ".join(w for w in words if w != "-").strip()
    piped = sys.stdin.read().strip() if "-" in words or _is_piped(needed=not given) else ""
    text = "\n\n".join(part for part in (given, piped) if part)
    if not text:
        raise click.UsageError("nothing to answer: give a PROMPT, or pipe text in")
    return text


def _is_piped(needed: bool) -> bool:
    """Whether to read stdin. If a prompt is given, only pipes and files are read: they are sure to end."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no stdin, or not a real file (in tests)
        return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or (needed and not sys.stdin.isatty())


def ask(model: Model, text: str, system: str | None, raw: bool, params: dict[str, Any]) -> Iterator[Event]:
    if raw:
        return model.generate(text, **params)
    messages = [{"role": "system", "content": system}] if system else []
    return model.chat([*messages, {"role": "user", "content": text}], **params)


def collect(events: Iterator[Event]) -> tuple[str, Stats]:
    """Return the whole answer and its statistics."""
    pieces, stats = [], None
    for event in events:
        pieces.append(event.text)
        stats = event.stats or stats
    assert stats is not None, "the last event carries the statistics"
    return "".join(pieces), stats


def show(events: Iterator[Event]) -> tuple[str, Stats]:
    """Write the answer as it is generated. A terminal gets no control characters, a pipe gets every byte."""
    clean = safe if detect().interactive or sys.stdout.isatty() else str

    def echoed() -> Iterator[Event]:
        for event in events:
            if event.text:
                sys.stdout.write(clean(event.text))
                sys.stdout.flush()
            yield event

    try:
        answer, stats = collect(echoed())
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        raise
    if not answer.endswith("\n"):
        sys.stdout.write("\n")
    return answer, stats
