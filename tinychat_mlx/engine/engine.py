"""The engine: prompt tokens -> a stream of events. Reuses the tokens that the KV cache already holds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinychat_mlx.base.errors import ConfigError, ContextFullError, UsageError
from tinychat_mlx.contract import Cache, Tensor
from tinychat_mlx.engine.prefix_cache import PART, PrefixStore
from tinychat_mlx.engine.sampler import Sampler, SamplingParams, choice_of
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.text.streaming import Stream
from tinychat_mlx.weights.weight import Array

PREFILL_ROWS = 512  # largest prefill step in tokens: enough to be compute-bound
FIRST_ROWS = 24  # tokens of the first step, which measures the speed of the device
PIECE_S = 0.5  # target duration of a step in seconds: an answer can be cancelled only between steps


@dataclass(frozen=True)
class Stats:
    """Cost of one answer. Times are of this call; token counts include reused tokens."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    context_used: int
    context_max: int
    finish_reason: str  # stop | length | context | cancelled
    dropped_messages: int = 0


@dataclass(frozen=True)
class Event:
    """A "prefill" event has done and total, a "text" event has text; the last event is "end" and has stats."""

    kind: str
    text: str = ""
    done: int = 0
    total: int = 0
    stats: Stats | None = None


class Stops(Protocol):
    """Holds back text that may be the start of a stop string."""

    def push(self, text: str) -> tuple[str, bool]: ...

    def flush(self) -> str: ...


class Engine:
    """One conversation's cache on one decoder. A second concurrent call raises UsageError."""

    def __init__(self, decoder: Decoder, context: int) -> None:
        self.decoder, self.context = decoder, context
        self.cache: Cache | None = None
        self.ids: list[int] = []  # ids[:cache.length] are in the cache
        self.answer: list[int] = []  # tokens of the last answer that were decoded to text
        self.rows = FIRST_ROWS  # tokens of the next prefill step, by the speed measured so far
        self.lock = threading.Lock()
        self.prefixes: PrefixStore | None = None  # stores computed keys and values on disk between runs
        self._rows = threading.Lock()  # held while the cache is read or written
        self._keeper: threading.Thread | None = None

    def reuse(self, prompt: Sequence[int]) -> int:
        """Rewind to the longest common prefix with prompt, leaving at least one token to compute -> its length.

        Tokens that the cache lacks may come from the prefix store.
        """
        if self.cache is None:
            self.cache = self.decoder.new_cache(self.context)
        common, most = 0, min(self.cache.length, len(prompt) - 1)
        while common < most and self.ids[common] == prompt[common]:
            common += 1
        self.cache.rewind(common)
        self.ids, self.answer = list(prompt), []
        if self.prefixes is not None and len(prompt) - common > PART:  # fewer are computed as fast
            self.prefixes.restore(self.decoder.backend, self.cache, prompt[:-1])
        return self.cache.length

    def prime(self, ids: Sequence[int]) -> None:
        """Restore the saved state for ids before the first answer is requested.

        Compute the few tokens that are not on disk; this also warms up the device.
        """
        if ids and len(ids) < self.context and self.prefixes is not None:
            with self._rows:
                done = self.reuse(ids)
                if self.cache is not None and 0 < done and len(ids) - done <= FIRST_ROWS:
                    self.decoder.backend.to_host(self.decoder.forward(ids[done:], self.cache))
                    done = len(ids)
                del self.ids[done:]

    def keep(self, whole: bool = False) -> None:
        """Write the cache to the prefix store in the background.

        whole: write the last incomplete part, too, and wait until all is written. Used at the end of a conversation.
        """
        if self.prefixes is None or self.cache is None:
            return
        if self._keeper is not None and self._keeper.is_alive():
            if not whole:
                return  # the next answer calls this again
            self._keeper.join()
        ids, store = self.ids[: self.cache.length], self.prefixes

        def read(start: int, end: int) -> dict[str, Array] | None:
            with self._rows:  # waits while an answer is generated
                if self.cache is None or self.cache.length < end or self.ids[:end] != ids[:end]:
                    return None
                return self.decoder.backend.read_cache(self.cache, start, end)

        self._keeper = threading.Thread(target=store.save, args=(ids, read, whole), daemon=True)
        self._keeper.start()
        if whole:
            self._keeper.join()

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        stream: Stream,
        stops: Stops | None = None,
        dropped_messages: int = 0,
    ) -> Iterator[Event]:
        """Generate an answer. Closing the iterator, or an interrupt, cancels within one token.

        Raises UsageError for an empty prompt and ContextFullError for one that leaves no room for an answer.
        """
        self.check(prompt)
        if not self.lock.acquire(blocking=False):
            raise UsageError(
                "this model is already generating an answer", remedy="finish or close that answer first"
            )
        try:
            with self._rows:
                yield from self._answer(_Run(self, prompt, params, dropped_messages), stop_ids, stream, stops)
        finally:
            self.lock.release()

    def _answer(
        self, run: _Run, stop_ids: frozenset[int], stream: Stream, stops: Stops | None
    ) -> Iterator[Event]:
        try:
            yield from run.prefill()
            yield from run.decode(stop_ids, stream, stops)
        finally:
            if self.cache is not None:
                del self.ids[self.cache.length :]  # an interrupt may leave a token that was not computed
                self.cache.rewind(len(self.ids))  # a step in flight may have added one token

    def check(self, prompt: Sequence[int]) -> None:
        vocabulary = self.decoder.config.vocab_size
        if not prompt:
            raise UsageError("the prompt is empty", remedy="give at least one token")
        if any(not 0 <= t < vocabulary for t in prompt):
            raise UsageError(
                f"the prompt has a token outside the vocabulary of {vocabulary}",
                remedy="encode it with this model's own tokenizer",
            )
        if len(prompt) >= self.context:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.context} and the answer needs room",
                remedy="shorten the prompt, clear the conversation (/clear), or load the model with a larger --context",
            )


