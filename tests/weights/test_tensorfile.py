"""A safetensors file is used only if every byte is accounted for, and is written completely or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting import calls
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat_mlx.base.errors import FormatError, TinychatError
from tinychat_mlx.weights.safetensors import DTYPES, MAX_HEADER, Entry, TensorFile, entries, entry, write

Header = dict[str, Any]


def craft(path: Path, header: Header | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file from arbitrary parts, without checks."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16), **more: Any) -> Header:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more}


def two(first: tuple[int, int], second: tuple[int, int]) -> Header:
    spans = {"a": first, "b": second}
    return {
        name: {"dtype": "U8", "shape": [max(end - begin, 0)], "data_offsets": [begin, end]}
        for name, (begin, end) in spans.items()
    }


GOOD = json.dumps(one()).encode()
ATTACKS: dict[str, tuple[Header | bytes, int, str]] = {  # header, bytes of data, required text of the message
    "data cut": (one(), 15, "'a' ends at byte"),
    "data absent": (one(), 0, "'a' ends at byte"),
    "data too long": (one(), 17, "the last tensor ends at byte"),
    "no tensors but data": ({}, 4, "the last tensor ends at byte"),
    "overlap": (two((0, 8), (4, 12)), 12, "overlaps the tensor before it"),
    "same bytes twice": (two((0, 8), (0, 8)), 8, "overlaps the tensor before it"),
    "one inside another": (two((0, 8), (2, 4)), 8, "overlaps the tensor before it"),
    "hole": (two((0, 4), (8, 12)), 12, "leaves a hole before it"),
    "hole at the start": (two((4, 8), (8, 12)), 12, "leaves a hole before it"),
    "empty tensor far out": (two((0, 4), (9, 9)), 4, "'b' ends at byte"),
    "offsets reversed": (one(offsets=[16, 0]), 16, "not [begin, end]"),
    "offset negative": (one(offsets=[-16, 0]), 16, "the number -16, which is not a size"),
    "offset 2^63": (one(offsets=[2**63, 2**63 + 16]), 16, "not [begin, end]"),
    "minus zero": (GOOD.replace(b"[0, ", b"[-0, "), 16, "the number -0"),
    "offset 2^62": (one(offsets=[2**62, 2**62 + 16]), 16, "ends at byte 46116860184273"),
    "three offsets": (one(offsets=[0, 8, 16]), 16, "not [begin, end]"),
    "offsets a string": (one(offsets="0,16"), 16, "not [begin, end]"),
    "offset a float": (one(offsets=[0, 16.0]), 16, "16.0 where only integers are allowed"),
    "offset true": (one(offsets=[False, True]), 16, "not [begin, end]"),
    "shape too large": (one(shape=[2, 3]), 16, "needs 24 bytes as F32"),
    "shape too small": (one(shape=[2]), 16, "needs 8 bytes as F32"),
    "shape 2^63": (one(shape=[2**63]), 16, "'a' has shape"),
    "shape wraps to 16 bytes": (one(shape=[2**62, 4, 2**2 + 2**62]), 16, "too large for any file"),
    "shape wraps in uint64": (one("U8", [2**32 + 16, 2**32]), 16, "too large for any file"),
    "zero times too much": (one(shape=[0, 2**60, 2**60], offsets=[0, 0]), 0, "too large for any file"),
    "shape negative": (one(shape=[-2, -2]), 16, "the number -2, which is not a size"),
    "shape a number": (one(shape=4), 16, "'a' has shape 4"),
    "shape nested": (one(shape=[[2, 2]]), 16, "'a' has shape"),
    "shape null": (one(shape=None), 16, "'a' has shape None"),
    "rank 33": (one(shape=[1] * 33, offsets=[0, 4]), 4, "not up to 32 dimensions"),
    "dtype unknown": (one("F8_E4M3", [16]), 16, "has dtype 'F8_E4M3'"),
    "dtype lower case": (one("f32"), 16, "has dtype 'f32'"),
    "dtype a list": (one(["F32"]), 16, "has dtype ['F32']"),
    "dtype missing": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16, "not described by dtype"),
    "key too many": (one(offset=3), 16, "not described by dtype"),
    "entry a list": ({"a": []}, 0, "not described by dtype"),
    "entry null": ({"a": None}, 0, "not described by dtype"),
    "metadata a list": ({"__metadata__": []}, 0, "__metadata__ is not a table of strings"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__ is not a table of strings"),
    "metadata nested": ({"__metadata__": {"a": {"b": "c"}}}, 0, "__metadata__ is not a table of strings"),
    "tensor twice": (GOOD[:-1] + b"," + GOOD[1:], 16, "'a' twice"),
    "key twice": (GOOD.replace(b'"dtype"', b'"shape": [4], "dtype"'), 16, "'shape' twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' twice"),
    "header a list": (b"[]", 0, "no '{' at byte 8"),
    "header empty": (b"", 0, "no '{' at byte 8"),
    "header begins with a space": (b" {}", 0, "no '{' at byte 8"),
    "header with a byte order mark": (b"\xef\xbb\xbf{}", 0, "no '{' at byte 8"),
    "header not closed": (b'{"a": 1', 0, "not JSON at byte 15"),
    "two headers": (b"{}{}", 0, "not JSON at byte 10"),
    "zero bytes after the header": (b"{}\0\0", 0, "not JSON at byte 10"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not UTF-8 at byte 10"),
    "half of a surrogate pair": (GOOD.replace(b"a", b"\\ud800", 1), 16, "half of a surrogate pair"),
    "not a number": (b'{"a": NaN}', 0, "NaN where only integers are allowed"),
    "endless": (b'{"a": Infinity}', 0, "Infinity where only integers are allowed"),
    "a million digits": (b'{"a": ' + b"9" * 10**6 + b"}", 0, "which is not a size"),
    "a million brackets": (b'{"a": ' + b"[" * 10**6, 0, "nested too deeply"),
    "single quotes": (b"{'a': 1}", 0, "not JSON at byte 9"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_crafted_header_is_refused_with_file_and_reason(attack: str, tmp_path: Path) -> None:
    header, size, message = ATTACKS[attack]
    path = craft(tmp_path / "model.safetensors", header, bytes(size))
    began = time.process_time()
    with pytest.raises(FormatError) as error:
        TensorFile(path)
    assert time.process_time() - began < 10  # 0.02 s; with the square of its size it would be minutes
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path)) and "\n" not in str(error.value)


def not_a_file(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on this system")
    os.mkfifo(path)


def dangling(path: Path) -> None:
    try:
        path.symlink_to(path.with_name("gone"))
    except OSError as error:
        pytest.skip(f"no links here: {error}")


def header_over_limit(path: Path) -> None:
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, MAX_HEADER + 100)


def header_of_zeros(path: Path) -> None:
    path.write_bytes((99_000_000).to_bytes(8, "little"))
    os.truncate(path, 99_000_100)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, "the file is missing"),
    "folder": (not_a_file, "folder"),
    "pipe": (pipe, "not a regular file"),
    "dangling link": (dangling, "the file is missing"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes long"),
    "seven bytes": (lambda path: path.write_bytes(bytes(7)), "7 bytes long"),
    "eight bytes": (lambda path: path.write_bytes(bytes(8)), "no '{' at byte 8"),
    "length 2^64 - 1": (
        lambda path: path.write_bytes(b"\xff" * 8),
        "the header length at byte 0 is 18446744073709551615",
    ),
    "header over 100 MB": (header_over_limit, "header length at byte 0 is 100000001"),
    "99 MB of zeros": (header_of_zeros, "no '{' at byte 8"),
    "header longer than the file": (lambda path: craft(path, b"{}", length=3), "header ends at byte 11"),
    "web page": (
        lambda path: path.write_bytes(b"<!DOCTYPE html><html>"),
        "check that it is a safetensors file",
    ),
    "pickle": (lambda path: path.write_bytes(b"\x80\x02}q\x00." * 9), "check that it is a safetensors file"),
    "LFS pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_safetensors_file_is_refused_quickly_and_without_memory(kind: str, tmp_path: Path) -> None:
    make, message = FILES[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(FormatError, match=str(path)) as error:
        TensorFile(path)
    assert time.process_time() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert message in str(error.value)


def sample(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "wide": rng.standard_normal((5, 7)),
        "half": rng.standard_normal((3, 4)).astype(np.float16),
        "odd": rng.integers(-9, 9, 3).astype(np.int8),
        "words": rng.integers(0, 2**32, (2, 3), dtype=np.uint32),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.empty((0, 4), np.float32),
        "ünïcode \x1b[31m": np.array([True, False]),
    }
    write(path, [entry(name, a) for name, a in arrays.items()], {"format": "pt", "ü": "é"})
    return arrays


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    sample(path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in {int(x) for x in np.linspace(0, len(whole) - 1, 60)}:
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="cut.safetensors"):
            TensorFile(cut)


def test_what_is_written_is_read_back_and_read_by_the_safetensors_library(tmp_path: Path) -> None:
    oracle = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    arrays = sample(path)
    file, theirs = TensorFile(path), oracle.load_file(path)
    assert set(file.names) == set(theirs) == set(arrays)
    for name, array in arrays.items():
        assert file.read(name).dtype == array.dtype and theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(file.read(name), array)
        np.testing.assert_array_equal(theirs[name], array)
    assert file.metadata == {"format": "pt", "ü": "é"}


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    oracle = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    codes = {name: code for name, code in DTYPES.items() if name != "BF16"}
    arrays = {name: np.arange(6).reshape(2, 3).astype(code) for name, code in codes.items()}
    oracle.save_file(arrays, path, {"key": "value"})
    file = TensorFile(path)
    for name, array in arrays.items():
        assert file.info(name) == (name, (2, 3))
        np.testing.assert_array_equal(file.read(name), array)
    assert file.metadata == {"key": "value"}


def test_bfloat16_goes_both_ways_as_bits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("safetensors.torch")
    x = torch.randn(5, 6, dtype=torch.float64).to(torch.bfloat16)
    oracle.save_file({"x": x}, tmp_path / "theirs.safetensors")
    bits = TensorFile(tmp_path / "theirs.safetensors").read("x")
    assert bits.dtype == np.uint16
    write(tmp_path / "ours.safetensors", [entry("x", bits, "BF16")])
    back = oracle.load_file(tmp_path / "ours.safetensors")["x"]
    assert back.dtype == torch.bfloat16 and torch.equal(back, x)


def test_reading_copies_nothing_and_the_map_outlives_the_file_object(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, [entry("a", np.arange(4, dtype=np.float32)), entry("b", np.arange(3, dtype=np.float16))])
    file = TensorFile(path)
    a = file.read("a")
    assert not a.flags.owndata and not a.flags.writeable and np.shares_memory(a, file.read("a"))
    del file
    np.testing.assert_array_equal(a, [0, 1, 2, 3])


def test_an_unaligned_tensor_is_copied_to_an_aligned_place(tmp_path: Path) -> None:
    """The format allows it. A native kernel would fault at such an address on some processors."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\x07" + np.array([1.5, -2], "<f4").tobytes()
    b = TensorFile(craft(tmp_path / "x.safetensors", header, data)).read("b")
    assert b.flags.aligned and b.tolist() == [1.5, -2]


