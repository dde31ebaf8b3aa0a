"""The card of a converted model: its base model, licence, and the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_dense

from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq.output.finish import card_text
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.weights.checkpoint import Checkpoint

yaml = pytest.importorskip("yaml")  # a dependency of huggingface_hub, which reads cards with it

# Like an Instruct model's card on the hub: it names its base model, and a licence with a name and a text.
INSTRUCT = """---
language:
- en
- de
license: other
license_name: some-research
license_link: https://huggingface.co/org/chat/blob/main/LICENSE
base_model:
- org/base
tags:
- chat
---

# A chat model

license: not this one
"""


def snapshot(root: Path, card: str | None = INSTRUCT) -> Path:
    """A model in the layout of the hub's cache."""
    folder = root / "hub" / "models--org--chat-1B" / "snapshots" / ("0123456789" * 4)
    tiny_dense.save(folder)
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter parsed as YAML, and the rest."""
    empty, head, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def made(folder: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    return parts(card_text(Checkpoint.open(folder), Settings(**settings)))


def test_the_base_is_the_model_that_was_converted(tmp_path: Path) -> None:
    """Not that model's base model. The name is its id without a commit."""
    head, body = made(snapshot(tmp_path))
    assert head["base_model"] == "org/chat-1B" and head["base_model_relation"] == "quantized"
    assert body.startswith("\n# org/chat-1B, 4-bit\n") and "Weights of org/chat-1B in 4 bits" in body
    assert "org/base" not in body and "0123456789" not in body


def test_licence_and_languages_are_carried(tmp_path: Path) -> None:
    head, _ = made(snapshot(tmp_path))
    assert head["license"] == "other" and head["license_name"] == "some-research"
    assert head["license_link"].endswith("org/chat/blob/main/LICENSE") and head["language"] == ["en", "de"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("no head\n", None),
        ("---\nlicense: mit\nnever closed\n", None),
        ("---\r\nlicense: [mit, apache-2.0] # two\r\n---\r\n", ["mit", "apache-2.0"]),
        ("---\nlicense:\n  - gpl-3.0\n\n---\n", ["gpl-3.0"]),
    ],
)
def test_cards_of_every_kind_are_read(card: str | None, licence: object, tmp_path: Path) -> None:
    head, _ = made(snapshot(tmp_path, card))
    assert head.get("license") == licence and head["base_model"] == "org/chat-1B"


@pytest.mark.parametrize(
    ("settings", "tags"),
    [
        ({}, ["awq", "4-bit", "mlx"]),
        ({"method": "rtn", "w_bit": 3}, ["3-bit", "mlx"]),
        ({"method": "awq", "format": "awq"}, ["awq", "4-bit"]),
        ({"method": "rtn", "format": "awq"}, ["awq", "4-bit"]),  # the format's name
    ],
)
def test_tags_say_what_it_is(settings: dict[str, Any], tags: list[str], tmp_path: Path) -> None:
    head, _ = made(snapshot(tmp_path), **settings)
    assert head["tags"] == tags
    assert head["library_name"] == ("transformers" if settings.get("format") == "awq" else "mlx")


def test_a_folder_has_no_id_and_claims_none(tmp_path: Path) -> None:
    """Its card names a base model that it was trained from. The result is not a quantised form of that."""
    head, body = made(tiny_dense.save(tmp_path / "mine"))
    assert "base_model" not in head and head["license"] == "mit"
    assert "Weights of mine in" in body


def test_a_change_of_format_keeps_what_was_quantised(tmp_path: Path) -> None:
    common = ["--method", "rtn", "--group-size", "32"]
    assert main(["convert", str(snapshot(tmp_path)), "-o", str(tmp_path / "mlx"), *common]) == 0
    assert main(["convert", str(tmp_path / "mlx"), "-o", str(tmp_path / "gemm"), "--format", "awq"]) == 0
    head, body = parts((tmp_path / "gemm" / "README.md").read_text())
    assert head["base_model"] == "org/chat-1B" and head["base_model_relation"] == "quantized"
    assert head["license_name"] == "some-research" and head["tags"] == ["awq", "4-bit"]
    assert "codes unchanged" in body and body.startswith("\n# mlx, 4-bit\n")
