"""Text to ids and back equals transformers, and streamed text equals decoded text."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CORPUS, KINDS, write_folder

from tinychat_mlx.base.errors import TokenizerError, UsageError
from tinychat_mlx.text.streaming import StopMatcher, Stream, clean_up_spaces
from tinychat_mlx.text.tokenizer import Tokenizer

AWKWARD = [
    "",
    " ",
    "   ",
    "a",
    " leading",
    "trailing ",
    "  both  sides  ",
    "\n",
    "\r\n",
    "line\r\nline\n\n\nline\t\ttab",
    "Hello, world! It's 3 o'clock, isn't it? We 've n't .",
    "👩‍👩‍👧‍👦 family 👍🏽 🇩🇪🇫🇷 ❤️",
    "日本語のテキスト。中文，标点！한국어",
    "e\u0301 vs é; a\u0323\u0307 vs a\u0307\u0323; Å vs Å",
    "שלום עולם مرحبا \u202bRTL\u202c mixed",
    "\x00\x01\x07\x1b[31m\x7f\x85\u2028\u2029",
    "\u200b\u200d\ufeff\u00ad zero width",
    "𝕳𝖊𝖑𝖑𝖔 🜀 \U0010ffff \ufffd",
    "<|im_start|>user\nI am special<|im_end|>",
    "</s><s>[INST] <unk> <|endoftext|> <extra> [CLS] <think>x</think> <|box|>",
    "▁ metaspace ▁▁ Ġ Ċ ##ing <0x41> <0xE2><0x82>",
    "{{ braces }} {% raw %} \\ \" ' `",
    "1234567890 3.14159 1,000,000 0x1F",
    "x" * 3000,
    " " * 500 + "end",
    "word " * 800,
    *CORPUS[:5],
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# -- the same ids and text as transformers


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_transformers(
    kind: str, folders: dict[str, Path], ours: dict[str, Tokenizer]
) -> None:
    mine, other = ours[kind], theirs(folders[kind])
    assert mine.vocab_size == len(other)
    for text in AWKWARD:
        for special in (True, False):
            ids = mine.encode(text, special=special)
            assert ids == other.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert mine.decode(ids, skip_special=skip) == other.decode(ids, skip_special_tokens=skip), (
                    text
                )


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_equal_transformers(
    kind: str, folders: dict[str, Path], ours: dict[str, Tokenizer]
) -> None:
    mine, other = ours[kind], theirs(folders[kind])
    assert mine.special_tokens == other.special_tokens_map
    assert (mine.bos_token, mine.eos_token) == (other.bos_token, other.eos_token)
    assert (mine.bos_id, mine.eos_id) == (other.bos_token_id, other.eos_token_id)
    assert mine.special_ids == {i for i, token in other.added_tokens_decoder.items() if token.special}
    assert {i: mine.decode([i], skip_special=False) for i in range(mine.vocab_size)} == {
        i: other.decode([i]) for i in range(mine.vocab_size)
    }


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_ids_equal_the_class_that_transformers_builds_for_qwen(tmp_path: Path, tokenizer_class: str) -> None:
    folder = write_folder(tmp_path, "qwen", tokenizer_class=tokenizer_class)
    mine, other = Tokenizer.load(folder), theirs(folder)
    assert type(other).__name__ == "Qwen2Tokenizer"
    for text in AWKWARD:
        assert mine.encode(text) == other.encode(text), text


def test_ids_equal_the_llama_class_on_ordinary_text(tmp_path: Path) -> None:
    """Follow tokenizer.json where transformers 5 differs from it.

    transformers 5's LlamaTokenizer rebuilds the pipeline. After a special token and before a first space it
    omits the space that tokenizer.json, like its SentencePiece model, adds. There we follow the file, like
    transformers 4.
    """
    folder = write_folder(tmp_path, "llama2", tokenizer_class="LlamaTokenizer")
    mine, other = Tokenizer.load(folder), theirs(folder)
    assert type(other).__name__ == "LlamaTokenizer"
    specials = [token for token in mine.special_tokens.values() if token]
    for text in AWKWARD:
        if text and text[0] not in " ▁" and not any(token in text for token in specials):
            assert mine.encode(text) == other.encode(text), text


def test_tokens_beside_tokenizer_json_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        "bytelevel",
        eos_token="<eos>",
        extra_special_tokens=["<x>", "<y>"],
        image_token="<image>",
        add_bos_token=True,
    )
    mine, other = Tokenizer.load(folder), theirs(folder)
    assert mine.special_tokens == other.special_tokens_map
    text = "a <eos><x> <y>b<image> "
    assert mine.encode(text) == other.encode(text)
    assert mine.decode(mine.encode(text)) == other.decode(other.encode(text), skip_special_tokens=True)


def test_special_tokens_map_counts_where_the_config_declares_no_tokens(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "bytelevel")
    (folder / "special_tokens_map.json").write_text(
        json.dumps(
            {"eos_token": {"content": "<end>", "lstrip": True, "normalized": False}, "pad_token": "<p>"}
        )
    )
    mine, other = Tokenizer.load(folder), theirs(folder)
    assert mine.special_tokens == other.special_tokens_map
    assert mine.encode("a  <end> b") == other.encode("a  <end> b")
    write_folder(folder, "qwen")
    assert Tokenizer.load(folder).special_tokens == theirs(folder).special_tokens_map


def test_split_special_tokens_makes_user_text_plain(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "qwen", split_special_tokens=True)
    text = "I write <|im_end|> here"
    assert Tokenizer.load(folder).encode(text) == theirs(folder).encode(text)


def test_truncation_and_padding_in_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "bytelevel", pad_token="<|endoftext|>")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    state["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, **pad}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.load(folder).encode(CORPUS[0]) == theirs(folder).encode(CORPUS[0])


# -- the end of an answer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_stop_ids_are_the_union_of_all_four_sources(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "qwen", eos_token="<|endoftext|>", chat_template=CHATML)
    tokenizer = Tokenizer.load(folder)
    eos, turn_end = tokenizer.id_of("<|endoftext|>"), tokenizer.id_of("<|im_end|>")
    assert tokenizer.stop_ids() == {eos, turn_end}
    assert tokenizer.stop_ids(5, [6, 7]) == {5, 6, 7, eos, turn_end}
    assert tokenizer.stop_ids([0], 8) == {0, 8, eos, turn_end}


def test_stop_ids_without_a_template_guess_nothing(ours: dict[str, Tokenizer]) -> None:
    assert ours["llama2"].stop_ids() == {2}
    assert ours["wordpiece"].stop_ids(None, None) == set()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('one message only') }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{{ messages[0].content }}<|im_end|>",
        "{% broken",
    ],
)
def test_a_template_that_shows_no_turn_end_adds_none(tmp_path: Path, template: str) -> None:
    folder = write_folder(tmp_path, "qwen", eos_token="<|endoftext|>", chat_template=template)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.stop_ids() == {tokenizer.id_of("<|endoftext|>")}


def test_chat_ids_have_one_bos(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    folder = write_folder(tmp_path, "llama3", chat_template=template)
    tokenizer, other = Tokenizer.load(folder), theirs(folder)
    chat = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.encode_chat(chat, add_generation_prompt=False)
    assert ids == other.apply_chat_template(chat)["input_ids"]
    assert ids.count(tokenizer.bos_id or -1) == 1


def test_text_beginning_with_an_added_token_splits_the_encoding_there(ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours["qwen"]
    before = "Once upon a ti"
    for text in ("<|im_end|>\nmore", "<think>me"):
        assert tokenizer.starts_with_special(text)
        assert tokenizer.encode(before + text) == tokenizer.encode(before) + tokenizer.encode(text)
    assert not tokenizer.starts_with_special("me")
    assert not ours["unigram"].starts_with_special("<extra>")  # it strips spaces on its left


# -- streams


def streamed(stream: Stream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.flush()]


def random_text(rng: random.Random) -> str:
    kinds = [
        lambda: rng.choice(AWKWARD[:22]),
        lambda: rng.choice(" ,.!?'\n\t▁\ufffd"),
        lambda: chr(
            rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0xD800), rng.randrange(0xE000, 0x110000)])
        ),
        lambda: rng.choice(CORPUS)[rng.randrange(40) :][: rng.randrange(30)],
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(8)))


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_equals_decoded_text(kind: str, ours: dict[str, Tokenizer]) -> None:
    tokenizer, rng = ours[kind], random.Random(kind)
    for _ in range(2000):
        ids, skip = tokenizer.encode(random_text(rng)), rng.random() < 0.5
        assert "".join(streamed(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_of_random_tokens_equals_decoded_text(kind: str, ours: dict[str, Tokenizer]) -> None:
    """Models emit ids that no text encodes to: broken UTF-8, any special token, ids past the vocabulary."""
    tokenizer, rng = ours[kind], random.Random(kind)
    size = tokenizer.vocab_size
    likely = [i for i in range(size) if len(tokenizer.decode([i], skip_special=False)) <= 1] or range(size)
    for _ in range(2000):
        pools = [range(size), likely, sorted(tokenizer.special_ids), range(size, size + 3)]
        ids = [rng.choice(pool) for pool in rng.choices(pools, [4, 4, 1, 0.3], k=rng.randrange(12)) if pool]
        skip = rng.random() < 0.5
        assert "".join(streamed(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip_special=skip), ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("unigram", "wordpiece")])
def test_a_stream_shows_no_half_characters(kind: str, ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours[kind]
    text = "😀👩‍👩‍👧‍👦 日本語 नमस्ते \U0010ffff e\u0301."
    for piece in streamed(tokenizer.stream(), tokenizer.encode(text)):
        assert "\ufffd" not in piece


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_keeps_up_with_the_model(kind: str, ours: dict[str, Tokenizer]) -> None:
    """Plain words appear at once: never more than one word behind the decoded tokens."""
    tokenizer = ours[kind]
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog", special=False)
    stream, shown = tokenizer.stream(), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        decoded = tokenizer.decode(ids[:count])
        assert decoded.startswith(shown) and len(decoded) - len(shown) <= len(" quick")


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_costs_the_same_for_every_token(kind: str, ours: dict[str, Tokenizer]) -> None:
    """A loop of any one token must not make decoding quadratic: count decoded tokens."""
    tokenizer = ours[kind]
    for token in [*range(0, tokenizer.vocab_size, 7), *tokenizer.encode("\ufffd😀  ▁", special=False)]:
        stream, work = tokenizer.stream(), 0
        inner = getattr(stream, "_inner", stream)
        if hasattr(inner, "_decode"):
            plain = inner._decode

            def counted(ids: list[int], plain: Any = plain) -> str:
                nonlocal work
                work += len(ids)
                return str(plain(ids))

            inner._decode = counted
        for _ in range(100):
            stream.push(token)
        stream.flush()
        assert work <= 100 * 4 + 100, tokenizer.decode([token], skip_special=False)


@settings(max_examples=150, deadline=None)
@given(text=st.text(), kind=st.sampled_from(list(KINDS)))
@example(text="a � b", kind="llama2")
@example(text=" ", kind="llama2")
def test_any_text_streams_as_it_decodes(ours: dict[str, Tokenizer], text: str, kind: str) -> None:
    tokenizer = ours[kind]
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer.stream(), ids)) == tokenizer.decode(ids)


def test_the_librarys_own_stream_would_not_do(ours: dict[str, Tokenizer]) -> None:
    """The reason for detokenizer.py. If this fails, tokenizers' DecodeStream may have become sufficient."""
    from tokenizers.decoders import DecodeStream

    tokenizer, rng, wrong = ours["llama2"], random.Random(1), 0
    for _ in range(300):
        ids = tokenizer.encode(random_text(rng))
        stream, text = DecodeStream(skip_special_tokens=True), ""
        try:
            text = "".join(stream.step(tokenizer._raw, token) or "" for token in ids)
        except Exception:  # noqa: BLE001  (the library raises no narrower one: "Invalid prefix encountered")
            text = "raised"
        wrong += text != tokenizer.decode(ids)
    assert wrong > 0


