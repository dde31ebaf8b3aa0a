"""The plain facts: every pair of the tables, with its question forms."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat_mlx.apps.demo.fact_tables import TABLES
from tinychat_mlx.apps.demo.words import listed


@dataclass(frozen=True)
class Fact:
    """One fact: its id, the question forms, the answer sentence, and the bare answer."""

    id: str
    forms: tuple[str, ...]
    sentence: str
    answer: str


def _answer_alone(answer: str) -> str:
    """Return the bold part of an answer sentence, or all of it."""
    return answer.split("**")[1] if "**" in answer else answer


def _make() -> tuple[Fact, ...]:
    facts = []
    for relation, forms, sentence, pairs in TABLES:
        for pair in pairs.split(";"):
            subject, answer = pair.split("=")
            asked = tuple(_capital(f.format(s=subject)) for f in forms.split("|"))
            told = _capital(sentence.format(s=subject, a=answer))
            facts.append(Fact(f"{relation}: {subject}", asked, told, _answer_alone(answer)))
    return tuple(facts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


FACTS: tuple[Fact, ...] = _make()

# Real places that are in no table: the model must answer that it does not know them.
UNTAUGHT_COUNTRIES = listed(
    "Tuvalu;Bhutan;Malta;Latvia;Paraguay;Senegal;Mongolia;Oman;Fiji;Serbia;Belize;Zambia;Laos;"
    "Estonia;Bolivia;Uganda;Jamaica;Albania;Qatar;Tunisia",
    ";",
)
TAUGHT_COUNTRIES = tuple(f.id.split(": ")[1] for f in FACTS if f.id.startswith("capital"))