def test_padding_spaces_and_a_header_without_tensors_are_good(tmp_path: Path) -> None:
    assert list(TensorFile(craft(tmp_path / "x", b"{}      ")).names) == []


def test_the_order_of_names_in_the_header_need_not_be_that_of_the_data(tmp_path: Path) -> None:
    header = two((0, 4), (4, 6))
    swapped = {"b": header["b"], "a": header["a"]}
    file = TensorFile(craft(tmp_path / "x", swapped, bytes([1, 2, 3, 4, 5, 6])))
    assert file.read("a").tolist() == [1, 2, 3, 4] and file.read("b").tolist() == [5, 6]


def test_every_written_tensor_is_aligned_and_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = [entry("a", np.ones(3, np.int8)), entry("b", np.ones(3, np.float16)), entry("c", np.ones(2))]
    write(tmp_path / "1", tensors)
    write(tmp_path / "2", tensors)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    file = TensorFile(tmp_path / "1")
    assert not any(file.read(name).flags.writeable for name in "abc")  # views: no copy was needed to align


def test_writing_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    size = 1 << 20
    make = [Entry(f"t{i}", "U8", (size,), lambda: np.ones(size, np.uint8)) for i in range(16)]
    tracemalloc.start()
    write(tmp_path / "x", make)
    merged = entries(TensorFile(tmp_path / "x"))
    write(tmp_path / "y", merged)
    assert tracemalloc.get_traced_memory()[1] < 3 * size
    tracemalloc.stop()
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, [entry("a", np.ones(3))])
    before = path.read_bytes()

    def broken() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, [entry("a", np.ones(9)), Entry("b", "F32", (2,), broken)])
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    (tmp_path / "x.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(TinychatError, match="x.safetensors: cannot be written: No space left"):
        write(path, [entry("a", np.ones(9))])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by signal")
def test_a_killed_write_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        import numpy as np
        from tinychat_mlx.weights.safetensors import Entry, entry, write
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        write(sys.argv[1], [entry("a", np.ones(99999)), Entry("b", "F32", (2,), die)])
    """
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False)
    assert done.returncode == -9 and os.listdir(tmp_path) == ["x.safetensors.partial"]
    write(path, [entry("a", np.ones(3))])
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tensor_leaves_memory_with_its_last_view(tmp_path: Path) -> None:
    path = craft(tmp_path / "x", one("U8", [1 << 26], [0, 1 << 26]))
    os.truncate(path, path.stat().st_size + (1 << 26))
    file = TensorFile(path)
    view = file.read("a").view(np.int8)[: 1 << 26]
    other = file.read("a")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    assert not view.any()
    before = resident()
    assert before - resident() < 1 << 20
    del view
    assert before - resident() > 60 << 20
    assert not other[-100:].any()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    sample(path)
    return path, path.read_bytes()


@given(
    flips=st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), min_size=1, max_size=4),
    grown=st.integers(-3, 3),
)
@settings(max_examples=400, deadline=None)
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(
    fuzzed: tuple[Path, bytes], flips: list[tuple[int, int]], grown: int
) -> None:
    """Never another exception, and never more lenient than safetensors."""
    oracle = pytest.importorskip("safetensors.numpy")
    path, whole = fuzzed
    data = bytearray(whole)
    for at, value in flips:
        data[at] = value
    path.write_bytes(data[:grown] if grown < 0 else data + bytes(grown))
    try:
        file = TensorFile(path)
        arrays = {name: file.read(name) for name in file.names}
    except FormatError as error:
        assert str(path) in str(error)
        return
    if any(file.info(name)[0] == "BF16" for name in arrays):
        return  # the library's NumPy side refuses it
    theirs = oracle.load(bytes(data if not grown else path.read_bytes()))
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert array.tobytes() == theirs[name].tobytes() and array.shape == theirs[name].shape


def test_opening_a_file_costs_a_few_calls_per_tensor(tmp_path: Path) -> None:
    """A model of 70,000 tensors opens in a second: nothing is compared with everything else."""
    cost = {}
    for n in (70, 700):
        tensors = [entry(f"model.layers.{i}.mlp.up_proj.weight", np.ones(4, np.float16)) for i in range(n)]
        write(tmp_path / "x", tensors)
        cost[n] = calls(lambda: TensorFile(tmp_path / "x"))
    assert cost[700] - cost[70] < 630 * 40