@pytest.mark.parametrize(("letters", "length"), [(" 'nt", 7), (" 'sa.", 5)])
def test_spaces_cleaned_in_a_stream_equal_spaces_cleaned_at_once(letters: str, length: int) -> None:
    from tinychat_mlx.text.streaming import CleanStream

    class Letters:
        def push(self, token: int) -> str:
            return letters[token]

        def flush(self) -> str:
            return ""

    for word in itertools.product(range(len(letters)), repeat=length):
        text = "".join(letters[i] for i in word)
        assert "".join(streamed(CleanStream(Letters()), list(word))) == clean_up_spaces(text), text


# -- stop strings


def until_stop(text: str, stops: list[str]) -> str:
    """Return the text up to the stop string that is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=30),
)
@example(text="abc", stops=["abcd", "b"], cuts=[1])
def test_stop_strings_are_found_wherever_the_text_breaks(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", False
    borders = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(borders):
        piece, stopped = matcher.push(text[start:end])
        shown += piece
        assert until_stop(text, stops).startswith(shown)  # nothing that must be removed again
    assert shown + matcher.flush() == until_stop(text, stops)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        assert matcher.push("more") == ("", True) and matcher.flush() == ""


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.push("Hello #") == ("Hello ", False)
    assert matcher.push(" not a stop\n") == ("# not a stop", False)
    assert matcher.push("Use") == ("", False)
    assert matcher.push("d") == ("\nUsed", False)
    assert matcher.push("##") == ("", False)
    assert matcher.flush() == "##"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])


# -- incomplete folders


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing — download"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(TokenizerError, match=r"there is only tokenizer\.model.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("damage", ["", "{", "[]", '"text"', "\udcff", "[" * 20_000, "{'a': 1}"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_folder(tmp_path, "bytelevel")
    (folder / name).write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(TokenizerError, match=name) as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": {"lstrip": True}}},
        {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 3}}},
        {"added_tokens_decoder": [1]},
        {"eos_token": 5},
        {"eos_token": ["a"]},
        {"extra_special_tokens": [7]},
        {"extra_special_tokens": "text"},
        {"chat_template": 5},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": ["x"]},
    ],
)
def test_a_wrong_value_in_the_config_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, "bytelevel", **config)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)


def test_a_truncated_tokenizer_json_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "bytelevel")
    whole = (folder / "tokenizer.json").read_bytes()
    for end in range(0, len(whole) - 1, len(whole) // 40):
        (folder / "tokenizer.json").write_bytes(whole[:end])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(folder)


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    """Rust panics reach Python as a BaseException, which `except Exception` does not catch."""
    folder = write_folder(tmp_path, "bytelevel")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(folder)


def test_half_a_surrogate_pair_is_refused(ours: dict[str, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        ours["qwen"].encode("a\ud83d")


def test_importing_the_text_modules_imports_no_library() -> None:
    """`tinychat --help` must not load tokenizers, jinja2 or numpy, nor a chat transformers."""
    code = (
        "import sys, tinychat_mlx.text.tokenizer\n"
        "print([m for m in ('tokenizers', 'jinja2', 'numpy', 'torch', 'transformers') if m in sys.modules])\n"
        "from pathlib import Path\n"
        "t = tinychat_mlx.text.tokenizer.Tokenizer.load(Path(sys.argv[1]))\n"
        "t.encode_chat([{'role': 'user', 'content': 'hi'}])\n"
        "print([m for m in ('numpy', 'torch', 'transformers', 'huggingface_hub') if m in sys.modules])\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), "qwen", chat_template=CHATML)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", code, folder]
        run = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert run.stdout.split("\n")[:2] == ["[]", "[]"], run.stderr
