"""Fixtures shared by all tests: tiny checkpoints, and the backends this machine can run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tinychat_mlx.backend import Backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TINYCHAT_WEIGHT_CACHE"] = "0"  # no test writes into the user's cache

# A run that a script began with & ignores Ctrl-C, and so would every program it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_root() -> Path:
    """The folder of tiny models that all workers and later runs share (tiny_models.py)."""
    return Path(__file__).resolve().parent.parent / "build" / "tiny-models"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend_name` runs a test on every backend of the package; absent libraries skip with a reason."""
    if "backend_name" in metafunc.fixturenames:
        from tinychat_mlx.loading import BACKENDS

        metafunc.parametrize("backend_name", list(BACKENDS))


@pytest.fixture
def backend(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend in its exact mode; cuda runs its torch path on CPU tensors where there is no GPU."""
    from importlib.util import find_spec

    from tinychat_mlx.loading import BACKENDS, create

    library = {"mlx": "mlx", "cuda": "torch"}.get(backend_name, "numpy")
    for module in (library, BACKENDS[backend_name][0]):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.setenv("TINYCHAT_CUDA_DEVICE", "cpu")
    return create(backend_name, exact=True, threads=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A chat in a pseudo-terminal runs in real time: on a busy machine a missed beat is tried again."""
    for item in items:
        if "chats" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=2))
