"""Records what a run proves about the model families: one line of JSON per proof, one file per process.

conftest.py sets the folder for all processes of a run and prints the count at its end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

FOLDER = "TINYCHAT_PROOFS"  # environment variable: the folder of the files


class Proof(NamedTuple):
    variant: str  # of tiny_models.py
    seed: int
    column: str  # a backend, or "AWQ"
    claim: str  # of the README's table: dense, int4, invariant, converted
    how: str  # whole, pieces, steps, 8 bits, …


def proven(variant: str, column: str, claim: str, *how: str, seed: int = 0) -> None:
    """Record what the calling test has proven."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with (Path(os.environ[FOLDER]) / f"{worker}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(Proof(variant, seed, column, claim, h)) + "\n" for h in how)


def read(folder: Path) -> set[Proof]:
    """Read all proofs of a run, from all its processes."""
    lines = [
        line for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return {Proof(*json.loads(line)) for line in lines}
