"""Write a GGUF file of a given shape with random valid blocks, with the tensor types of llama.cpp's quantiser.

Q4_0 is "pure": every matrix. Q4_K_M follows llama.cpp's llama-quant.cpp, with its substitutes if a row is not a
multiple of 256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tinychat_mlx.base.errors import BackendError, UsageError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = ("Q4_0", "Q4_K_M")
# type -> weights and bytes per block, largest code, byte offset of its float16 scale: w = scale · code
BLOCKS = {
    "Q4_0": (32, 18, 8, 0),
    "Q5_0": (32, 22, 16, 0),
    "Q8_0": (32, 34, 128, 0),
    "Q4_K": (
        256,
        144,
        63 * 7.5,
        0,
    ),  # scale · 6 bits · 0 … 15 - minimum · 6 bits; the minimum's scale follows
    "Q6_K": (256, 210, 128 * 32, 208),
}
SUBSTITUTES = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


def library(name: str) -> Any:
    """Import an optional peer. Raises BackendError with the install command."""
    try:
        return import_module(name)
    except ImportError as e:
        raise missing(str(e)) from None


def missing(what: str) -> BackendError:
    """Return the error for a missing Python package of the comparison with llama.cpp."""
    remedy = (
        "pip install llama-cpp-python gguf (the first is built from source with a C++ compiler and cmake)"
    )
    return BackendError(what, where="--against llama.cpp", remedy=remedy)


def matrices(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield names and shapes (N, K) of the matrices, without ".weight"."""
    c, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or c // config["num_attention_heads"]
    q, kv = (config[f"num_{n}_heads"] * head for n in ("attention", "key_value"))
    yield "token_embd", vocabulary, c
    if not config.get("tie_word_embeddings"):
        yield "output", vocabulary, c
    for i in range(config["num_hidden_layers"]):
        yield from ((f"blk.{i}.attn_{p}", n, c) for p, n in (("q", q), ("k", kv), ("v", kv)))
        yield f"blk.{i}.attn_output", c, q
        yield from ((f"blk.{i}.ffn_{p}", f, c) for p in ("gate", "up"))
        yield f"blk.{i}.ffn_down", c, f


def type_of(name: str, k: int, config: Mapping[str, Any], file_type: str) -> str:
    """Return the type that llama.cpp's quantiser gives a matrix of K inputs."""
    if file_type == "Q4_0":
        return "Q4_0"
    kind = "Q4_K"
    layer, layers = int(name.split(".")[1]) if name.startswith("blk.") else 0, config["num_hidden_layers"]
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    tied_head = name == "token_embd" and config.get("tie_word_embeddings")
    if tied_head or name == "output" or (more and name.endswith(("attn_v", "ffn_down"))):
        kind = "Q6_K"
    return kind if k % 256 == 0 else SUBSTITUTES[kind]


def blocks(random: np.random.Generator, kind: str, n: int, k: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return (N, bytes per row): random codes with scales that keep products near 1."""
    weights, size, largest, at = BLOCKS[kind]
    words = random.integers(0, 1 << 32, -(-n * (k // weights) * size // 4), np.uint32)
    data = words.view(np.uint8)[: n * (k // weights) * size].reshape(n, k // weights, size)
    # A uniform code in ±largest deviates by largest / sqrt(3); w deviates by about 1 / sqrt(k).
    scale = np.array([math.sqrt(3 / k) / largest], np.float16)
    data[..., at : at + 2] = scale.view(np.uint8)
    if kind == "Q4_K":
        data[..., at + 2 : at + 4] = (scale * np.float16(7.5)).view(
            np.uint8
        )  # the codes' mean, so that w has mean 0
    return data.reshape(n, -1)


def vectors(config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of norms and biases."""
    c = config["hidden_size"]
    head = config.get("head_dim") or c // config["num_attention_heads"]
    yield "output_norm.weight", c
    for i in range(config["num_hidden_layers"]):
        yield from ((f"blk.{i}.{p}_norm.weight", c) for p in ("attn", "ffn"))
        if architecture == "qwen2":
            for p, kind in (("q", "attention"), ("k", "key_value"), ("v", "key_value")):
                yield f"blk.{i}.attn_{p}.bias", config[f"num_{kind}_heads"] * head
        if architecture == "qwen3":
            yield from ((f"blk.{i}.attn_{p}_norm.weight", head) for p in "qk")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add keys that a config.json may omit or store elsewhere."""
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return {**config, "num_key_value_heads": heads, "rope_theta": theta}


def write(path: Path, config: Mapping[str, Any], file_type: str) -> dict[str, int]:
    """Write the file -> bytes read per token (one row of an untied embedding), and bytes of all weights."""
    gguf = library("gguf")
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise UsageError(
            f"--against llama.cpp supports {', '.join(ARCHITECTURES)}, not {config['model_type']}",
            remedy="leave out --against for this model",
        )
    config = completed(config)
    writer, random = gguf.GGUFWriter(path, architecture), np.random.Generator(np.random.SFC64(0))
    _describe(writer, config, architecture)
    plan = [(name, n, k, type_of(name, k, config, file_type)) for name, n, k in matrices(config)]
    small = list(vectors(config, architecture))
    total = 0
    for name, n, k, kind in plan:
        row = k // BLOCKS[kind][0] * BLOCKS[kind][1]
        total += n * row
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(f"{name}.weight", (n, row), np.dtype(np.uint8), n * row, raw)
    for name, size in small:
        total += 4 * size
        writer.add_tensor_info(name, (size,), np.dtype(np.float32), 4 * size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, n, k, kind in plan:
        writer.write_tensor_data(blocks(random, kind, n, k))
    for name, size in small:
        writer.write_tensor_data(np.full(size, 0.0 if name.endswith("bias") else 1.0, np.float32))
    writer.close()
    read = total
    if not config.get("tie_word_embeddings"):
        _, n, k, kind = plan[0]
        read -= (n - 1) * (k // BLOCKS[kind][0] * BLOCKS[kind][1])
    return {"read": read, "total": total}


def _describe(writer: Any, config: Mapping[str, Any], architecture: str) -> None:
    """Write the metadata that llama.cpp requires; "no_vocab" is its name for a model without a tokenizer."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    if architecture == "llama":
        writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
