"""The prefix store on disk: restores exactly, is bounded in size, and ignores damaged files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinychat_mlx
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Attention, Backend, Cache, CacheShape, Segment
from tinychat_mlx.engine.prefix_cache import PART, PrefixStore, identity_of
from tinychat_mlx.open import create
from tinychat_mlx.weights import safetensors

RNG = np.random.default_rng(0)
SHAPE = CacheShape(3, 2, 32)
KINDS = [
    ("reference", {}),
    ("cpu", {"TINYCHAT_KV": "fp16"}),
    ("cpu", {"TINYCHAT_KV": "int8"}),
    ("cpu", {"TINYCHAT_KV": "fp32"}),
    ("cuda", {}),
    ("cuda", {"TINYCHAT_CUDA_KV": "int8"}),
    ("mlx", {}),
    ("mlx", {"TINYCHAT_MLX_KV_BITS": "4"}),
]


def extend(backend: Backend, cache: Cache, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Compute attention of some rows in every layer, one of them with a window. Returns the results."""
    step, q = backend.step((Segment(cache, len(k)),)), np.repeat(k, 2, 1)
    layers = [Attention(layer, 0.2, 7 if layer == 1 else 0) for layer in range(3)]
    outs = [backend.attention(backend.put(q), backend.put(k), backend.put(v), a, step) for a in layers]
    hosts = [backend.to_host(y) for y in outs]
    cache.length += len(k)
    return hosts