def rows_within(seconds: float, rows: int, took: float) -> int:
    """Return the rows of the next step from the time of one with `rows`: FIRST_ROWS × 2^n, at most PREFILL_ROWS.

    Powers of 2 keep the steps, and so the rounding of results, independent of small differences in speed.
    """
    times = rows * seconds / max(took, 1e-9) / FIRST_ROWS
    return min(PREFILL_ROWS, FIRST_ROWS << int(math.log2(max(times, 1))))


class _Run:
    """The state of one answer."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams, dropped: int) -> None:
        self.engine, self.prompt, self.params, self.dropped = engine, prompt, params, dropped
        self.start = time.perf_counter()
        self.first = 0.0  # time of the first token
        self.cached = engine.reuse(prompt)
        self.completion = 0
        self.choice = choice_of(params)

    def prefill(self) -> Iterator[Event]:
        """Compute the prompt's new tokens in pieces; keeps the logits of the last."""
        engine, total = self.engine, len(self.prompt)
        assert engine.cache is not None
        at = self.cached
        while at < total:
            start = time.perf_counter()
            # Include a short remainder: a separate step would read every weight again.
            with_end = min(engine.rows + FIRST_ROWS // 2, PREFILL_ROWS)
            piece = self.prompt[at : total if total - at <= with_end else at + engine.rows]
            self.logits = engine.decoder.forward(piece, engine.cache, choice=self.choice)
            at += len(piece)
            if at < total:
                engine.decoder.backend.to_host(self.logits)  # waits: queued work would look too fast
                engine.rows = rows_within(PIECE_S, len(piece), time.perf_counter() - start)
            yield Event("prefill", done=at - self.cached, total=total - self.cached)

    def decode(self, stop_ids: frozenset[int], stream: Stream, stops: Stops | None) -> Iterator[Event]:
        """Sample until a stop condition. Yields text in whole characters, then the end event."""
        engine, cache = self.engine, self.engine.cache
        assert cache is not None
        reason, stopped = "length", False
        for token in self.tokens(cache):
            self.completion += 1
            self.first = self.first or time.perf_counter()
            if token in stop_ids:
                reason = "stop"
                break
            engine.answer.append(token)
            text = stream.push(token)
            if stops is not None:
                text, stopped = stops.push(text)
            if text:
                yield Event("text", text)
            if stopped:
                reason = "stop"
                break
            if self.completion == self.params.max_tokens:
                break
            if len(engine.ids) >= cache.capacity:
                reason = "context"
                break
        if not stopped:
            tail = stream.flush()
            tail = tail if stops is None else stops.push(tail)[0] + stops.flush()
            if tail:
                yield Event("text", tail)
        yield Event("end", stats=self.stats(reason))

    def tokens(self, cache: Cache) -> Iterator[int]:
        """Yield the answer's tokens without end. A token is appended to engine.ids when the next is requested."""
        p, backend = self.params, self.engine.decoder.backend
        draw = backend.sampler(
            p.temperature, p.top_k, p.top_p, p.min_p, p.seed, p.repetition_penalty, self.engine.ids
        )
        return self.tokens_in_turn(cache) if draw is None else self.tokens_ahead(cache, draw)

    def tokens_in_turn(self, cache: Cache) -> Iterator[int]:
        """Sample on the host, then compute."""
        engine, decoder, sampler = self.engine, self.engine.decoder, Sampler(self.params)
        while True:
            token = sampler(decoder.backend.to_host(self.logits)[-1], engine.ids)
            yield token
            engine.ids.append(token)
            self.logits = decoder.forward((token,), cache, choice=self.choice)

    def tokens_ahead(self, cache: Cache, draw: Callable[[Tensor], Tensor]) -> Iterator[int]:
        """Sample on the device with one step in flight: the next step starts before the token is read."""
        engine, decoder = self.engine, self.engine.decoder
        token = draw(self.logits)
        while True:
            following = None
            if cache.length < cache.capacity and self.completion + 1 != self.params.max_tokens:
                following = draw(decoder.advance(token, cache, self.choice))
            value = int(decoder.backend.to_host(token)[0])
            if value < 0:
                raise ConfigError(
                    "the model's logits are not finite: its weights are damaged or overflow",
                    remedy="download the model again, or choose another one",
                )
            yield value
            engine.ids.append(value)
            assert following is not None, "asked for a token past the end"
            token = following

    def stats(self, reason: str) -> Stats:
        now, computed = time.perf_counter(), len(self.prompt) - self.cached
        after_first = self.completion - 1
        return Stats(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.completion,
            ttft_s=self.first - self.start,
            prefill_tok_s=computed / max(self.first - self.start, 1e-9),
            decode_tok_s=after_first / (now - self.first) if after_first > 0 else 0.0,
            context_used=len(self.engine.ids),
            context_max=self.engine.context,
            finish_reason=reason,
            dropped_messages=self.dropped,
        )
