"""The model writes its own calibration text, so that nothing need be downloaded.

Many conversations decode together, one row each. A chat model is given the beginning of a user's turn, in every
other conversation with the first words of a question, and writes question and answer; any other model starts from
one of the openings below. The weights are rounded to 8 bits for this, which changes hardly a token and halves the
memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.stream import Ids, Progress, Watch
from tinychat_mlx.awq.tensors import rounded_rows
from tinychat_mlx.backend import Backend, Segment
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.decoder import Decoder, Source
from tinychat_mlx.errors import TinychatError, TokenizerError
from tinychat_mlx.tokenizer import Tokenizer
from tinychat_mlx.weight import F32, Dense, Weight

OPENINGS = (
    "The", "In", "I", "A", "We", "It was", "He said", "She", "This is", "When", "Why", "How to", "What is",
    "Once upon a time", "The history of", "According to", "Abstract:", "Chapter 1", "Dear", "To make",
    "import", "def ", "#include <", "function ", "SELECT", "<html>", "# ", "1.", "Q: ", "2 + 2 =",
    "Le", "Der", "El", "Il", "Die", "Les", "На", "中", "日本", "O", "En", "Question:",
)  # fmt: skip
# What a user's turn begins with. Where all begin so, the demo loses 9 % more at 3 bits (it knows no other language);
# where every other does, awq+ loses 4 % less than where none does.
QUESTIONS = (
    "What", "How", "Why", "Who", "When", "Where", "Can you", "Write", "Tell me", "Explain", "I", "My", "Please",
    "Is", "Give me", "In", "The", "Let's", "Make a list of", "Do you", "Which", "Hi", "```python", "def ", "2 + 2",
    "1.", "Was ist", "Wie", "¿Qué", "Comment", "Qu'est-ce", "如何", "什么", "日本", "Что", "Translate",
)  # fmt: skip
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
        size = next((g for g in (128, 64, 32) if weight.shape[1] % g == 0), 0)
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
    writers = [_Writer(*turns(tokenizer, rng), stops) for _ in range(count)]
    caches = [decoder.new_cache(length) for _ in writers]
    ids = np.empty((count, length), np.int32)
    logits = None
    for at in range(length):
        choices = sampled(logits, rng) if logits is not None else [0] * count
        ids[:, at] = [writer.next(choice) for writer, choice in zip(writers, choices, strict=True)]
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
            "the model's logits are not finite: its weights are damaged or overflow",
            remedy="download the model again, or choose another one",
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

    def __init__(
        self, opening: list[int], to_answer: list[int], to_question: list[int], stops: frozenset[int]
    ) -> None:
        self.forced = list(opening)
        self.turns = (to_answer, to_question)
        self.stops, self.turn = stops, 0

    def next(self, choice: int) -> int:
        """The next token; where the model ends a turn, the template's words between turns follow."""
        if self.forced:
            return self.forced.pop(0)
        if choice not in self.stops:
            return choice
        self.forced = list(self.turns[self.turn % 2])
        self.turn += 1
        return self.forced.pop(0) if self.forced else choice


def turns(tokenizer: Tokenizer, rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
    """-> tokens that open a conversation, that lead from a question to its answer, from an answer to the next.

    Taken from the chat template by rendering marks. A model without one gets an opening, and another
    after each end of text.
    """
    try:
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
        text = tokenizer.render(chat, add_generation_prompt=False)
        parts = []
        for mark in MARKS:
            before, found, text = text.partition(mark)
            if not found:
                raise TokenizerError("the template does not show a message unchanged")
            parts.append(before)
        parts[0] += (*QUESTIONS, *[""] * len(QUESTIONS))[rng.integers(2 * len(QUESTIONS))]
        first, to_answer, to_question = (tokenizer.encode(part, special=False) for part in parts)
        return first, to_answer, to_question
    except TokenizerError:
        opening, again = (tokenizer.encode(OPENINGS[rng.integers(len(OPENINGS))]) for _ in range(2))
        return opening, again, again
