"""Reader and writer of safetensors files: mapped, checked before use, written atomically.

    u64 header length (little-endian) | JSON header, padded with spaces | data

The header maps each name to {"dtype", "shape", "data_offsets": [begin, end]}, with offsets from the start of the
data, and "__metadata__" to a table of strings.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from tinychat_mlx.base.errors import FormatError, TinychatError
from tinychat_mlx.base.files import open_regular
from tinychat_mlx.weights.weight import Array

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_RANK = 32  # NumPy 1's limit
METADATA = "__metadata__"
# NumPy has no bfloat16: its bits are read as uint16.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
_NUMPY = {name: np.dtype(code) for name, code in DTYPES.items()}
Where = Path | str  # a file, as named in messages
_AGAIN = "download the file again"
_CHECK = "check that it is a safetensors file"
_OTHER = "use another upload of the model"


class Span(NamedTuple):
    """The dtype, shape and byte range of one tensor in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, mapped read-only. It stays mapped until the last array read from it is deleted.

    Opening checks the whole header and raises FormatError. If another program shortens the file later, access kills the
    process, as for every mapped file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map = _map(self.path)
        end = header_end(self.path, self._map, len(self._map))
        with memoryview(self._map) as view, view[8:end] as header:
            self.metadata, self._spans = described(self.path, header, len(self._map))

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors, in the order of the header."""
        return self._spans.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the dtype as safetensors names it, and the shape."""
        span = self._span(name)
        return span.dtype, span.shape

    def nbytes(self, name: str) -> int:
        span = self._span(name)
        return span.end - span.begin

    def read(self, name: str) -> Array:
        """Return a read-only view into the map; BF16 as its bits in uint16.

        A tensor is copied only if its start is not a multiple of the item size. When its last view is deleted, its pages
        leave memory, so that reading a model tensor by tensor does not keep it in memory.
        """
        span = self._span(name)
        dtype = _NUMPY[span.dtype]
        count = (span.end - span.begin) // dtype.itemsize
        if count == 0:
            return np.empty(span.shape, dtype)
        flat = np.frombuffer(self._map, dtype, count, span.begin)
        weakref.finalize(flat, _leave_memory, self._map, span).atexit = False  # views keep `flat` alive
        return (flat if flat.flags.aligned else flat.copy()).reshape(span.shape)

    def _span(self, name: str) -> Span:
        span = self._spans.get(name)
        if span is None:
            raise FormatError(f"tensor {show(name)} is missing", where=self.path)
        return span


def _leave_memory(data: mmap.mmap, span: Span) -> None:
    """Drop a tensor's pages. Other arrays of it stay valid and read the pages again."""
    page = mmap.PAGESIZE
    first, last = -(-span.begin // page) * page, span.end // page * page
    if first < last and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_DONTNEED, first, last - first)


