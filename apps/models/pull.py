"""`tinychat models pull`: ask, compare with what is here and with the disk, fetch, check."""

from __future__ import annotations

from pathlib import Path

from tinychat_mlx import hub
from tinychat_mlx.apps.models.download import download, note
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.errors import ConfigError, TinychatError, UsageError
from tinychat_mlx.words import size


def pull(name: str, verify: bool, quiet: bool) -> Path:
    """-> the folder of a model that is complete and checked. Raises a TinychatError saying what to do."""
    ref = hub.parse(name)
    if ref is None:
        raise UsageError("not a Hugging Face id", where=name, remedy="give ORG/NAME, or ORG/NAME@REVISION")
    say = (lambda text: None) if quiet else note
    if hub.is_offline() and (folder := hub.cached(ref)):
        say(f"{ref} is here; whether the hub has a newer one is not known, HF_HUB_OFFLINE is set")
    else:
        remote = hub.look(ref, note)
        say(_plan(remote))
        folder = download(remote, verify, quiet)
    try:
        parse_config(Checkpoint.open(folder).config)
    except ConfigError as error:  # whole, but not for us
        note(f"note: this model does not run here: {error}")
    except TinychatError as error:
        raise type(error)(
            f"the download is complete, but the uploaded model is not valid: {error.problem}",
            where=ref,
            remedy="use another repository",
        ) from None
    return folder


def _plan(remote: hub.Remote) -> str:
    if not remote.missing:
        return f"{remote.ref} is here and up to date (commit {remote.commit[:8]}, {size(remote.nbytes)})"
    begun = remote.nbytes - remote.missing
    here = f", {size(begun)} of them are here" if begun else ""
    return (
        f"{remote.ref}: {len(remote.files)} files, {size(remote.nbytes)}{here}; commit {remote.commit[:8]} -> "
        f"{hub.repo_folder(remote.ref.repo)}"
    )
