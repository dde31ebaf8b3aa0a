"""Calibration text: every kind of file and record, datasets of a hub, and one-line errors for other input."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from stand_in_hub import Hub
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer

from tinychat_mlx.awq.calibration.documents import Document, documents
from tinychat_mlx.awq.calibration.openings import LANGUAGES, kinds
from tinychat_mlx.awq.calibration.selftext import Turns, writers
from tinychat_mlx.awq.calibration.tokens import left_over, packed
from tinychat_mlx.base.errors import UsageError, pip_install
from tinychat_mlx.open import DEMO
from tinychat_mlx.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SHAREGPT = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]


def read(name: str, body: str | bytes) -> list[Document]:
    return list(documents(name, io.BytesIO(body.encode() if isinstance(body, str) else body)))


@pytest.mark.parametrize(
    ("record", "means"),
    [
        ("plain", "plain"),
        ({"text": "a", "url": "b"}, "a"),
        ({"content": "a", "title": "b"}, "a"),
        ({"id": 1, "messages": CHAT}, CHAT),
        ({"conversations": SHAREGPT}, CHAT),
        ({"text": "not this", "messages": CHAT}, CHAT),
        ({"prompt": "w1", "response": "w2"}, CHAT),
        ({"instruction": "w1", "input": "", "output": "w2"}, CHAT),
        (
            {"instruction": "w1", "input": "x", "output": "w2"},
            [{"role": "user", "content": "w1\n\nx"}, CHAT[1]],
        ),
    ],
)
def test_a_record_is_a_text_or_a_chat_by_its_columns(record: Any, means: Document) -> None:
    line = json.dumps(record)
    assert read("a.jsonl", f"{line}\n\n{line}\n") == [means, means]
    assert read("a.json", f"[{line},\n {line}]") == [means, means]
    assert read("a.json", json.dumps([record, record])) == [means, means]
    assert read("a.json.gz", gzip.compress(f"{line}\n{line}".encode())) == [means, means]


def test_a_line_separator_inside_a_string_ends_no_line() -> None:
    """`str.splitlines` would end it: JSON allows U+2028 unescaped in a string."""
    assert read("a.jsonl", '{"text": "a\u2028b\x85c"}\r\n"d"\n') == ["a\u2028b\x85c", "d"]


def test_tables_plain_text_and_blank_records() -> None:
    assert read("a.csv", 'id,text\n1,"a, ""b""\nc"\n2,\n3,d\n') == ['a, "b"\nc', "d"]
    assert read("a.tsv", "prompt\tcompletion\nw1\tw2\n") == [CHAT]
    assert read("a.txt", "\ufeffw1\nw2\n") == ["w1\nw2\n"] and read("a.txt", " \n") == []
    assert read("a.json", '{"version": 2, "data": [{"text": "a"}]}') == ["a"]


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("a.pdf", b"%PDF", "not one of .jsonl"),
        ("a.txt", b"\x93NUMPY\x01\x00", "not UTF-8 text"),
        ("a.jsonl", b'"a"\n\xff\xfe', "not UTF-8 text"),
        ("a.jsonl", b'"a"\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"17", "line 1: int is neither"),
        (
            "a.jsonl",
            b'{"title": "x", "url": "y"}',
            "none of its columns has a known name: title, url — rename one to one of messages",
        ),
        ("a.jsonl", b'{"text": 3}', '"text" is not text but int'),
        ("a.jsonl", b'{"messages": "hi"}', "not a list of messages"),
        ("a.jsonl", b'{"messages": []}', "not a list of messages"),
        ("a.json", b"[1, ", "not JSON"),
        ("a.csv", b"id,url\n1,x\n", "known name: id, url"),
        ("a.jsonl.gz", b"not gzip", ".gz file is damaged"),
        ("a.jsonl.gz", gzip.compress(b'"a"\n' * 99, mtime=0)[:-9], ".gz file is damaged"),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_line(name: str, body: bytes, says: str) -> None:
    with pytest.raises(UsageError) as error:
        read(name, body)
    assert says in str(error.value) and str(error.value).startswith(name) and "\n" not in str(error.value)


def test_parquet_reads_the_column_it_needs_and_no_other() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(**columns: list[Any]) -> bytes:
        pq.write_table(pa.table(columns), out := io.BytesIO())
        return out.getvalue()

    rows = [f"row {i}" for i in range(200)]
    assert read("a.parquet", table(image=[b"\xff" * 99] * 200, text=rows)) == rows
    assert read("a.parquet", table(messages=[CHAT], prompt=["x"])) == [CHAT]
    assert read("a.parquet", table(output=["w2"], instruction=["w1"], input=[None])) == [CHAT]
    with pytest.raises(UsageError, match="known name: image"):
        read("a.parquet", table(image=[b"x"]))
    with pytest.raises(UsageError, match="not a parquet file"):
        read("a.parquet", b"PAR1 no")


def test_parquet_without_its_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=re.escape(pip_install("parquet"))):
        read("a.parquet", b"PAR1")


class Letters:
    """A tokenizer with one token per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