def show(name: object) -> str:
    """Quote, escape and shorten a name from an untrusted file for a message."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}…{text[-15:]}"


def _map(path: Path) -> mmap.mmap:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_length(path, size)
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"cannot be mapped: {reason}", where=path) from None


def _check_length(path: Where, size: int) -> None:
    if size < 8:
        _bad(path, f"{size} bytes long; the header length takes 8")


def _bad(path: Where, what: str, remedy: str = _AGAIN) -> NoReturn:
    raise FormatError(what, where=path, remedy=remedy)


class _BadHeader(ValueError):
    """Valid JSON that a safetensors header must not contain."""


def header_end(path: Where, data: bytes | mmap.mmap, size: int) -> int:
    """Return the offset of the header's end. data: at least the first 23 of the file's `size` bytes.

    Raises FormatError if it is not a safetensors file.
    """
    _check_length(path, size)
    if data[:23] == b"version https://git-lfs":
        _bad(path, "a Git LFS pointer, not the weights", "run `git lfs pull` in its folder")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        _bad(path, f"the header length at byte 0 is {length}; at most {MAX_HEADER} is allowed", _CHECK)
    if 8 + length > size:
        _bad(path, f"the header ends at byte {8 + length}, the file has {size}")
    if data[8:9] != b"{" or not length:
        _bad(path, "no '{' at byte 8, where the header begins", _CHECK)
    return 8 + length


def described(path: Where, header: memoryview, size: int) -> tuple[dict[str, str], dict[str, Span]]:
    """Parse and check a header -> its metadata, and the Span of every tensor. Raises FormatError."""
    table = _parse(path, header)
    metadata = _metadata(path, table.pop(METADATA, {}))
    return metadata, _spans(path, table, 8 + len(header), size)


def _parse(path: Where, header: memoryview) -> dict[str, Any]:
    try:
        text = str(header, "utf-8")
    except UnicodeDecodeError as error:
        _bad(path, f"the header is not UTF-8 at byte {8 + error.start}")
    try:
        parsed: dict[str, Any] = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _bad(path, "the header has half of a surrogate pair, which is not a character")
    except json.JSONDecodeError as error:
        _bad(path, f"the header is not JSON at byte {8 + len(text[: error.pos].encode())}: {error.msg}")
    except _BadHeader as error:
        _bad(path, f"the header has {error}")
    except RecursionError:
        _bad(path, "the header is nested too deeply")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _BadHeader(f"{show(twice)} twice")
    return table


def _integer(digits: str) -> int:
    if len(digits) > 19 or digits[0] == "-":  # over 2**63; converting a million digits would take minutes
        raise _BadHeader(f"the number {digits[:20]}, which is not a size")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise _BadHeader(f"{text[:20]} where only integers are allowed")


def _metadata(path: Where, table: Any) -> dict[str, str]:
    if type(table) is not dict or not all(type(v) is str for v in table.values()):
        _bad(path, f"{METADATA} is not a table of strings")
    strings: dict[str, str] = table
    return strings


def _spans(path: Where, header: dict[str, Any], start: int, size: int) -> dict[str, Span]:
    """Check each tensor against its shape, and all against the file: no gap, no overlap.

    start: offset of the data in the file. size: bytes of the file.
    """
    spans = {name: _span(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.end > size:
            _bad(path, f"{show(name)} ends at byte {span.end}, the file has {size}")
        if span.begin != end:
            wrong = "overlaps the tensor before it" if span.begin < end else "leaves a hole before it"
            _bad(path, f"{show(name)} begins at byte {span.begin}, not at {end}: it {wrong}")
        end = span.end
    if end != size:
        _bad(path, f"the last tensor ends at byte {end}, the file has {size}")
    return spans


def _span(path: Where, name: str, entry: Any, start: int) -> Span:
    where = f"tensor {show(name)}"
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _bad(path, f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _NUMPY:
        _bad(path, f"{where} has dtype {show(dtype)}; tinychat reads {' '.join(DTYPES)}", _OTHER)
    if not _naturals(shape) or len(shape) > MAX_RANK:
        _bad(path, f"{where} has shape {show(shape)}, not up to {MAX_RANK} dimensions")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _bad(path, f"{where} has data_offsets {show(offsets)}, not [begin, end]")
    itemsize = _NUMPY[dtype].itemsize
    if math.prod(d or 1 for d in shape) * itemsize >= 2**63:  # NumPy's own arithmetic would overflow
        _bad(path, f"{where} has shape {show(shape)}, too large for any file")
    begin, end = offsets
    if end - begin != math.prod(shape) * itemsize:
        need = math.prod(shape) * itemsize
        _bad(path, f"{where} needs {need} bytes as {dtype} {show(shape)}, data_offsets give {end - begin}")
    return Span(dtype, tuple(shape), start + begin, start + end)


def _naturals(value: Any) -> bool:
    return type(value) is list and all(type(d) is int and 0 <= d < 2**63 for d in value)


class Entry(NamedTuple):
    """A tensor to write. data may be a function that is called when it is written: one is in memory at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Array | Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _NUMPY[self.dtype].itemsize


def entry(name: str, array: Array, dtype: str | None = None) -> Entry:
    """Return an array as an Entry. dtype: "BF16" if uint16 holds bfloat16 bits."""
    spelled = next(key for key, code in _NUMPY.items() if code == array.dtype)
    return Entry(name, dtype or ("U16" if spelled == "BF16" else spelled), array.shape, array)


def entries(file: TensorFile) -> list[Entry]:
    """Return all tensors of an open file, each read only when it is written (to merge or split files)."""
    return [Entry(name, *file.info(name), partial(file.read, name)) for name in file.names]


def write(path: Path | str, tensors: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with one tensor in memory at a time. The same input gives the same bytes.

    Tensors with larger items come first, so that all stay aligned; otherwise the order is kept. Raises TinychatError
    if the disk refuses; then no partial file remains.
    """
    ordered = sorted(tensors, key=lambda tensor: -_NUMPY[tensor.dtype].itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        assert tensor.name not in header, f"{tensor.name} written twice"
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            array = tensor.data() if callable(tensor.data) else tensor.data
            assert array.dtype == _NUMPY[tensor.dtype] and array.shape == tensor.shape, tensor.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`, and rename it to `path` when it is complete and on disk.

    At any time `path` is the old file, the new file or absent. A killed process leaves `<name>.partial`, which the next
    attempt overwrites.
    """
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
        sync_folder(path.parent)
    except OSError as error:
        raise TinychatError(
            f"cannot be written: {error.strerror or error}",
            where=path,
            remedy="make room, or choose another folder",
        ) from None
    finally:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable (POSIX; Windows has no such call)."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
