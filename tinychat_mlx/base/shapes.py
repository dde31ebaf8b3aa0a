"""The sizes of known models, each as its config.json gives them: shapes.json, which the native programs read, too.

Imports nothing else of the project and no NumPy, so backends may use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

SHAPES: dict[str, Config] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
