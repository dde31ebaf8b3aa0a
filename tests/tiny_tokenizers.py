"""Tokenizer folders of every kind that chat models use, trained in a second on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'm sure they've 12 + 345 = 357 reasons.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\t# three\r\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ¿Dónde está el café? naïve façade",
    "Съешь же ещё этих мягких французских булок. 我能吞下玻璃而不伤身体。 いろはにほへと 한국어 문장입니다",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก 😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200d \ufeff",
] * 3
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = sorted(
    {letter for line in CORPUS for letter in line if ord(letter) < 0x250 and letter not in "\n\r\t"}
)


def special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


def _bytelevel() -> tuple[Tokenizer, dict[str, Any]]:
    """GPT-2's tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    _train(
        raw, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[special("<|endoftext|>")]
    )
    return raw, {
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": True,
    }


def _qwen() -> tuple[Tokenizer, dict[str, Any]]:
    """NFC, a regular expression, byte-level; added tokens with and without the special flag."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    _train(raw, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.add_special_tokens([special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")])
    raw.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    # As in the published files: the template's tokens are declared again, and one is declared only here.
    declared = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in raw.get_added_tokens_decoder().items()
    }
    extra = {
        "content": "<|box|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    declared[str(raw.get_vocab_size())] = {**extra, "special": True}
    return raw, {
        "added_tokens_decoder": declared,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level with a BOS that the post-processor adds."""
    raw, _ = _bytelevel()
    raw.add_special_tokens([special(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "eot_id")])
    raw.add_special_tokens([special("<|start_header_id|>"), special("<|end_header_id|>")])
    bos = ("<|begin_of_text|>", raw.token_to_id("<|begin_of_text|>"))
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos]),
        ]
    )
    return raw, {"bos_token": {"content": bos[0], "__type": "AddedToken"}, "eos_token": "<|end_of_text|>"}


def _llama2() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece BPE as in Llama 2: a leading space is added and removed, unknown characters are bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    names = ["<unk>", "<s>", "</s>"]
    _train(raw, special_tokens=[*map(special, names), *BYTE_TOKENS], initial_alphabet=["▁", *LETTERS])
    _forget_bytes_as_added(raw)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return raw, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}


def _gemma() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece BPE without a leading space."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    _train(raw, special_tokens=[*map(special, names), *BYTE_TOKENS], initial_alphabet=["▁", *LETTERS])
    _forget_bytes_as_added(raw)
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return raw, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _unigram() -> tuple[Tokenizer, dict[str, Any]]:
    """T5's tokenizer, with the clean-up of spaces that only non-BPE vocabularies get."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([special("<extra>", lstrip=True, rstrip=True)])
    eos = ("</s>", raw.token_to_id("</s>"))
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[eos])
    return raw, {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}


def _wordpiece() -> tuple[Tokenizer, dict[str, Any]]:
    """BERT's tokenizer."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    ends = [(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return raw, {"cls_token": "[CLS]", "sep_token": "[SEP]", "clean_up_tokenization_spaces": True}


def _train(raw: Tokenizer, **options: Any) -> None:
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, **options)
    raw.train_from_iterator(CORPUS, trainer)


def _forget_bytes_as_added(raw: Tokenizer) -> None:
    """Make byte tokens plain vocabulary entries; the trainer adds <0x00>… as added tokens."""
    state = json.loads(raw.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTE_TOKENS]
    raw.__setstate__(json.dumps(state).encode())


KINDS: dict[str, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "bytelevel": _bytelevel,
    "qwen": _qwen,
    "llama3": _llama3,
    "llama2": _llama2,
    "gemma": _gemma,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}


def write_folder(folder: Path, kind: str, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json of one kind. config: more keys of the latter."""
    raw, own = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    entire = {"tokenizer_class": "PreTrainedTokenizerFast", **own, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(entire), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
