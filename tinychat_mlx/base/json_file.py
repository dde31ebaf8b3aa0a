"""Read the JSON object in a file. Nothing in the file is trusted: its size and its form are checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.base.files import open_regular

MAX_JSON = 64 << 20  # bytes; indices of the largest models have about 10 MB


def read_json(path: Path) -> dict[str, Any]:
    """-> the object in a JSON file. Raises FormatError naming line and column."""
    with open_regular(path) as file:
        check_json_size(path, os.fstat(file.fileno()).st_size)
        return parse_json(path, file.read())


def check_json_size(where: Path | str, size: int) -> None:
    if size > MAX_JSON:
        raise FormatError(
            f"larger than {MAX_JSON >> 20} MiB", where=where, remedy="check that it is the right file"
        )


def parse_json(where: Path | str, text: bytes) -> dict[str, Any]:
    """-> the object in the text of a JSON file. Raises FormatError naming line and column."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise FormatError(f"not JSON at {at}: {error.msg}", where=where) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of a million digits, endless brackets
        raise FormatError(f"not JSON: {str(error)[:100]}", where=where) from None
    if not isinstance(parsed, dict):
        raise FormatError(f"contains a {type(parsed).__name__}, not a JSON object", where=where)
    return parsed


def read_optional(path: Path) -> dict[str, Any]:
    """-> the object in a JSON file, {} if there is no such file. Raises FormatError."""
    return read_json(path) if path.exists() else {}
