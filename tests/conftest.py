"""Fixtures shared by all tests: tiny checkpoints, and the backends of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import proofs
import pytest
from checkout import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chat_screen import Chats
    from fake_terminal import FakeChats

    from tinychat_mlx.contract import Backend

# There is a worker per core, so tinychat, NumPy and torch get one thread each; tests of threads ask for more.
# OMP_NUM_THREADS is not set, because it is also an option of tinychat.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["TINYCHAT_THREADS"] = "1"
# pytest-xdist sets these for its workers; a program in a terminal of its own must ask the terminal.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test connects to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TINYCHAT_WEIGHT_CACHE"] = "0"  # no test writes to the user's cache

# Conversions and downloads sync every file to the disk. In memory that costs nothing.
if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# A run started by a script with & ignores Ctrl-C, and every program that it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_root() -> Path:
    """The folder of tiny models, shared by all workers and later runs (tiny_models.py)."""
    return ROOT / "build" / "tiny-models"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `backend_name` with every backend of the package. Missing libraries skip with a reason."""
    if "backend_name" in metafunc.fixturenames:
        from tinychat_mlx.base.backend_names import BACKENDS

        metafunc.parametrize("backend_name", list(BACKENDS))


@pytest.fixture
def backend(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend in exact mode. Without a GPU, cuda runs its torch path on CPU tensors."""
    from importlib.util import find_spec

    from tinychat_mlx.base.backend_names import BACKENDS
    from tinychat_mlx.open import create

    library = {"mlx": "mlx", "cuda": "torch"}.get(backend_name, "numpy")
    for module in (library, BACKENDS[backend_name][0]):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.setenv("TINYCHAT_CUDA_DEVICE", "cpu")
    return create(backend_name, exact=True, threads=1)


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every method: on a few tokens of a random model plain rounding can be better by chance."""
    monkeypatch.setattr("tinychat_mlx.awq.quality.verdict.Verdict.passed", True)


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChats]:
    """Chats in this process with a fake keyboard and clock (fake_terminal.py)."""
    from fake_terminal import FakeChats

    made = FakeChats(tmp_path, monkeypatch)
    yield made
    for screen in made.open:
        screen.close()


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Chats]:
    """Chats in pseudo-terminals (chat_screen.py), for behaviour that only a real terminal shows."""
    from chat_screen import Chats

    made = Chats(tmp_path)
    yield made
    for screen in made.open:
        if screen.child.isalive():
            screen.child.kill(signal.SIGKILL)
            screen.child.wait()
        screen.child.close()


# Proofs of the model families in this run: proofs.py -------------------------------------------------------------
def pytest_configure(config: pytest.Config) -> None:
    """Set the folder of proofs. Workers inherit it from the process that starts them."""
    if proofs.FOLDER not in os.environ:
        os.environ[proofs.FOLDER] = tempfile.mkdtemp(prefix="proofs-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(proofs.FOLDER)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if count := len(proofs.read(Path(os.environ[proofs.FOLDER]))):
        terminalreporter.write_line(f"{count} combinations of model, backend and form proven")
