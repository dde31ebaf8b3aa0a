"""Fixtures shared by all tests: tiny checkpoints, and the backends this machine can run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import raise_sites

from tinychat_mlx.backend import Backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TINYCHAT_WEIGHT_CACHE"] = "0"  # no test writes into the user's cache

# A run that a script began with & ignores Ctrl-C, and so would every program it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny checkpoints of this run lie."""
    return tmp_path_factory.mktemp("tiny")


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


# Which test provokes which error: raise_sites.py -------------------------------------------------------
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--note-raised",
        action="store_true",
        help="note in tests/data/raised.json which errors this run makes",
    )


def pytest_configure(config: pytest.Config) -> None:
    raise_sites.begin()


def pytest_deselected(items: list[pytest.Item]) -> None:
    _not_judged.update(_function(item.nodeid) for item in items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _function(report.nodeid)
    _reported.add(name)
    if report.outcome != "passed":
        _not_judged.add(name)


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0].removeprefix("tests/")


_reported: set[str] = set()
_not_judged: set[str] = set()  # tests of which a part was left out, skipped or failed


def pytest_sessionfinish(session: pytest.Session) -> None:
    parts = any("[" in str(arg) for arg in session.config.args)
    complete = set() if parts or session.shouldstop or session.shouldfail else _reported - _not_judged
    if session.config.getoption("--note-raised"):
        raise_sites.note(complete)
    _stale.update(raise_sites.stale(complete))
    if _stale and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_stale: dict[str, str] = {}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _stale:
        terminalreporter.section("errors that no test provokes any more")
        for key, test in _stale.items():
            terminalreporter.write_line(f"{key}: not by {test}")
        terminalreporter.write_line("run those tests with --note-raised, or provoke them again")


def pytest_unconfigure() -> None:
    Path(os.environ.pop(raise_sites.SEEN)).unlink(missing_ok=True)
