"""Beginnings of the calibration text that a model generates: five kinds of text with equal shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from tinychat_mlx.text.tokenizer import Tokenizer

SHOWN = 0.3  # maximum tokens per byte for a language that the tokenizer supports; others have 0.3 to 1


@dataclass(frozen=True)
class Kind:
    """Beginnings of one kind. questions: of user turns ("": empty). texts: of texts outside a chat."""

    questions: tuple[str, ...]
    texts: tuple[str, ...]


PROSE = Kind(
    (
        "Write a short story about", "Write a letter to", "Tell me a story in which", "Write a poem about",
        "Continue this story: It was", "Describe a walk through", "Write the first page of a novel about",
        "Write a dialogue between", "Write a diary entry of", "Write a fairy tale about",
    ),
    (
        "Chapter 1\n\n", "It was", "Once upon a time", "He said", '"I', "She", "Dear", "The old", "When", "My",
        "There was", "In the", "We", "At last",
    ),
)  # fmt: skip
DOCUMENTS = Kind(
    (
        "Explain", "What is", "Write an article about", "How does", "Write a manual for", "Why", "Summarize the history of",
        "Write a report on", "How to", "Make a list of", "Describe the structure of", "What are the causes of",
    ),
    (
        "The history of", "Abstract:", "According to", "# Introduction\n\n", "NAME\n", "1.", "To install",
        "This document", "Table of contents", "A", "==", "The following", "## Usage\n\n", "Note:",
    ),
)  # fmt: skip
CODE = Kind(
    (
        "Write a Python function that", "```python\n", "What does this code do?\n```python\ndef", "Write a C program that",
        "Write a SQL query that", "```c\n#include <", "Write a shell script that", "Fix this:\n```javascript\nfunction",
        "Write an HTML page", "```java\npublic class",
    ),
    (
        "import", "def", "#include <", "function", "SELECT", "<html>", "#!/bin/sh\n", "package main\n", "class",
        "/*\n *", "use std::", "from", '"""', "{\n",
    ),
)  # fmt: skip
CHAT = Kind(
    (  # for half of the questions the model chooses the first word
        *[""] * 16, "What", "How", "Who", "Can you", "I", "My", "Please", "Is", "Give me", "Do you", "Which", "Hi", "2 + 2",
        "Let's", "When", "Where",
    ),
    ("Q:", "Question:", "2 + 2 =", "What is", "How to", "I", "Hello", "Thanks", "Hi", "Can anyone"),
)  # fmt: skip
LANGUAGES = {  # question: beginning of a text
    "Wie funktioniert eigentlich": "Die Geschichte der",
    "Écris une histoire dans laquelle": "Il était une fois",
    "¿Qué significa la palabra": "La ciudad de",
    "Scrivi una lettera alla": "La storia della",
    "O que significa a palavra": "A história do",
    "Напиши рассказ о том, как": "В начале",
    "请介绍一下如何": "中国的",
    "日本の歴史について教えて": "私は",
    "한국의 역사에 대해": "대한민국의",
    "ما هو تاريخ مدينة": "في عام",
    "भारत का इतिहास क्या": "यह एक",
}


def kinds(tokenizer: Tokenizer) -> list[Kind]:
    """Return the kinds to use. Languages that the tokenizer splits into single bytes are left out."""
    shown = {q: t for q, t in LANGUAGES.items() if _shown(tokenizer, q)}
    spoken = [Kind(tuple(shown), tuple(shown.values()))] if shown else []
    return [CHAT, PROSE, CODE, DOCUMENTS, *spoken]


def _shown(tokenizer: Tokenizer, text: str) -> bool:
    return len(tokenizer.encode(text, special=False)) <= SHOWN * len(text.encode())


def dealt(tokenizer: Tokenizer, questions: bool, rng: np.random.Generator) -> Iterator[str]:
    """Yield beginnings of questions or texts without end. Kinds alternate; each kind is shuffled."""
    decks = [_shuffled(kind.questions if questions else kind.texts, rng) for kind in kinds(tokenizer)]
    for deck in cycle(decks):
        yield next(deck)


def _shuffled(beginnings: tuple[str, ...], rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from (beginnings[i] for i in rng.permutation(len(beginnings)))