# Templates of published shapes: an answer in the history, and a generation prompt.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinks": CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "thought": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "channels": "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "r1": "<s>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n"
    "{% endif %}",
    "closes": "<s>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|></think>"
    "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think></think>{% endif %}",
    "strips": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "brackets": "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "no prompt": "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}",
}
SHAPES = [  # before a question, from there to an answer, from there to the next question
    ("chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", True),
    ("thinks", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n", "<|im_end|>\n<|im_start|>user\n", True),
    ("thought", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", True),
    ("channels", "<|start|>user<|message|>", "<|end|><|start|>assistant", "<|end|><|start|>user<|message|>", True),
    ("r1", "<s><|User|>", "<|Assistant|><think>\n", "</s><|User|>", True),
    ("closes", "<s><|User|>", "<|Assistant|><think></think>", "</s><|User|>", True),
    ("strips", "user: ", "\n\nassistant:", "\n\nuser: ", False),
    ("brackets", "<s>[INST] ", " [/INST]", "</s>[INST] ", False),
    ("no prompt", "<user> ", " </s><assistant> ", " </s><user> ", True),
]  # fmt: skip
ADDED = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|User|>", "<|Assistant|>")


def with_template(folder: Path, template: str) -> Tokenizer:
    """A tokenizer of one token per letter, with the added tokens of real ones."""
    raw = RawTokenizer(models.BPE({chr(c): c for c in range(128)}, []))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED])
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(("name", "opening", "to_answer", "to_question", "ends"), SHAPES)
def test_an_answer_begins_with_the_generation_prompt_of_its_template(
    name: str, opening: str, to_answer: str, to_question: str, ends: bool, tmp_path: Path
) -> None:
    tokenizer = with_template(tmp_path / "t", TEMPLATES[name])
    assert Turns.of(tokenizer) == Turns(opening, to_answer, to_question, to_answer, ends)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content", "m.content | lower"),
        CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
        CHATML + "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}",
    ],
)
def test_a_template_that_does_not_show_its_messages_is_not_used(template: str, tmp_path: Path) -> None:
    """Every conversation is then a plain text."""
    tokenizer = with_template(tmp_path / "t", template)
    assert Turns.of(tokenizer) is None
    made = writers(tokenizer, frozenset(), 12, np.random.default_rng(0))
    texts = {tuple(tokenizer.encode(text)) for kind in kinds(tokenizer) for text in kind.texts}
    assert {tuple(w.forced) for w in made} <= texts


def test_a_conversation_is_the_templates_words_and_the_models_in_turn(tmp_path: Path) -> None:
    """A question ends with the template's token, also inside a thought; an answer ends with a stop token."""
    tokenizer = with_template(tmp_path / "t", TEMPLATES["channels"])
    stop = tokenizer.id_of("</s>")
    assert stop is not None
    writer = writers(tokenizer, frozenset({stop}), 1, np.random.default_rng(3))[0]
    question = tokenizer.decode(writer.forced, skip_special=False)
    said = "x?<|end|>hm<|end|>y</s>z</s>w<|end|>v</s>"
    taken: list[int] = [writer.next(0) for _ in range(len(writer.forced))]
    for token in tokenizer.encode(said, special=False):
        taken.append(writer.next(token))
        taken += [writer.next(0) for _ in range(len(writer.forced))]
    lead, back = "<|end|><|start|>assistant", "<|end|><|start|>user<|message|>"
    assert tokenizer.decode(taken, skip_special=False) == (
        f"{question}x?{lead}hm<|end|>y{back}z{lead}w<|end|>v{back}"
    )


def test_every_kind_of_text_has_its_share_of_the_conversations() -> None:
    """For every seed, which determines how each begins."""
    tokenizer = Tokenizer.load(DEMO)
    named = kinds(tokenizer)
    assert len(named) == 4  # its tokenizer splits other languages into single bytes
    for seed in range(5):
        made = writers(tokenizer, frozenset(), 32, np.random.default_rng(seed))
        words = [tokenizer.decode(w.forced, skip_special=False) for w in made]
        for i, kind in enumerate(named):
            begun = [word.removeprefix("<|bos|><|user|>") for word in words[i::4]]
            assert len(begun) == 8 and set(begun) <= set(kind.questions)
            assert len(set(begun)) == 8 or begun.count("") == 9 - len(set(begun))


