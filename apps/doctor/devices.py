"""The chosen backend and the reason; what each other backend needs, and how to install it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinychat_mlx.apps.doctor.finding import BROKEN, NOTE, OK, Finding, Section
from tinychat_mlx.apps.doctor.probe import LIBRARY, Child, ask
from tinychat_mlx.base.backend_names import BACKENDS
from tinychat_mlx.base.errors import UsageError, pip_install
from tinychat_mlx.open import choose, has_nvidia

DRIVER = Path("/sys/module/nvidia/version")


class Backends:
    """Tests whether each backend starts; those in LIBRARY run in a separate process.

    wanted: the value of --backend. measure: the chosen backend also measures memory reads, if it is in LIBRARY.
    """

    def __init__(self, wanted: str, measure: bool) -> None:
        self.wanted = wanted
        try:
            self.chosen, self.why = choose(wanted)
            self.trouble = ""
        except UsageError as e:
            self.chosen, self.why, self.trouble = "", "", e.problem
        self._children = {
            name: Child(name, measure and name == self.chosen) for name in LIBRARY if lacks(name) is None
        }
        self.answers: dict[str, dict[str, Any]] = {}

    def section(self) -> Section:
        """Return the section. Waits for the processes."""
        if not self.answers:
            self.answers = {name: child.answer() for name, child in self._children.items()}
            self.answers |= {n: ask(n, False) for n in BACKENDS if n not in LIBRARY}
        return Section("backends", "Backends", (self._choice(), *(self._backend(n) for n in BACKENDS)))

    @property
    def works(self) -> bool:
        return not self.trouble and "device" in self.answers.get(self.chosen, {})

    def _choice(self) -> Finding:
        if self.trouble:
            do = "fix --backend, TINYCHAT_BACKEND or `backend` in the config file"
            return Finding("chosen", None, self.trouble, BROKEN, do)
        value = {"name": self.chosen, "why": self.why, "wanted": self.wanted}
        return Finding("chosen", value, f"{self.chosen} is chosen: {self.why}", OK)

    def _backend(self, name: str) -> Finding:
        answer = self.answers.get(name, {})
        if device := answer.get("device"):
            words = [f"{name}: {device['name']}, {device['detail']}", *device["features"][: name == "mlx"]]
            words += [*answer.get("remarks", ()), *_remarks(name)]
            return Finding(name, answer | {"works": True} | _driver(name), "; ".join(words), OK)
        what, do = lacks(name) or (answer.get("error", "it does not start"), answer.get("do", ""))
        what = what.removeprefix(f"{name} backend: ")
        value = {"works": False, "error": what, "do": do} | _driver(name)
        what = "; ".join([what, *_remarks(name)])
        if name == self.chosen:
            return Finding(name, value, f"{name}: {what}", BROKEN, do or "use another: --backend cpu")
        state = NOTE if answer.get("error") and not lacks(name) else ""
        return Finding(name, value, f"{name}: {what}", state, do)


def lacks(name: str) -> tuple[str, str] | None:
    """Return what a backend lacks and how to install it, without importing its library; None if nothing."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if find_spec(BACKENDS[name][0]) is None:
        return (
            "not in this package",
            "install the complete tinychat-mlx, or use another --backend",
        )
    if name == "mlx" and find_spec("mlx") is None:
        return ("no MLX", "pip install 'mlx>=0.32.1'") if apple else ("needs a Mac with Apple silicon", "")
    if name == "cuda" and not has_nvidia() and os.environ.get("TINYCHAT_CUDA_DEVICE") != "cpu":
        torch = "" if find_spec("torch") is None else ", though torch is installed"
        return f"needs an NVIDIA GPU, but no NVIDIA driver is loaded{torch}", ""
    if name == "cuda" and find_spec("torch") is None:
        jetson = Path("/etc/nv_tegra_release").exists()
        return "there is an NVIDIA GPU, but torch is not installed", (
            "install NVIDIA's torch for this JetPack" if jetson else pip_install("cuda")
        )
    return None


def _remarks(name: str) -> list[str]:
    if name == "reference":
        return ["slow reference implementation for tests"]
    asked = name == "cuda" and os.environ.get("TINYCHAT_CUDA_KERNELS") == "0"
    found = ["TINYCHAT_CUDA_KERNELS=0 selects pure torch"] if asked else []
    return found + [f"NVIDIA driver {version}" for version in _driver(name).values()]


def _driver(name: str) -> dict[str, str]:
    """Return {"driver": version} of NVIDIA's driver, from the kernel or from nvidia-smi."""
    if name != "cuda" or not has_nvidia():
        return {}
    with suppress(OSError):
        return {"driver": DRIVER.read_text().strip()}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return {"driver": done.stdout.splitlines()[0].strip()}
    return {}
