"""Packed weights on disk: the next start gives the same model without packing, and bad files do no harm."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.backends.cpu import packed_weight_cache
from tinychat_mlx.base import disk_cache
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.open import DEMO
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.model_identity import fingerprint
from tinychat_mlx.weights.weight import Dense, Packed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no weight cache")
IDS = [5, 9, 2, 7]
FAMILIES = [
    "opt",
    "gpt_neox",
    "falcon-7b",
    "phi3",
    "gemma2",
    "qwen2",
]  # positions, fused qkv and gate_up, biases


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache folder that accepts the smallest model."""
    folder = tmp_path / "cache" / "weights"
    monkeypatch.setattr(packed_weight_cache, "home", lambda: folder)
    monkeypatch.setattr(packed_weight_cache, "MINIMUM", 0)
    monkeypatch.setattr(packed_weight_cache, "GIB", 1)  # free disk space is tested elsewhere
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", str(1 << 30))
    return folder


def start(folder: Path | str, exact: bool = False) -> np.ndarray:
    """Load a model and wait until its files are on disk. Returns some logits."""
    logits = tinychat_mlx.load(folder, backend="cpu", threads=2, exact=exact).logits(IDS)
    packed_weight_cache.finish()
    return logits


def warm(folder: Path | str, exact: bool = False) -> np.ndarray:
    """Like `start`, but reading a matrix of the checkpoint is an error."""

    def refuse(self: Checkpoint, module: str, shape: object = None) -> None:
        raise AssertionError(f"{module} was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "weight", refuse)
        return start(folder, exact)


def is_cold(folder: Path | str) -> bool:
    try:
        warm(folder)
    except AssertionError:
        return True
    return False


def only(home: Path) -> Path:
    (path,) = home.iterdir()
    return path


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_second_start_reads_no_weight_and_computes_the_same(
    home: Path, tiny_root: Path, variant: str
) -> None:
    folder = tiny(variant, tiny_root).folder
    plain = tinychat_mlx.load(folder, backend="cpu", threads=2).logits(IDS)
    first = start(folder)
    assert np.array_equal(plain, first) and np.array_equal(first, warm(folder))


def test_weights_in_different_forms_are_found_one_by_one(home: Path, tmp_path: Path) -> None:
    arrays = tiny_dense.tensors(tiny_dense.CONFIG)
    for name in arrays:
        if "k_proj" in name or "up_proj" in name:
            arrays[name] = arrays[name].astype(np.float32)
    folder = tiny_dense.save(tmp_path / "mixed", arrays)
    assert np.array_equal(start(folder), warm(folder))
    before = only(home).stat().st_ino
    warm(folder)
    assert only(home).stat().st_ino == before, "written again although nothing changed"


def test_int4_weights_and_exact_ones_have_a_file_each(home: Path) -> None:
    coarse, exact = start("demo"), start("demo", exact=True)
    assert len(list(home.iterdir())) == 2
    assert np.array_equal(coarse, warm("demo")) and np.array_equal(exact, warm("demo", exact=True))
    assert not np.array_equal(coarse, exact)


def test_where_there_are_no_huge_pages_the_file_is_mapped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start("demo")
    monkeypatch.setattr(packed_weight_cache, "huge_pages", lambda: False)
    assert np.array_equal(first, warm("demo"))
    image = packed_weight_cache.Image(packed_weight_cache._open_own(only(home)))
    assert not image.data.flags.writeable and image.data.tobytes() == only(home).read_bytes()


def test_a_changed_model_is_packed_again_in_the_place_of_the_old(home: Path, tmp_path: Path) -> None:
    """Even if its file has the same size, header and modification time as the old one."""
    folder = tiny_dense.save(tmp_path / "model")
    old, path = start(folder), folder / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    tiny_dense.save(folder, tiny_dense.tensors(tiny_dense.CONFIG, seed=1))
    os.utime(path, ns=times)
    new = start(folder)
    assert not np.array_equal(old, new) and np.array_equal(new, warm(folder))
    only(home)


def test_a_fingerprint_is_of_content_place_and_time(tmp_path: Path) -> None:
    folder = tiny_dense.save(tmp_path / "model")
    moved, seen = tmp_path / "moved", {fingerprint(folder)}
    assert fingerprint(folder) in seen and "" not in seen
    config = json.dumps(tiny_dense.CONFIG | {"rope_theta": 9.0})
    for change in (
        lambda: (folder / "config.json").write_text(config),
        lambda: os.utime(folder / "model.safetensors", ns=(0, 0)),
        lambda: (folder / "model.safetensors.index.json").write_text("{}"),
        lambda: folder.rename(moved),
    ):
        change()
        now = fingerprint(folder if folder.exists() else moved)
        assert now not in seen
        seen.add(now)
    folder = moved
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert fingerprint(folder) == ""


def resealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the file with a validly changed index."""
    magic, layout, _, begin, length, durable, _ = packed_weight_cache.TRAILER.unpack(
        data[-packed_weight_cache.TRAILER.size :]
    )
    index = json.loads(data[begin : begin + length])
    change(index)
    text = json.dumps(index).encode()
    return (
        data[:begin]
        + text
        + packed_weight_cache.TRAILER.pack(
            magic, layout, packed_weight_cache.zlib.crc32(text), begin, len(text), durable, 0
        )
    )


def entry(index: dict[str, Any], position: int, value: object) -> None:
    index["weights"]["model.embed_tokens"][position] = value


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "cut in the weights": lambda d: d[: len(d) // 2],
    "cut by a byte": lambda d: d[:-1],
    "longer": lambda d: d + b"\0",
    "zeros": lambda d: bytes(len(d)),
    "a flipped bit in the index": lambda d: d[:-100] + bytes([d[-100] ^ 1]) + d[-99:],
    "another layout": lambda d: d[:-32] + bytes([d[-32] ^ 1]) + d[-31:],
    "an offset past the end": lambda d: resealed(d, lambda i: entry(i, 6, 1 << 40)),
    "a negative offset": lambda d: resealed(d, lambda i: entry(i, 6, -64)),
    "an odd offset": lambda d: resealed(d, lambda i: entry(i, 6, 3)),
    "a size beyond int32": lambda d: resealed(d, lambda i: entry(i, 1, 1 << 40)),
    "no groups": lambda d: resealed(d, lambda i: entry(i, 3, 0)),
    "an unknown kind": lambda d: resealed(d, lambda i: entry(i, 0, 9)),
    "true for a number": lambda d: resealed(d, lambda i: entry(i, 4, True)),
    "a fraction": lambda d: resealed(d, lambda i: entry(i, 2, 1.5)),
    "too few numbers": lambda d: resealed(d, lambda i: i["weights"]["model.embed_tokens"].pop()),
    "another shape": lambda d: resealed(d, lambda i: entry(i, 1, i["weights"]["model.embed_tokens"][1] - 16)),
    "no weights": lambda d: resealed(d, lambda i: i.pop("weights")),
    "another model's": lambda d: resealed(d, lambda i: i.update(digest="0" * 64)),
    "a weight left out": lambda d: resealed(d, lambda i: i["weights"].popitem()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_replaced_without_a_word(
    home: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    good = start("demo")
    path = only(home)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[how](whole))
    assert is_cold("demo"), "the damaged file was used"
    assert np.array_equal(good, start("demo")) and np.array_equal(good, warm("demo"))
    assert capfd.readouterr() == ("", "")


def test_a_file_that_no_disk_ever_held_is_not_believed_after_a_power_cut(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed_weight_cache._boot():
        pytest.skip("this system has no boot id, so files are on disk before they are used")
    monkeypatch.setattr(packed_weight_cache, "settle", lambda path: None)  # the disk has not finished
    start("demo")
    warm("demo")
    monkeypatch.setattr(packed_weight_cache, "_boot", lambda: "another")
    assert is_cold("demo")
    monkeypatch.undo()


def test_a_file_on_disk_outlives_the_boot(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("demo")
    monkeypatch.setattr(packed_weight_cache, "_boot", lambda: "another")
    warm("demo")


def test_a_file_cut_while_it_is_read_is_an_error_that_says_so(home: Path) -> None:
    start("demo")
    path = only(home)
    with open(path, "rb") as file:
        size = path.stat().st_size
        image = packed_weight_cache.Image(file)
        image.wait()
        os.truncate(path, 10)
        image._read(0, size, os.dup(file.fileno()))
    with pytest.raises(BackendError, match="is truncated"):
        image.wait()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "replace"])
def test_a_full_disk_costs_the_file_alone(home: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    plain = start("demo")
    only(home).unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed_weight_cache.os, call, full)
        assert np.array_equal(plain, start("demo"))
        assert list(home.iterdir()) == []
    start("demo")
    warm("demo")


def test_a_folder_that_cannot_be_written_is_done_without(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the folder stops even root, whom permissions do not."""
    home.parent.parent.mkdir(exist_ok=True)
    home.parent.write_text("")
    assert np.array_equal(start("demo"), start("demo"))
    assert home.parent.read_text() == ""


def test_a_file_of_somebody_else_or_behind_a_link_is_not_opened(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("demo")
    with monkeypatch.context() as patch:
        patch.setattr(packed_weight_cache.os, "getuid", lambda: os.stat(home).st_uid + 1)
        assert is_cold("demo")
    path = only(home)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert is_cold("demo")


def test_what_was_used_longest_ago_goes_first(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tiny_dense.save(tmp_path / name) for name in "abc"]
    start(folders[0])
    size = only(home).stat().st_size
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", str(2 * size + 1000))
    start(folders[1])
    warm(folders[0])  # now b is the oldest
    start(folders[2])
    assert {p.name[0] for p in home.iterdir()} == {"a", "c"}
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", str(size // 2))
    start(folders[1])
    assert {p.name[0] for p in home.iterdir()} == {"a", "c"}, "a file that never fits must not remove others"


def test_the_disk_is_never_filled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 GiB of which 6 are free: 5 stay free, so 1 GiB fits and 2 do not, and 12 never do."""
    gib = 1 << 30
    home.mkdir(parents=True)
    monkeypatch.setattr(packed_weight_cache, "GIB", gib)
    usage = type("usage", (), {"total": 50 * gib, "free": 6 * gib})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert packed_weight_cache.make_room(home / "x.tiles", gib, None)
    assert not packed_weight_cache.make_room(home / "x.tiles", 2 * gib, None)
    usage.free = 49 * gib
    assert packed_weight_cache.make_room(home / "x.tiles", 10 * gib, None)
    assert not packed_weight_cache.make_room(
        home / "x.tiles", 12 * gib, None
    )  # more than a fifth of the disk


def test_a_small_model_and_a_switched_off_cache_leave_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weight_cache, "MINIMUM", 64 << 20)
    start("demo")
    assert not home.exists()
    monkeypatch.undo()
    assert os.environ["TINYCHAT_WEIGHT_CACHE"] == "0" and packed_weight_cache.home() is None
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", "lots")
    with pytest.raises(BackendError, match="'lots' is not a number of bytes"):
        tinychat_mlx.load("demo", backend="cpu")


def test_the_cache_lies_where_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path))
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", str(1 << 30))
    assert packed_weight_cache.home() == disk_cache.place("weights") == tmp_path / "weights"
    monkeypatch.setenv("TINYCHAT_WEIGHT_CACHE", "0")
    assert packed_weight_cache.home() is None and disk_cache.place("weights") == tmp_path / "weights"


def test_leftovers_of_killed_processes_go(home: Path) -> None:
    home.mkdir(parents=True)
    old, held = home / "x.partial", home / "y.partial"
    for path in (old, held):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    import fcntl

    with open(held, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start("demo")
    assert not old.exists() and held.exists()


def test_two_processes_at_once_are_both_right(tmp_path: Path) -> None:
    """Each process has finished its file when it ends, however early."""
    code = (
        "import sys, hashlib, tinychat_mlx\n"
        "from tinychat_mlx.backends.cpu import packed_weight_cache as store\n"
        "store.MINIMUM, store.GIB = 0, 1\n"
        "m = tinychat_mlx.load('demo', backend='cpu', threads=1)\n"
        "print(hashlib.sha256(m.logits([5, 9, 2, 7]).tobytes()).hexdigest())\n"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TINYCHAT_WEIGHT_CACHE": str(1 << 30)}
    if sys.platform == "darwin":
        env["HOME"] = str(tmp_path)
    for _ in range(2):
        pair = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in "ab"]
        said = {p.communicate()[0] for p in pair}
        assert len(said) == 1 and len(said.pop()) == 65 and all(p.returncode == 0 for p in pair)
    files = list(tmp_path.rglob("tinychat-mlx/weights/*"))
    assert [p.suffix for p in files] == [".tiles"]


def test_an_interrupted_load_leaves_nothing(home: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinychat_mlx.load("demo", backend="cpu", threads=2, progress=stop)
    packed_weight_cache.finish()
    assert not home.exists()


def test_packed_bytes_are_those_of_this_layout_version() -> None:
    """If this fails, the tile layout changed: increment LAYOUT in backends/cpu/pack.py, and update the hash."""
    from tinychat_mlx.backends.cpu.backend import CpuBackend
    from tinychat_mlx.backends.cpu.pack import LAYOUT

    r = np.random.default_rng(0)
    words = [r.integers(0, 1 << 32, (20, 128 * bits // 32), np.uint32) for bits in (4, 8)]
    halves = r.standard_normal((20, 2)).astype(np.float16)
    short = (r.integers(0x1000, 0x1800, (20, 2)) & ~15).astype(np.uint16).view(np.float16)  # ends: room for z
    bias = r.standard_normal(20).astype(np.float32)
    backend, digest = CpuBackend(threads=2), hashlib.sha256()
    for weight in (
        Packed("a", words[0], halves, halves, 4, 64, bias),
        Packed("b", words[1], halves, halves, 8, 64),
        Packed("c", words[0], halves.astype(np.float32) / 3, halves, 4, 64),
        Dense("d", r.standard_normal((20, 32)).astype(np.float16)),
        Dense("e", r.standard_normal((20, 32)).astype(np.float32) * 1e5),
        Packed("f", words[0], short, -7 * short, 4, 64),
    ):
        digest.update(backend.pack(weight).data.tobytes())  # type: ignore[attr-defined]
    assert (LAYOUT, digest.hexdigest()[:16]) == (3, "aab09e7f0c98bbe8")


def test_memory_counts_what_came_from_disk(home: Path) -> None:
    cold = tinychat_mlx.load("demo", backend="cpu", threads=2)
    cold.logits(IDS)
    packed_weight_cache.finish()
    again = tinychat_mlx.load("demo", backend="cpu", threads=2)
    again.logits(IDS)
    assert 0 < again.memory().used == cold.memory().used <= again.memory().peak
    assert DEMO.is_dir() and threading.active_count() < 20
