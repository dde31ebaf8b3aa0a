"""Let the model generate its own calibration text, so that no download is needed.

Many conversations decode together, one row each. They start with the kinds of text of openings.py in turn. A
chat model completes questions and answers them after the template's generation prompt, as in a chat. The
weights are rounded to 8 bits, which changes few tokens and halves the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.calibration.openings import dealt
from tinychat_mlx.awq.layer_stream import Ids, Progress, Watch
from tinychat_mlx.awq.output.tensors import rounded_rows
from tinychat_mlx.awq.settings import fitting_group
from tinychat_mlx.base.errors import TinychatError, TokenizerError
from tinychat_mlx.contract import Backend, Segment
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Decoder, Source
from tinychat_mlx.text.tokenizer import Tokenizer
from tinychat_mlx.weights.weight import F32, Dense, Weight

# At 1 a small model sometimes degenerates. KL of the demo at 4 bits: 0.0032 at 1, 0.0029 at 0.9, 0.0028 with
# real text.
TEMPERATURE = 0.9
AT_ONCE = 32  # conversations, if each has SHORTEST tokens; 32 rows take hardly more time than 16
SHORTEST = 256
STRETCH = 512  # vocabulary entries per partial sum of probabilities
MARKS = ("AWQFIRSTMARK", "AWQSECONDMARK", "AWQTHIRDMARK")


class RoundedSource:
    """A source that rounds matrices to 8 bits when they are read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        weight = self.source.weight(module, shape)
        size = fitting_group([weight.shape[1]])
        return rounded_rows(weight, 8, size) if isinstance(weight, Dense) and size else weight

    def vector(self, name: str) -> F32:
        return self.source.vector(name)


def write_text(
    config: ModelConfig,
    source: Source,
    backend: Backend,
    tokenizer: Tokenizer,
    stops: frozenset[int],
    wanted: int,
    window: int,
    seed: Sequence[int],
    watch: Watch,
) -> Ids:
    """Sample about `wanted` tokens in conversations of at most `window` tokens.

    Returns tokens (T,), concatenated.
    """
    decoder = Decoder(config, RoundedSource(source), backend)
    count, length = conversations(wanted, window)
    rng = np.random.default_rng(seed)
    scripts = writers(tokenizer, stops, count, rng)
    caches = [decoder.new_cache(length) for _ in scripts]
    ids = np.empty((count, length), np.int32)
    logits = None
    for at in range(length):
        choices = sampled(logits, rng) if logits is not None else [0] * count
        ids[:, at] = [writer.next(choice) for writer, choice in zip(scripts, choices, strict=True)]
        step = backend.step([Segment(cache, 1) for cache in caches])
        x = decoder.graph.embedded(decoder.inputs, backend.ids(ids[:, at].tolist()), step)
        for layer in decoder.layers:
            x = decoder.graph.block(x, layer, step)
        for cache in caches:
            cache.length += 1
        logits = backend.to_host(decoder.graph.logits(x, decoder.final_norm, decoder.head))
        watch(Progress("calibrate", at + 1, length, f"generating {count} conversations"))
    return ids.reshape(-1)


def conversations(wanted: int, window: int) -> tuple[int, int]:
    """Return the number of conversations and the tokens of each."""
    length = min(window, max(SHORTEST, -(-wanted // AT_ONCE)))
    return -(-wanted // length), length


def sampled(logits: F32, rng: np.random.Generator) -> list[int]:
    """Sample one token per row of logits (B, V) at TEMPERATURE. Choose a stretch of the vocabulary first."""
    p = logits - logits.max(-1, keepdims=True)
    p *= np.float32(1 / TEMPERATURE)
    np.exp(p, out=p)
    sums = np.add.reduceat(p, np.arange(0, p.shape[1], STRETCH), axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():
        raise TinychatError(
            "the model's logits are not finite: its weights are damaged or overflow",
            remedy="download the model again, or choose another one",
        )
    return [_drawn(*row) for row in zip(p, np.cumsum(sums, 1), rng.random(len(p)), strict=True)]


def _drawn(p: F32, total: npt.NDArray[np.float64], share: float) -> int:
    """Return the token at `share` of the sum of p. total: cumulative sums at the end of each stretch."""
    at = share * total[-1]
    stretch = int(np.searchsorted(total, at, side="right"))
    start = stretch * STRETCH
    before = total[stretch - 1] if stretch else 0.0
    inside = np.cumsum(p[start : start + STRETCH], dtype=np.float64)
    return start + min(int(np.searchsorted(inside, at - before, side="right")), len(inside) - 1)


class _Writer:
    """Chooses the next token of one conversation: a prescribed token, or the one the model sampled."""

    def __init__(self, turns: Iterator[list[int]], stops: tuple[frozenset[int], frozenset[int]]) -> None:
        """turns: the tokens before each turn. stops: the stop tokens of the model's turns, alternating."""
        self.turns, self.stops = turns, cycle(stops)
        self._begin()

    def _begin(self) -> None:
        self.forced, self.ends = next(self.turns), next(self.stops)

    def next(self, choice: int) -> int:
        """Return the next token. After a stop token, the template's text between turns follows."""
        if not self.forced and choice in self.ends:
            self._begin()
        return self.forced.pop(0) if self.forced else choice


def writers(
    tokenizer: Tokenizer, stops: frozenset[int], count: int, rng: np.random.Generator
) -> list[_Writer]:
    """Create the conversations.

    With a chat template, the model completes a question, then writes answers and further questions. Without
    one, it continues a text and starts another one after each end.
    """
    template = Turns.of(tokenizer)
    beginnings = dealt(tokenizer, template is not None, rng)
    if template is None:
        return [_Writer(map(tokenizer.encode, beginnings), (stops, stops)) for _ in range(count)]

    def encoded(part: str) -> list[int]:
        return tokenizer.encode(part, special=False)

    t = template
    asked = stops | {encoded(t.to_answer.lstrip())[0]} if t.user_ends else stops
    made = []
    for begun, _ in zip(beginnings, range(count), strict=False):
        given = chain([t.opening + begun, t.to_answer], cycle([t.to_question, t.to_next_answer]))
        made.append(_Writer(map(encoded, given), (asked, stops)))
    return made


@dataclass(frozen=True)
class Turns:
    """The text that a chat template writes around message contents.

    opening: before the first question. to_answer, to_next_answer: between a question and the answer,
    including the generation prompt. to_question: between an answer and the next question in the history.
    user_ends: whether to_answer starts with a token that only ends a user turn.
    """

    opening: str
    to_answer: str
    to_question: str
    to_next_answer: str
    user_ends: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Turns | None:
        """Render the template with marks as contents.

        None if there is no template or it changes the contents.
        """
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
        try:
            opening, to_answer = _around(tokenizer.render(chat[:1], add_generation_prompt=True), MARKS[:1])
            _, history, to_question, to_next = _around(
                tokenizer.render(chat, add_generation_prompt=True), MARKS
            )
            if tokenizer.render(chat[:1], add_generation_prompt=False) == opening + MARKS[0] + to_answer:
                # A template without a generation prompt shows how an answer begins only in its history.
                to_answer = to_next = history if history.strip() != to_answer.strip() else to_answer
        except TokenizerError:
            return None
        ends = tokenizer.starts_with_special(to_answer.lstrip())
        return cls(opening, to_answer, to_question, to_next, ends)


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """Split a text at marks. Raises TokenizerError if a mark is missing."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise TokenizerError("the template does not show a message unchanged")
        parts.append(before)
    return [*parts, text]
