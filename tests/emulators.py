"""Skip or fail a test if an emulator or a shell is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(why: str) -> NoReturn:
    """Skip with a reason. If TINYCHAT_REQUIRE_EMULATORS is set, as in CI, fail."""
    if os.environ.get("TINYCHAT_REQUIRE_EMULATORS"):
        pytest.fail(f"{why} (and TINYCHAT_REQUIRE_EMULATORS is set)")
    pytest.skip(why)
