"""Streaming decoding of tokens: the joined pieces equal the text of decoding all tokens at once.

Byte-level vocabularies (most models) use an incremental UTF-8 decoder. All others decode a window of a few tokens
again. tokenizers' DecodeStream is not used, because its text can differ from that of decode()
(tests/text/test_tokenizer.py has examples).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from tinychat_mlx.base.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RawTokenizer


class Stream(Protocol):
    """An incremental decoder. The results of all `push` and of `flush`, joined, equal decode(all ids)."""

    def push(self, token: int) -> str:
        """Add one token. Return the text that is now final, possibly empty."""

    def flush(self) -> str:
        """End the stream. Return the text held back."""


def stream(raw: RawTokenizer, hidden: frozenset[int], clean_up: bool) -> Stream:
    """Start a stream. hidden: tokens to leave out. clean_up: apply clean_up_spaces, as decode does."""
    decoder = json.loads(raw.decoder.__getstate__()) if raw.decoder is not None else {"type": None}
    steps = {step["type"] for step in decoder.get("decoders", [decoder])}
    inner: Stream
    if steps in ({"ByteLevel"}, {"ByteLevel", "Fuse"}):
        inner = ByteStream(raw, hidden)
    else:
        inner = WindowStream(raw, hidden, "ByteFallback" in steps, "ByteLevel" in steps)
    return CleanStream(inner) if clean_up else inner


class ByteStream:
    """For byte-level vocabularies: each token is some bytes, decoded as UTF-8 incrementally."""

    def __init__(self, raw: RawTokenizer, hidden: frozenset[int]) -> None:
        self._raw = raw
        # "replace" writes one U+FFFD per maximal broken part, as Rust's from_utf8_lossy does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes: dict[int, bytes] = dict.fromkeys(hidden, b"")

    def push(self, token: int) -> str:
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._bytes_of(token)
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, token: int) -> bytes:
        text = self._raw.id_to_token(token) or ""
        try:
            return bytes(map(_BYTE_OF.__getitem__, text))
        except KeyError:  # an added token, stored as plain characters
            return text.encode()


class WindowStream:
    """For all other decoders: decode the pending tokens after the last final one, and return the added text.

    These decoders treat the first token differently, and decode a run of byte tokens (<0xE2>) as a whole, or as one
    U+FFFD per byte if any byte is invalid. So a run is held back until its end.
    """

    def __init__(
        self, raw: RawTokenizer, hidden: frozenset[int], byte_runs: bool, half_characters: bool
    ) -> None:
        """byte_runs: the decoder joins byte tokens. half_characters: it decodes incomplete ones to U+FFFD."""
        self._raw = raw
        self._hidden = hidden
        self._byte_runs = byte_runs
        self._half_characters = half_characters
        self._context: list[int] = []  # the last decoded token, so that the next one is not the first
        self._pending: list[int] = []
        self._shown = ""  # the text of _context

    def push(self, token: int) -> str:
        name = self._raw.id_to_token(token)
        if token in self._hidden or name is None:
            return ""
        self._pending.append(token)
        if self._byte_runs and len(name) == 6 and name.startswith("<0x"):
            return ""
        text = self._decode(self._context + self._pending)
        if self._half_characters and text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        self._context, self._pending = [token], []
        self._shown = self._decode(self._context)
        return new

    def flush(self) -> str:
        new = self._decode(self._context + self._pending)[len(self._shown) :]
        self._context, self._pending, self._shown = [], [], ""
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._raw.decode(tokens, skip_special_tokens=False)


class CleanStream:
    """Removes the spaces that clean_up_spaces removes, and holds back text that may still change."""

    def __init__(self, inner: Stream) -> None:
        self._inner = inner
        self._held = ""

    def push(self, token: int) -> str:
        self._held += self._inner.push(token)
        cut = self._held.rfind(" ")
        while cut > 0 and not self._is_border(cut):
            cut = self._held.rfind(" ", 0, cut)
        if cut <= 0:
            return ""
        done, self._held = self._held[:cut], self._held[cut:]
        return clean_up_spaces(done)

    def _is_border(self, at: int) -> bool:
        """Whether no pattern can match across the position before the space at `at`.

        Every pattern begins with a space. Only " ' " has a second space. Only "n" can become part of a pattern (" n't")
        when that space is removed.
        """
        before, after = self._held[at - 1], self._held[at + 1 : at + 2]
        return before not in " '" and not (before == "n" and after in ("", " ", "'"))

    def flush(self) -> str:
        done, self._held = self._held + self._inner.flush(), ""
        return clean_up_spaces(done)


def clean_up_spaces(text: str) -> str:
    """Remove spaces before punctuation, as transformers does for word-level vocabularies (not for BPE)."""
    for pattern in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(pattern, pattern.strip(" "))
    return text


class StopMatcher:
    """Finds stop strings in streamed text. No part of a stop string is ever returned.

    The first stop string to be complete ends the text, so the result does not depend on the piece boundaries.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string is empty", where="stop", remedy="leave it out")
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text. Return the text that may be shown, and whether a stop string ended it."""
        if self._stopped:
            return "", True
        text = self._held + text
        # (end, start) of the first complete match; among equal ends, the longest
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """End the text. Return the text held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of text that is a proper prefix of stop."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _byte_alphabet() -> dict[str, int]:
    """Return the character for each byte in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable bytes map to themselves, the other 68 to the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
