"""What a test does where an emulator of another device, or a shell, is absent."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(why: str) -> NoReturn:
    """Skip, saying why; where TINYCHAT_REQUIRE_EMULATORS is set, as in CI, fail."""
    if os.environ.get("TINYCHAT_REQUIRE_EMULATORS"):
        pytest.fail(f"{why} (and TINYCHAT_REQUIRE_EMULATORS is set)")
    pytest.skip(why)
