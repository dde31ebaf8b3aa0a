"""Read calibration text from a hub dataset: one file, and only the part of it that is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tinychat_mlx import hub
from tinychat_mlx.awq.calibration.documents import KINDS, Document, documents, kind_of
from tinychat_mlx.base.errors import ModelNotFoundError, TinychatError, UsageError, within

HUB_ID = re.compile(r"([\w][\w.-]{0,95}/[\w][\w.-]{0,95})(?::(.+))?")
BLOCK = 1 << 20  # bytes per request
# Files in a dataset repository that are not text of the dataset.
ASIDE = re.compile(
    r"(^|/)(readme|license|requirements|dataset_infos?|config\w*|metadata|\.[^/]*)\.?\w*$", re.IGNORECASE
)
HELD_BACK = re.compile(r"(^|[/_.-])(test|valid|validation|eval|dev)", re.IGNORECASE)


def fetch(dataset: str, characters: int) -> tuple[list[Document], str]:
    """Read ORG/NAME or ORG/NAME:FILE. Returns (documents, description of what was read).

    The documents have at least `characters` characters if the file has as many. Raises ModelNotFoundError if
    the dataset is absent, gated or unreachable, and UsageError if no file or column can be read.
    """
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    match = HUB_ID.fullmatch(dataset)
    if match is None:
        raise UsageError(
            "not a file, not `self`, and not the id of a dataset (ORG/NAME)",
            where=f"--calib {dataset}",
            remedy="check the name",
        )
    repo, file = match.groups()
    # base class of the HTTP library that this hub version uses
    http: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        info = HfApi().dataset_info(repo, files_metadata=True)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
        name = choose(repo, sizes, characters) if file is None else file
        if name not in sizes:
            raise UsageError(
                f"it has no file {name}", where=f"dataset {repo}", remedy="choose one that its page lists"
            )
        with HfFileSystem().open(f"datasets/{repo}@{info.sha}/{name}", "rb", block_size=BLOCK) as remote:
            found = enough(documents(name, remote, characters), characters)
    except GatedRepoError:
        raise ModelNotFoundError(
            "this dataset is gated",
            where=f"dataset {repo}",
            remedy=f"accept its terms on its page, then log in with `{hub.login()}`",
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            "no such dataset on the hub, or it is private",
            where=f"dataset {repo}",
            remedy=f"check the name, or log in with `{hub.login()}`",
        ) from None
    except TinychatError as error:
        raise within(f"dataset {repo}", error) from None
    except (http, OSError) as error:
        why = (
            "HF_HUB_OFFLINE is set"
            if hub.is_offline()
            else f"the hub refused the request ({type(error).__name__})"
        )
        raise ModelNotFoundError(
            why, where=f"dataset {repo}", remedy="give a file, or --calib self"
        ) from None
    return found, f"{repo}, {name} ({len(found)} documents read of {sizes[name] / 1e6:.1f} MB)"


def choose(repo: str, sizes: dict[str, int], characters: int) -> str:
    """Choose the file to read.

    Test splits and files with too little text rank last. Next comes the kind that streams best, then the
    smallest file.
    """
    usable = [name for name in sorted(sizes) if kind_of(name) and not ASIDE.search(name)]
    usable = [name for name in usable if not HELD_BACK.search(name)] or usable
    if not usable:
        has = ", ".join(sorted(sizes)[:5]) or "nothing"
        raise UsageError(
            f"it has no file of these types: {', '.join(KINDS)}; it has {has}", remedy="give a file"
        )

    def rank(name: str) -> tuple[bool, int, int]:
        small = sizes[name] < characters // 4  # text compresses about 4 : 1 at best
        return small, KINDS.index(kind_of(name) or ""), -sizes[name] if small else sizes[name]

    return min(usable, key=rank)


def enough(found: Iterator[Document], characters: int) -> list[Document]:
    """Take documents from the start until they have `characters` characters."""
    out: list[Document] = []
    for one in found:
        out.append(one)
        characters -= length(one)
        if characters <= 0:
            break
    return out


def length(one: Document) -> int:
    return len(one) if isinstance(one, str) else sum(len(str(m.get("content", ""))) for m in one)
