"""Resolve a hub id to a model folder: installed, downloaded, or converted if the user agrees.

A 16-bit model is converted to int4 on request. The result is stored in `places.conversions()`, and the id refers to it
from then on. ORG/NAME@main, or any other revision, refers to the original upload.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx import hub, memory_plan
from tinychat_mlx.apps.models.download import download
from tinychat_mlx.apps.terminal import detect
from tinychat_mlx.base import paths
from tinychat_mlx.base.errors import BackendError, ConfigError, FormatError, TinychatError, UsageError
from tinychat_mlx.base.wording import lasting, size

if TYPE_CHECKING:
    from tinychat_mlx.awq.settings import Settings
    from tinychat_mlx.awq.time_estimate import Estimate
    from tinychat_mlx.inspect import ModelInfo

Options = dict[str, Any]
Say = Callable[[str], None]
ASK_FROM = 1e9  # bytes; smaller downloads start without a question
_left_dense: set[str] = set()  # models that the user chose not to convert, in this process


def conversion_folder(ref: hub.Ref) -> Path:
    """Return the path of the int4 form of a hub model, which may not exist."""
    return paths.conversions() / f"{ref.repo.replace('/', '--')}-int4"


def existing_conversion(name: str) -> Path | None:
    """Return the int4 form of a hub id if it exists. Never uses the network."""
    ref = _plain_ref(name)
    folder = conversion_folder(ref) if ref else None
    return folder if folder and (folder / "config.json").exists() else None


def _plain_ref(name: str) -> hub.Ref | None:
    """Parse a hub id without a revision. Return None for others and for local folders."""
    return None if "@" in name or Path(name).expanduser().is_dir() else hub.parse(name)


def settle(options: Options, say: Say, freed: int = 0) -> str:
    """Return what to load for options["model"]: its own name, or the folder of its conversion.

    Downloads, asks and converts by options["convert"] (ask, always, never). freed: bytes of a model that will be unloaded.
    Raises a TinychatError if something is missing or does not fit.
    """
    name = str(options["model"])
    ref = None if name == "demo" or Path(name).expanduser().is_dir() else hub.parse(name)
    if ref is None:
        return name
    if folder := existing_conversion(name):
        return str(folder)
    if hub.cached(ref) is None:
        _fetch(ref, options, say, freed)
    foreign = options.get("engine") == "mlx-lm"  # tinychat cannot convert its architectures
    if foreign or "@" in name or options.get("convert") == "never" or name in _left_dense:
        return name
    return _offer(ref, options, say, freed)


def facts_of(name: str, options: Options) -> ModelInfo | None:
    """Return the facts of an installed model. None: not installed, or only mlx-lm can read it. Raises TinychatError."""
    from tinychat_mlx import inspect
    from tinychat_mlx.open import at_hand

    folder = at_hand(name)
    if folder is None:
        return None
    try:
        return inspect.local(name, folder)
    except TinychatError:
        if options.get("engine") != "mlx-lm":
            raise
        return None


def _fetch(ref: hub.Ref, options: Options, say: Say, freed: int) -> None:
    """Download a model, after checking that it runs here, fits in memory and fits on the disk."""
    from tinychat_mlx import inspect

    remote = hub.look(ref, say)
    found = inspect.remote(remote, say)
    if found.trouble and options.get("engine") != "mlx-lm":
        raise ConfigError(
            f"this model cannot run here: {found.trouble.problem}", where=ref, remedy=found.trouble.remedy
        )
    hub.check_room(remote)
    backend = memory_plan.chosen(options)
    asked = options.get("context")
    say(f"{memory_plan.describe(found, backend, asked, freed, remote.missing)}, {found.quantization}")
    if not may_convert(ref, found, options):
        memory_plan.context_for(found, backend, asked, lambda text: None, freed)
    if remote.missing > ASK_FROM and detect().interactive and _key("download it?", "Yn") == "n":
        raise UsageError("the download was declined", where=ref, remedy="answer yes, or choose another model")
    download(remote)


def may_convert(ref: hub.Ref, found: ModelInfo, options: Options) -> bool:
    """Whether an int4 form is possible and allowed. Then a model that is too large as uploaded may be downloaded."""
    wanted = options.get("convert") == "always" or (options.get("convert") == "ask" and detect().interactive)
    return wanted and ref.revision == "main" and found.dense and int4_settings(found) is not None


def int4_settings(found: ModelInfo) -> Settings | None:
    """Return the settings of a conversion, None if it is not possible."""
    from tinychat_mlx.awq.settings import Settings

    if found.config is None or not found.dense:
        return None
    try:
        return Settings().resolved(found.config)
    except FormatError:  # a matrix that no group size divides
        return None


def _offer(ref: hub.Ref, options: Options, say: Say, freed: int) -> str:
    """Convert a dense model if the user agrees -> what to load."""
    from tinychat_mlx import inspect

    folder = hub.cached(ref)
    assert folder is not None, "it was fetched"
    found = inspect.local(str(ref), folder)
    settings = int4_settings(found)
    if settings is None:
        return str(ref)
    if options["convert"] == "always":
        return _convert(ref, folder, settings, options, say)
    if not detect().interactive:
        how = (
            f"to convert it to int4 once, repeat the command with --convert always ({conversion_folder(ref)})"
        )
        backend, asked = memory_plan.chosen(options), options.get("context")
        if not memory_plan.fits(found, backend, asked, freed):
            raise BackendError(memory_plan.describe(found, backend, asked, freed), remedy=how)
        say(f"note: {ref} is in {found.quantization}; {how}")
        return str(ref)
    return _ask(ref, folder, found, settings, options, say, freed)


def _ask(
    ref: hub.Ref, folder: Path, found: ModelInfo, settings: Settings, options: Options, say: Say, freed: int
) -> str:
    from tinychat_mlx.apps.models.int4_plan import as_int4
    from tinychat_mlx.awq.resources import shortage

    say(f"{ref} is in {found.quantization}: estimating a conversion to int4")
    plan = _estimate(folder, settings, options)
    backend, asked = memory_plan.chosen(options), options.get("context")
    fits = (
        "the original fits, too"
        if memory_plan.fits(found, backend, asked, freed)
        else "the original does not fit"
    )
    tokens = memory_plan.usual(found, asked)
    small, large = (memory_plan.cost(f, backend).peak(tokens) for f in (as_int4(found, settings), found))
    say(
        f"as int4: {size(small)} instead of {size(large)} of memory with a context of {tokens:,} tokens ({fits}), and "
        f"{size(plan.result_bytes)} instead of {size(found.nbytes)} to read per token. Converting takes about "
        f"{lasting(plan.seconds)}, {size(plan.peak_bytes)} of memory, {size(plan.disk_bytes)} of disk; the result goes to "
        f"{conversion_folder(ref)}"
    )
    if trouble := shortage(plan, conversion_folder(ref)):
        say(f"{trouble}: using the original")
        return str(ref)
    answer = _key("convert it? yes, no, always", "Yna")
    if answer == "n":
        _left_dense.add(str(ref))
        return str(ref)
    if answer == "a":
        options["convert"] = "always"
        remember(say)
    return _convert(ref, folder, settings, options, say)


def _estimate(folder: Path, settings: Settings, options: Options) -> Estimate:
    from tinychat_mlx.awq.time_estimate import estimate
    from tinychat_mlx.weights.checkpoint import Checkpoint

    return estimate(Checkpoint.open(folder), settings, lambda exact: _backend(options, exact))


def _backend(options: Options, exact: bool) -> Any:
    from tinychat_mlx.open import choose, create

    return create(choose(options["backend"])[0], exact, options.get("threads"))


def _convert(ref: hub.Ref, folder: Path, settings: Settings, options: Options, say: Say) -> str:
    """Quantise into `places.conversions()`, resuming an interrupted attempt -> the folder."""
    from dataclasses import replace

    from tinychat_mlx.apps.conversion_progress import Screen
    from tinychat_mlx.awq.calibration.tokens import calibration_ids
    from tinychat_mlx.awq.convert import convert
    from tinychat_mlx.awq.parallel import limited
    from tinychat_mlx.weights.checkpoint import Checkpoint

    target = conversion_folder(ref)
    screen = Screen(quiet=False)
    try:
        with screen.bar, limited(options.get("threads")):
            made = convert(
                Checkpoint.open(folder), target, settings, lambda exact: _backend(options, exact), calibration_ids,
                lambda p: screen.show(replace(p, layer=None, note="")), resume=True,
            )  # fmt: skip
    except KeyboardInterrupt:
        say("stopped: finished layers are kept; repeat the command and answer yes to resume")
        raise
    say(
        f"{ref} as int4: {size(made.nbytes)} in {target}; the download stays (`tinychat models rm {ref}` frees it)"
    )
    return str(target)


def remember(say: Say) -> None:
    """Write convert = "always" as the first line of the config file."""
    from tinychat_mlx.apps.config_file import config_path

    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        fresh = path.with_name(path.name + ".partial")
        fresh.write_text(
            'convert = "always"  # convert 16-bit models to int4 without asking\n' + old, encoding="utf-8"
        )
        fresh.replace(path)
    except OSError as error:
        say(f"note: this answer could not be saved in {path}: {error.strerror}")
        return
    say(f'convert = "always" is now in {path}')


def _key(question: str, keys: str) -> str:
    """Ask on the terminal for one key; Enter selects the capital one. Raises KeyboardInterrupt."""
    click.echo(f"{question} [{'/'.join(keys)}] ", err=True, nl=False)
    default = next(k for k in keys if k.isupper()).lower()
    while True:
        pressed = click.getchar().lower()
        if pressed in ("\r", "\n"):
            pressed = default
        if pressed in keys.lower() and len(pressed) == 1:
            click.echo(pressed, err=True)
            return pressed
        if pressed in (
            "\x03",
            "\x04",
            "\x1b",
            "",
        ):  # Ctrl-C where the terminal makes no signal of it, Ctrl-D, Esc
            click.echo(err=True)
            raise KeyboardInterrupt
