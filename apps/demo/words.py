"""Word lists written as one string, and invented names."""

from __future__ import annotations

from random import Random


def listed(text: str, separator: str) -> list[str]:
    """Split a list that is written as one string."""
    return text.split(separator)


_VOWELS = listed("a e i o u a e i o ia ee ou", " ")
_ONSETS = listed("b d f g h j k l m n p r s t v w z br dr gr kl pl tr st sh th qu x", " ")
_CODAS = ("", ".", ".", ".", *listed("n r l s m k th nd x rt", " "))


def invent(rng: Random, syllables: int = 0) -> str:
    """Invent a name."""
    n = syllables or rng.choice((2, 2, 3))
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(n)]
    return ("".join(parts) + rng.choice(_CODAS).strip(".")).capitalize()
