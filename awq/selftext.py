"""The model writes its own calibration text, so that nothing need be downloaded.

Many conversations decode together, one row each, and begin with the kinds of text of openings.py in turn. A chat
model completes questions and answers them behind the template's generation prompt, as it will in a chat. The weights are rounded to 8 bits for this, which changes hardly a token and halves the
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.openings import dealt
from tinychat_mlx.awq.settings import fitting_group
from tinychat_mlx.awq.stream import Ids, Progress, Watch
from tinychat_mlx.awq.tensors import rounded_rows
from tinychat_mlx.backend import Backend, Segment
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.decoder import Decoder, Source
from tinychat_mlx.errors import TinychatError, TokenizerError
from tinychat_mlx.tokenizer import Tokenizer
from tinychat_mlx.weight import F32, Dense, Weight

# At 1 a small model derails now and then: KL of the demo at 4 bits 0.0032, at 0.9 0.0029, with real text 0.0028.
TEMPERATURE = 0.9
AT_ONCE = 32  # conversations, if that leaves them SHORTEST tokens: 32 rows decode in hardly more time than 16
SHORTEST = 256
STRETCH = 512  # tokens of the vocabulary whose probabilities are summed as one
MARKS = ("AWQFIRSTMARK", "AWQSECONDMARK", "AWQTHIRDMARK")


class RoundedSource:
    """A source whose matrices are rounded to 8 bits as they are read."""

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
    """Sample about `wanted` tokens in conversations of at most `window` -> tokens (T,), one after another."""
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
        watch(Progress("calibrate", at + 1, length, f"the model writes {count} conversations"))
    return ids.reshape(-1)


def conversations(wanted: int, window: int) -> tuple[int, int]:
    """-> how many there will be, tokens of each."""
    length = min(window, max(SHORTEST, -(-wanted // AT_ONCE)))
    return -(-wanted // length), length


def sampled(logits: F32, rng: np.random.Generator) -> list[int]:
    """One token a row (B, V), at TEMPERATURE: first a stretch of the vocabulary, then a token of it."""
    p = logits - logits.max(-1, keepdims=True)
    p *= np.float32(1 / TEMPERATURE)
    np.exp(p, out=p)
    sums = np.add.reduceat(p, np.arange(0, p.shape[1], STRETCH), axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():
        raise TinychatError(
            "the model's logits are not finite: its weights are damaged or overflow — download it again, or take another"
        )
    return [_drawn(*row) for row in zip(p, np.cumsum(sums, 1), rng.random(len(p)), strict=True)]


def _drawn(p: F32, total: npt.NDArray[np.float64], share: float) -> int:
    """The token at `share` of what all p sum to; total: the sums up to the end of each stretch."""
    at = share * total[-1]
    stretch = int(np.searchsorted(total, at, side="right"))
    start = stretch * STRETCH
    before = total[stretch - 1] if stretch else 0.0
    inside = np.cumsum(p[start : start + STRETCH], dtype=np.float64)
    return start + min(int(np.searchsorted(inside, at - before, side="right")), len(inside) - 1)


class _Writer:
    """Says which token comes next in one conversation: a given one, or the one the model chose."""

    def __init__(self, turns: Iterator[list[int]], stops: tuple[frozenset[int], frozenset[int]]) -> None:
        """turns: what is given before each turn. stops: what ends the model's turns, in turn."""
        self.turns, self.stops = turns, cycle(stops)
        self._begin()

    def _begin(self) -> None:
        self.forced, self.ends = next(self.turns), next(self.stops)

    def next(self, choice: int) -> int:
        """The next token; where the model ends a turn, the template's words between turns follow."""
        if not self.forced and choice in self.ends:
            self._begin()
        return self.forced.pop(0) if self.forced else choice


def writers(
    tokenizer: Tokenizer, stops: frozenset[int], count: int, rng: np.random.Generator
) -> list[_Writer]:
    """The conversations. With a chat template the model completes a question, and writes answers and further questions;
    without one it continues a text, and begins another after each end.
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
    """What a chat template writes round the messages' contents.

    opening: before the first question. to_answer, to_next_answer: between a question and the model's first word, the
    generation prompt included. to_question: between an answer and the next question, as the history has it.
    user_ends: whether to_answer begins with a token that can only end a user's words.
    """

    opening: str
    to_answer: str
    to_question: str
    to_next_answer: str
    user_ends: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Turns | None:
        """Rendered with marks in the place of contents; None: no template, or one that does not show them as they are."""
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
        try:
            opening, to_answer = _around(tokenizer.render(chat[:1], add_generation_prompt=True), MARKS[:1])
            _, history, to_question, to_next = _around(
                tokenizer.render(chat, add_generation_prompt=True), MARKS
            )
            if tokenizer.render(chat[:1], add_generation_prompt=False) == opening + MARKS[0] + to_answer:
                # Without a generation prompt of its own, a template shows how an answer begins in its history only.
                to_answer = to_next = history if history.strip() != to_answer.strip() else to_answer
        except TokenizerError:
            return None
        ends = tokenizer.starts_with_special(to_answer.lstrip())
        return cls(opening, to_answer, to_question, to_next, ends)


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """The parts of a text before, between and behind marks. Raises TokenizerError where one is missing."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise TokenizerError("the template does not show a message as it is")
        parts.append(before)
    return [*parts, text]
