"""A model folder is written completely: shards, index, side files.

An interrupted one is never taken as complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import UP, B, W, dense, refused, sharded

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.base.json_file import read_json
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE
from tinychat_mlx.weights.shards import ShardWriter, copy_side_files


def test_shards_written_one_by_one_with_a_kill_between_end_as_the_same_files(tmp_path: Path) -> None:
    parts = [dense()[:1], dense()[1:3], dense()[3:]]

    def run(path: Path, die_before: int | None) -> None:
        path.mkdir(exist_ok=True)
        writer = ShardWriter(path, len(parts), {"format": "mlx"})
        for i, part in enumerate(parts):
            if i == die_before:
                (path / "model-00002-of-00003.safetensors.partial").write_bytes(b"half")
                return
            if not writer.has(i):
                writer.write(i, part)
        writer.finish()

    def contents(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    run(tmp_path / "straight", None)
    run(tmp_path / "killed", 1)
    (tmp_path / "killed" / "config.json").write_text("{}")
    refused(tmp_path / "killed", f"{INDEX} is missing — start the interrupted download")
    (tmp_path / "killed" / "config.json").unlink()
    run(tmp_path / "killed", None)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    index = json.loads((tmp_path / "straight" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * W.nbytes + B.nbytes + 4 * 128
    assert index["weight_map"][f"{UP}.bias"] == "model-00002-of-00003.safetensors"


def test_an_unfinished_or_mixed_folder_is_not_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 2)
    writer.write(0, dense()[:1])
    with pytest.raises(FormatError, match="model-00002-of-00002.safetensors: the file is missing"):
        writer.finish()
    writer.write(1, dense()[:1])
    with pytest.raises(FormatError, match="model.embed_tokens.weight is also in model-00001"):
        writer.finish()
    writer.write(1, dense()[1:])
    ShardWriter(tmp_path, 3).write(0, dense()[:1])
    with pytest.raises(FormatError, match="model-00001-of-00003.safetensors: a file of another run"):
        writer.finish()


def test_transformers_and_mlx_read_sharded_output(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    index = json.loads((sharded(tmp_path) / INDEX).read_text())
    loaded = {name: mx.load(str(tmp_path / file))[name] for name, file in index["weight_map"].items()}
    np.testing.assert_array_equal(np.array(loaded[f"{UP}.weight"]), W)
    assert len(loaded) == 4


def test_side_files_are_copied_byte_for_byte_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    carried = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "generation_config.json", "LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md", "vocab.txt",
        "x.tiktoken",
    ]  # fmt: skip
    left = [
        "config.json",
        "README.md",
        SINGLE,
        INDEX,
        "modeling_x.py",
        "pytorch_model.bin",
        "quant_config.json",
    ]
    for name in carried + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() + b"\r\n\0\xff")
    target.mkdir()
    assert sorted(copy_side_files(source, target)) == sorted(carried)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {name: name.encode() + b"\r\n\0\xff" for name in carried}


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_side_file_that_links_to_a_strangers_file_is_not_carried_along(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tmp_path / "a" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "secret")
    (tmp_path / "b").mkdir()
    with pytest.raises(FormatError, match="a link to a file outside"):
        copy_side_files(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_json_files_round_trip_through_the_reader(tmp_path: Path) -> None:
    from tinychat_mlx.weights.shards import write_json

    write_json(tmp_path / "x.json", {"ü": [1, {"a": None}], "b": 1e-5})
    assert read_json(tmp_path / "x.json") == {"ü": [1, {"a": None}], "b": 1e-5}