@pytest.mark.parametrize(
    ("name", "env"), KINDS, ids=lambda x: x if isinstance(x, str) else "".join(x.values())
)
def test_a_cache_read_and_written_back_is_the_same_cache(
    name: str, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that cut the backends' tiles; later results are bit-identical."""
    pytest.importorskip({"cuda": "torch", "mlx": "mlx.core"}.get(name, "numpy"))
    monkeypatch.setenv("TINYCHAT_CUDA_DEVICE", "cpu")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    backend = create(name, exact=False, threads=1)
    k, v = (RNG.standard_normal((60, 2, 32)).astype(np.float32) for _ in "kv")
    cache, other = backend.new_cache(SHAPE, 100), backend.new_cache(SHAPE, 80)
    extend(backend, cache, k[:45], v[:45])
    for start, end in ((0, 16), (16, 21), (21, 45)):
        rows = backend.read_cache(cache, start, end)
        assert all(array.shape[:3] == (3, 2, end - start) for array in rows.values())
        backend.write_cache(other, rows)
    assert other.length == 45
    whole, again = backend.read_cache(cache, 0, 45), backend.read_cache(other, 0, 45)
    assert all(whole[key].any() and (whole[key] == again[key]).all() for key in whole)
    for a, b in zip(
        extend(backend, cache, k[45:], v[45:]), extend(backend, other, k[45:], v[45:]), strict=True
    ):
        assert (a == b).all()


def test_bfloat16_is_kept_as_its_bits() -> None:
    mx = pytest.importorskip("mlx.core")
    from tinychat_mlx.backends.mlx.cache import MlxCache

    cache, other = (MlxCache(SHAPE, 40, mx.bfloat16) for _ in range(2))
    cache.append(0, mx.ones((1, 2, 9, 32)) * 1.5, mx.ones((1, 2, 9, 32)) * -3.25, 0)
    other.write({name: np.array(x) for name, x in cache.read(0, 9).items()})
    assert (other.parts["k"][0] == cache.parts["k"][0]).all().item() and other.parts["k"][
        0
    ].dtype == mx.bfloat16
    assert other.parts["v"][0][0, 1, 8, 31].item() == -3.25


# the store ---------------------------------------------------------------------------------------------
IDS = [int(t) for t in RNG.integers(0, 1000, 700)]


@pytest.fixture
def backend() -> ReferenceBackend:
    return ReferenceBackend()


def filled(backend: Backend, tokens: int = 700) -> Cache:
    cache = backend.new_cache(SHAPE, 1000)
    size = (3, 2, tokens, 32)
    backend.write_cache(cache, {n: RNG.standard_normal(size).astype(np.float32) for n in "kv"})
    return cache


def save(store: PrefixStore, backend: Backend, cache: Cache, ids: list[int], whole: bool = True) -> None:
    store.save(ids, lambda start, end: backend.read_cache(cache, start, end), whole)


def restored(store: PrefixStore, backend: Backend, ids: list[int], have: Cache | None = None) -> Cache:
    cache = backend.new_cache(SHAPE, 1000) if have is None else have
    store.restore(backend, cache, ids)
    return cache


def test_what_was_saved_comes_back_as_far_as_the_tokens_are_the_same(
    tmp_path: Path, backend: Backend
) -> None:
    store, cache = PrefixStore(tmp_path / "p", "model"), filled(backend)
    save(store, backend, cache, IDS)
    again = restored(store, backend, [*IDS, 5, 5])
    assert again.length == 700
    whole = backend.read_cache(cache, 0, 700)
    assert all((rows == whole[name]).all() for name, rows in backend.read_cache(again, 0, 700).items())
    edited = [*IDS[:300], 1001, *IDS[301:]]
    assert restored(store, backend, edited).length == 300, "also a part of a part"
    assert restored(store, backend, IDS[:40]).length == 40
    begun = backend.new_cache(SHAPE, 1000)
    backend.write_cache(begun, backend.read_cache(cache, 0, 99))
    assert restored(store, backend, IDS, begun).length == 700, "behind what is there already"
    assert restored(PrefixStore(tmp_path / "p", "another"), backend, IDS).length == 0
    small = backend.new_cache(SHAPE, 300)
    assert restored(store, backend, IDS, small).length <= 300


def test_only_whole_parts_are_written_until_the_chat_ends(tmp_path: Path, backend: Backend) -> None:
    store, cache = PrefixStore(tmp_path / "p", "model"), filled(backend)
    save(store, backend, cache, IDS[: PART - 1])
    assert not (tmp_path / "p").exists(), "too little to be worth a file"
    save(store, backend, cache, IDS, whole=False)
    assert restored(store, backend, IDS).length == 2 * PART
    before = {p: p.read_bytes() for p in (tmp_path / "p").iterdir()}
    save(store, backend, cache, IDS)
    assert restored(store, backend, IDS).length == 700
    assert all(path.read_bytes() == data for path, data in before.items()), "written once"


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Write a part again, otherwise valid, with a matching checksum."""
    from tinychat_mlx.engine.prefix_cache import _crc

    file = safetensors.TensorFile(path)
    arrays, metadata = {name: np.array(file.read(name)) for name in file.names}, dict(file.metadata)
    change(arrays, metadata)
    if "crc" in metadata:
        metadata["crc"] = _crc(arrays)
    safetensors.write(path, [safetensors.entry(n, a) for n, a in arrays.items()], metadata)


HARMS: dict[str, Callable[[dict[str, Any], dict[str, str]], Any]] = {
    "longer ids": lambda a, m: a.update(ids=np.concatenate([a["ids"], a["ids"]])),
    "no ids": lambda a, m: a.update(ids=a["ids"][:0]),
    "ids of another type": lambda a, m: a.update(ids=a["ids"].astype(np.int64)),
    "ids of another rank": lambda a, m: a.update(ids=a["ids"][None]),
    "another layer count": lambda a, m: a.update(k=a["k"][:2]),
    "fewer rows": lambda a, m: a.update(v=a["v"][:, :, :9]),
    "another type": lambda a, m: a.update(k=a["k"].astype(np.float16)),
    "a flat tensor": lambda a, m: a.update(k=a["k"].reshape(-1)),
    "a tensor more": lambda a, m: a.update(w=a["k"]),
    "a tensor less": lambda a, m: a.pop("v"),
    "not a number": lambda a, m: a["k"].__setitem__((0, 0, 0, 0), np.nan),
    "infinite": lambda a, m: a["v"].__setitem__((2, 1, 3, 0), np.inf),
    "no checksum": lambda a, m: m.pop("crc"),
    "another prefix": lambda a, m: m.update(prefix="0" * 32),
    "no prefix": lambda a, m: m.pop("prefix"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_part_that_is_not_what_it_should_be_is_absent(tmp_path: Path, backend: Backend, harm: str) -> None:
    store, cache = PrefixStore(tmp_path, "model"), filled(backend)
    save(store, backend, cache, IDS[:PART])
    (path,) = tmp_path.iterdir()
    rewrite(path, lambda arrays, metadata: None)
    assert restored(store, backend, IDS).length == PART, "only the damage makes the difference"
    rewrite(path, HARMS[harm])
    assert restored(store, backend, IDS).length == 0


def test_no_damage_to_a_file_is_ever_believed_or_raised(tmp_path: Path, backend: Backend) -> None:
    store, cache = PrefixStore(tmp_path, "model"), filled(backend)
    save(store, backend, cache, IDS[:PART])
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for at in [*range(0, 300, 7), *RNG.integers(300, len(good), 60).tolist()]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(RNG.integers(8))
        path.write_bytes(bad)
        again = restored(store, backend, IDS)
        assert again.length == 0 or _same(backend, cache, again), at
    for size in (0, 1, 7, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert restored(store, backend, IDS).length == 0
    path.unlink()
    path.mkdir()
    assert restored(store, backend, IDS).length == 0
    save(store, backend, cache, IDS[:PART])


def _same(backend: Backend, cache: Cache, again: Cache) -> bool:
    """A flipped bit in the padding of a header changes nothing."""
    rows = backend.read_cache(again, 0, again.length)
    return all((rows[n] == a).all() for n, a in backend.read_cache(cache, 0, again.length).items())


def test_the_folder_stays_within_its_bound_and_the_least_recently_used_goes(
    tmp_path: Path, backend: Backend
) -> None:
    cache = filled(backend)
    one = sum(a.nbytes for a in backend.read_cache(cache, 0, PART).values())
    store = PrefixStore(tmp_path, "model", limit=int(5.5 * one))
    chats = [[1000 + chat, *IDS[: 2 * PART - 1]] for chat in range(3)]
    for chat in chats[:2]:
        save(store, backend, cache, chat)
        time.sleep(0.01)  # the time of last use must differ
    restored(store, backend, chats[0])
    time.sleep(0.01)
    save(store, backend, cache, chats[2])
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 5.5 * one
    lengths = [restored(store, backend, chat).length for chat in chats]
    assert lengths == [2 * PART, PART, 2 * PART], "of the chat used longest ago the end went first"
    (tmp_path / "notes.txt").write_text("not ours")
    save(PrefixStore(tmp_path, "model", limit=1), backend, cache, chats[0])
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_that_is_full_is_quiet_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real system limit on the size of files, in a separate process."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_prefix import *\n"
        "b = ReferenceBackend(); c = filled(b); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "save(PrefixStore(Path(sys.argv[1]), 'model'), b, c, IDS); print('quiet')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "p"), str(Path(__file__).parent)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("quiet\n", "")
    assert list((tmp_path / "p").iterdir()) == []


def test_parts_are_for_their_owner_alone(tmp_path: Path, backend: Backend) -> None:
    if os.name != "posix":
        pytest.skip("POSIX modes")
    save(PrefixStore(tmp_path / "a" / "b", "model"), backend, filled(backend), IDS)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a" / "b").iterdir()} == {0o600}


# the model ---------------------------------------------------------------------------------------------
def test_the_identity_changes_with_weights_config_backend_and_exactness(tmp_path: Path) -> None:
    from tinychat_mlx.open import DEMO

    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = tinychat_mlx.load(folder, backend="reference").config

    def identity(**kw: Any) -> str:
        return identity_of(folder, config, **{"backend": "cpu", "exact": False, **kw})

    first = identity()
    assert identity() == first
    seen = {first, identity(backend="mlx"), identity(exact=True)}
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    seen.add(identity())
    weights = folder / "model.safetensors"
    status, data = weights.stat(), bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the bytes differ
    seen.add(identity())
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.add(identity())
    assert len(seen) == 6


def test_another_run_goes_on_where_this_one_ended(
    backend_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, none computed again, and the same answer as without an interruption."""
    pytest.importorskip({"cuda": "torch", "mlx": "mlx.core"}.get(backend_name, "numpy"))
    monkeypatch.setenv("TINYCHAT_CUDA_DEVICE", "cpu")

    def load() -> tinychat_mlx.Model:
        model = tinychat_mlx.load("demo", backend=backend_name, context=1024, threads=1)
        model.keep_in(tmp_path / "p")
        return model

    def ask(model: tinychat_mlx.Model, said: list[dict[str, Any]], text: str) -> Any:
        said.append({"role": "user", "content": text})
        events = list(model.chat(said, temperature=0, max_tokens=12))
        said.append(
            {"role": "assistant", "content": "".join(e.text for e in events), "ids": model.answer_ids}
        )
        return events[-1].stats

    first, said = load(), list[dict[str, Any]]()
    ask(first, said, "the fox went home over the hill " * 45)
    ask(first, said, "tell me a story about a fox")
    first.keep(whole=True)
    resumed, again = load(), [dict(message) for message in said]
    resumed.prime(again)
    stats, other = ask(resumed, again, "who are you?"), ask(first, said, "who are you?")
    assert again == said and stats.prompt_tokens == other.prompt_tokens > 300
    assert stats.prompt_tokens - stats.cached_tokens <= 20
    cold, bare = load(), [{k: v for k, v in m.items() if k != "ids"} for m in said[:4]]
    assert ask(cold, bare, "who are you?").cached_tokens > 256, (
        "without the tokens, as far as the text splits alike"
    )
