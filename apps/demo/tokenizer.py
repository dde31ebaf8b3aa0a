"""Tokenizer of the demo model: byte-level BPE trained on its own corpus.

Every digit is a separate token, so that arithmetic can be learned. Every byte has a token, so that decoding returns any
text unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tinychat_mlx.apps.demo import corpus
from tinychat_mlx.apps.demo.words import invent

BOS, USER, ASSISTANT, SYSTEM, END = SPECIAL = (
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
# An operator keeps its spaces; a digit is a separate token; a word includes the space before it.
_SPLIT = r" [+\-=] (?=[\d*\-])|\d|'(?:s|m|re|t|ve|ll|d)| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts(seed: int, conversations: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(conversations):
        for message in corpus.some_turns(rng, 12, typos=True):
            yield message["content"]
    for _ in range(conversations):
        yield " ".join(invent(rng) for _ in range(3))


def train(vocab_size: int, seed: int = 5, conversations: int = 8000) -> Tokenizer:
    """Learn the merges from a sample of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, conversations), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def render(messages: list[dict[str, str]]) -> str:
    """Write a conversation as the chat template does, with the start of a reply."""
    body = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return BOS + body + ASSISTANT
