"""Calibration text from a dataset on the hub: one file of it, and of that only as much as is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tinychat_mlx import hub
from tinychat_mlx.awq.documents import KINDS, Document, documents, kind_of
from tinychat_mlx.errors import ModelNotFoundError, TinychatError, UsageError, within

HUB_ID = re.compile(r"([\w][\w.-]{0,95}/[\w][\w.-]{0,95})(?::(.+))?")
BLOCK = 1 << 20  # bytes fetched at once
# Files that come with a dataset and are no text of it.
ASIDE = re.compile(
    r"(^|/)(readme|license|requirements|dataset_infos?|config\w*|metadata|\.[^/]*)\.?\w*$", re.IGNORECASE
)
HELD_BACK = re.compile(r"(^|[/_.-])(test|valid|validation|eval|dev)", re.IGNORECASE)


def fetch(dataset: str, characters: int) -> tuple[list[Document], str]:
    """ORG/NAME or ORG/NAME:FILE -> documents of at least so many characters, if there are; what was taken.

    Raises ModelNotFoundError (absent, gated, no network), UsageError (no file or column that is read).
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
    http: type[Exception] = HfHubHTTPError.__mro__[1]  # of whichever library this version fetches with
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
            else f"the hub does not give it ({type(error).__name__})"
        )
        raise ModelNotFoundError(
            why, where=f"dataset {repo}", remedy="give a file, or --calib self"
        ) from None
    return found, f"{repo}, {name} ({len(found)} documents read of {sizes[name] / 1e6:.1f} MB)"


def choose(repo: str, sizes: dict[str, int], characters: int) -> str:
    """The file to read: not of a test split, large enough, of the kind that streams best, the smallest of these."""
    usable = [name for name in sorted(sizes) if kind_of(name) and not ASIDE.search(name)]
    usable = [name for name in usable if not HELD_BACK.search(name)] or usable
    if not usable:
        has = ", ".join(sorted(sizes)[:5]) or "nothing"
        raise UsageError(f"it has no file of {', '.join(KINDS)}, but {has}", remedy="give a file")

    def rank(name: str) -> tuple[bool, int, int]:
        small = sizes[name] < characters // 4  # text packs about 4 : 1 at best
        return small, KINDS.index(kind_of(name) or ""), -sizes[name] if small else sizes[name]

    return min(usable, key=rank)


def enough(found: Iterator[Document], characters: int) -> list[Document]:
    """Documents from the beginning until there are so many characters."""
    out: list[Document] = []
    for one in found:
        out.append(one)
        characters -= length(one)
        if characters <= 0:
            break
    return out


def length(one: Document) -> int:
    return len(one) if isinstance(one, str) else sum(len(str(m.get("content", ""))) for m in one)
