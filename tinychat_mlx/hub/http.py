"""HTTP requests to the hub, with retries and plain error messages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

from tinychat_mlx.base.errors import DownloadError, ModelNotFoundError, TinychatError
from tinychat_mlx.hub.cache import Ref

# Pauses in seconds before each retry. Received bytes reset the sequence.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
PATIENCE = 60.0  # seconds; a longer Retry-After is an error
TIMEOUT = 20.0  # seconds without a received byte
PIECE = 1 << 16  # bytes per chunk

Say = Callable[[str], None]


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def login() -> str:
    """Return the command that logs in to the hub, with a full path if it is not in the PATH (venv)."""
    for name, words in (("hf", "auth login"), ("huggingface-cli", "login")):
        if shutil.which(name):
            return f"{name} {words}"
        if found := shutil.which(name, path=os.path.dirname(sys.executable)):
            return f"{shlex.quote(found)} {words}"
    return f"{shlex.quote(sys.executable)} -c 'import huggingface_hub as h; h.login()'"


@contextmanager
def get(ref: Ref, commit: str, path: str, headers: dict[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """GET a file at a commit -> status and its bytes in chunks. Raises the exceptions of the HTTP library."""
    from huggingface_hub import hf_hub_url, utils

    library: Any = utils  # the module does not declare these names as exported
    url = hf_hub_url(ref.repo, path, revision=commit, endpoint=endpoint())
    headers = (
        library.build_hf_headers() | {"Accept-Encoding": "identity"} | headers
    )  # ranges must count uncompressed bytes
    session = library.get_session()
    if callable(session.stream):  # httpx: huggingface_hub 1 and later
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            library.hf_raise_for_status(response)
            yield response.status_code, response.iter_bytes(PIECE)
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            library.hf_raise_for_status(response)
            yield response.status_code, response.iter_content(PIECE)


def patiently(ref: Ref, ask: Callable[[], Any], say: Say, progress: Callable[[], int] = lambda: 0) -> Any:
    """Call `ask`, and retry after temporary errors: a lost connection, a busy hub, a rate limit.

    progress: returns a number that grows as bytes arrive. Growth resets the pauses.
    """
    from huggingface_hub import errors

    exported: Any = errors  # has HTTPError of httpx or of requests, undeclared
    tries, reached = 0, progress()
    while True:
        try:
            return ask()
        except (exported.HTTPError, OSError) as caught:  # exceptions of requests are OSErrors
            error = caught
            if progress() > reached:
                tries, reached = 0, progress()
            pause = _pause(error, tries)
            if pause is None:
                raise explain(error, ref) from None
        if pause >= 1:
            say(f"{_reason(error)}: trying again in {pause:.0f} s")
        time.sleep(pause)
        tries += 1


def _pause(error: Exception, tries: int) -> float | None:
    """Return the seconds to wait before a retry, or None if a retry is useless."""
    status = _status(error)
    if tries >= len(PAUSES) or not (status in (0, 408, 429) or status >= 500):
        return None
    if status == 0 and "ConnectError" in type(error).__name__ and tries:  # no server there: report it soon
        return None
    asked = _retry_after(error)
    return None if asked > PATIENCE else max(asked, PAUSES[tries])


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _retry_after(error: Exception) -> float:
    """Return the seconds that the hub asks to wait: Retry-After (number or date), or t in RateLimit ("api";r=0;t=55)."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = str(headers.get("Retry-After", "")).strip()
    if said.isdecimal():
        return float(said)
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    found = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(found[1]) if found else 0.0


def _reason(error: Exception) -> str:
    status = _status(error)
    if status == 429:
        return "the hub limits requests (429)"
    return (
        f"the hub answers with an error ({status})"
        if status
        else f"the connection failed ({type(error).__name__})"
    )


def explain(error: Exception, ref: Ref) -> TinychatError:
    """Convert an error of huggingface_hub or of the network to a TinychatError with a remedy."""
    from huggingface_hub import errors, get_token

    page, status = f"{endpoint()}/{ref.repo}", _status(error)
    if isinstance(error, errors.GatedRepoError):
        how = "" if get_token() else f", log in with `{login()}` (or set HF_TOKEN)"
        return ModelNotFoundError(
            "this model is gated", where=ref, remedy=f"accept its terms on {page}{how}, and try again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"there is no revision {ref.revision!r}", where=ref.repo, remedy=f"choose one of those on {page}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            "no such model on the hub, or it is private",
            where=ref.repo,
            remedy=f"check the name on {page}" + ("" if get_token() else f", or log in with `{login()}`"),
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DownloadError("a file that the hub lists does not exist", where=ref, remedy="try again")
    if status == 401:
        return DownloadError(
            "the hub does not accept your token", remedy=f"log in again with `{login()}`, or unset HF_TOKEN"
        )
    if status == 403:
        return ModelNotFoundError(
            "the hub refuses access (403)", where=ref, remedy=f"see {page} for who may download it"
        )
    if status == 429:
        wait = f"{_retry_after(error):.0f} seconds" if _retry_after(error) else "some minutes"
        return DownloadError(
            "the hub limits requests (429)",
            remedy=f"wait {wait}, then repeat the command; logged-in users (`{login()}`) have a higher limit",
        )
    if status >= 500:
        return DownloadError(
            f"the hub has an internal error ({status})",
            remedy="repeat the command later; files already downloaded are kept",
        )
    text = next((line for line in str(error).splitlines() if line), type(error).__name__)
    found = re.search(r"\[Errno -?\d+\] [\w ]+", text)  # the library's message can be a page long
    reason = found[0] if found else text[:120]
    return DownloadError(
        f"{endpoint()} cannot be reached ({reason})",
        where=ref,
        remedy="check the connection and repeat the command; files already downloaded are kept",
    )
