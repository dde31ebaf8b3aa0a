"""Test whether a backend starts, in a separate process: a crash of its library must not end doctor.

python -m tinychat_mlx.apps.doctor.probe mlx --measure       one JSON object on stdout
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

LIBRARY = {"mlx": "mlx", "cuda": "torch"}  # third-party libraries that may crash
PATIENCE_S = 60.0  # seconds; a first import of torch from a slow disk is slow


class Child:
    """A process that starts a backend."""

    def __init__(self, backend: str, measure: bool) -> None:
        command = [sys.executable, "-m", "tinychat_mlx.apps.doctor.probe", backend]
        self.backend = backend
        self._process = subprocess.Popen(
            command + ["--measure"] * measure, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """Return the output of `main`, or {"error": how the process ended}."""
        try:
            out, err = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"it did not start within {PATIENCE_S:.0f} s"}
        try:
            found: dict[str, Any] = json.loads(out.splitlines()[-1])
            return found
        except (ValueError, IndexError):
            code = self._process.returncode
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            last = (err.strip().splitlines() or [""])[-1]
            do = f"reinstall it: pip install --force-reinstall {LIBRARY[self.backend]}"
            return {
                "error": f"its library crashed the process {how}" + (f" ({last})" if last else ""),
                "do": do,
            }


def ask(backend: str, measure: bool) -> dict[str, Any]:
    """Return {device: of `describe`, remarks: missing features[, bandwidth: bytes/s]} or {error, do}."""
    import warnings

    from tinychat_mlx.base.errors import TinychatError
    from tinychat_mlx.open import create

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = create(backend, False, None)
        remarks = [
            text.removeprefix(f"{backend}: ")
            for w in said
            if (text := str(w.message)).startswith(f"{backend}: ")
        ]
        found: dict[str, Any] = {"device": asdict(made.describe()), "remarks": remarks}
        if measure:
            from tinychat_mlx.apps.bench.machine import Subject

            found["bandwidth"] = Subject(backend, None).bandwidth()
        return found
    except TinychatError as e:
        return {"error": e.problem, "do": e.remedy}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], "--measure" in sys.argv)))