def test_languages_are_those_of_the_tokenizer() -> None:
    """A stand-in with a token for every three bytes, and one with a token for every byte."""
    wide: Any = SimpleNamespace(encode=lambda text, special: [0] * -(-len(text.encode()) // 4))
    narrow: Any = SimpleNamespace(encode=lambda text, special: [0] * len(text.encode()))
    assert set(kinds(wide)[-1].questions) == set(LANGUAGES) and len(kinds(wide)) == 5
    assert len(kinds(narrow)) == 4


def test_what_is_left_for_the_report_was_not_calibrated_on() -> None:
    found: Any = [c * 10 for c in "abcdefgh"]
    tokenizer: Any = Letters()
    taken, used = packed(found, tokenizer, 35, seed=3)
    left = left_over(found, tokenizer, 35, 1000, seed=3)
    assert used == 4 and len(left) == 40 and not set(left) & set(taken.tolist())
    assert left_over(found, tokenizer, 35, 15, seed=3) == left[:15]
    assert left_over(["abcdefghij"], tokenizer, 7, 99, seed=0) == [ord(c) for c in "hij"]
    assert left_over(found, tokenizer, 80, 99, seed=3) == []


FETCH = """
import json, sys
from tinychat_mlx.awq.calibration.tokens import read_documents
from tinychat_mlx.base.errors import TinychatError
for name, wanted in json.load(sys.stdin):
    try:
        print(json.dumps(read_documents(name, wanted)))
    except TinychatError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def fetched(hub: Hub, home: Path, *wanted: tuple[str, int], **env: str) -> list[Any]:
    """Return the result of each (dataset, tokens): [documents, origin], or the error as a string."""
    where = os.environ | {"PYTHONPATH": str(ROOT)} | hub.environ(home) | env
    command, text = [sys.executable, "-c", FETCH], json.dumps(wanted)
    done = subprocess.run(command, input=text, env=where, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    def put(name: str, body: str | bytes) -> None:
        path = tmp_path / "hub/datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.encode() if isinstance(body, str) else body)

    lines = "".join(json.dumps({"text": f"w{i} " * 100}) + "\n" for i in range(20_000))  # 10 MB
    put("o/large/data/train.jsonl", lines)
    put("o/large/data/test.jsonl", lines[:1_000_000])
    put("o/large/README.md", "# about")
    put("o/shards/train-0.jsonl", lines[: lines.index("\n", 300_000) + 1])
    put("o/shards/train-1.jsonl", lines[: lines.index("\n", 60_000) + 1])
    put("o/shards/train-2.jsonl", lines[: lines.index("\n", 600) + 1])
    put("o/shards/licence.csv", "a,b\n")
    put("o/chats/chats.json.gz", gzip.compress(json.dumps([{"conversations": SHAREGPT}] * 3).encode()))
    put("o/images/cat.png", b"\x89PNG")
    put("o/columns/train.csv", "label,url\n1,x\n")
    put("o/gated/train.jsonl", '"a"\n')
    with Hub(tmp_path / "hub") as served:
        served.refuse = {"datasets/o/gated": 403}
        yield served


def test_of_a_dataset_one_fitting_file_is_read_and_no_more_than_needed(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (large,) = fetched(hub, home, ("o/large", 1000))
    assert large[0][0].startswith("w0 ") and 4 * 1000 * 5 <= sum(map(len, large[0])) < 25_000
    assert "o/large, data/train.jsonl" in large[1] and "MB" in large[1]
    assert 0 < hub.sent <= 6 << 20  # of 11 MB; includes a read-ahead of some blocks
    shards, named, chats = fetched(
        hub, home, ("o/shards", 1000), ("o/shards:train-2.jsonl", 1000), ("o/chats", 9)
    )
    assert "train-1.jsonl" in shards[1] and "train-2.jsonl" in named[1]  # the smallest that is large enough
    assert chats[0] == [CHAT] * 3


def test_a_dataset_that_cannot_be_had_says_why_in_one_line(hub: Hub, tmp_path: Path) -> None:
    names = ("o/nowhere", "o/gated", "o/images", "o/columns", "o/shards:no.jsonl")
    nowhere, gated, images, columns, no_file = fetched(hub, tmp_path / "home", *((n, 9) for n in names))
    assert nowhere.startswith("ModelNotFoundError") and "no such dataset" in nowhere
    assert gated.startswith("ModelNotFoundError") and "accept its terms" in gated
    assert images.startswith("UsageError") and "cat.png" in images
    assert "o/columns" in columns and "known name: label, url" in columns
    assert "no file no.jsonl" in no_file
    (offline,) = fetched(hub, tmp_path / "home", ("o/large", 9), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set — give a file" in offline
    for line in (nowhere, gated, images, columns, no_file, offline):
        assert "\n" not in line and "Traceback" not in line


def test_a_hub_that_does_not_answer_is_said_at_once(hub: Hub, tmp_path: Path) -> None:
    (line,) = fetched(hub, tmp_path / "home", ("o/large", 9), HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub refused the request" in line and "--calib self" in line
