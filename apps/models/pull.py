"""`tinychat models pull`: query the hub, compare with the local files and the disk, download, verify."""

from __future__ import annotations

from pathlib import Path

from tinychat_mlx import hub
from tinychat_mlx.apps.models.download import download, note
from tinychat_mlx.base.errors import ConfigError, TinychatError, UsageError
from tinychat_mlx.base.wording import size
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint


def pull(name: str, verify: bool, quiet: bool) -> Path:
    """Return the folder of a complete and verified model. Raises a TinychatError."""
    ref = hub.parse(name)
    if ref is None:
        raise UsageError("not a Hugging Face id", where=name, remedy="give ORG/NAME, or ORG/NAME@REVISION")
    say = (lambda text: None) if quiet else note
    if hub.is_offline() and (folder := hub.cached(ref)):
        say(f"{ref} is installed; updates were not checked, because HF_HUB_OFFLINE is set")
    else:
        remote = hub.look(ref, note)
        say(_plan(remote))
        folder = download(remote, verify, quiet)
    try:
        parse_config(Checkpoint.open(folder).config)
    except ConfigError as error:  # complete, but not supported
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
        return f"{remote.ref} is installed and up to date (commit {remote.commit[:8]}, {size(remote.nbytes)})"
    begun = remote.nbytes - remote.missing
    here = f", {size(begun)} already downloaded" if begun else ""
    return (
        f"{remote.ref}: {len(remote.files)} files, {size(remote.nbytes)}{here}; commit {remote.commit[:8]} -> "
        f"{hub.repo_folder(remote.ref.repo)}"
    )
