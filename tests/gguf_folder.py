"""Dequantise a Llama model in GGUF into a Hugging Face folder of float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors.numpy import save_file

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPLITS_DIGITS = ("smollm",)  # pre-tokenizers that split digits into single tokens, then use GPT-2's pattern


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template. Raises ValueError for another kind of model."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = [fields[f"{k}"] for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind[:2] != ["llama", "gpt2"] or kind[2] not in SPLITS_DIGITS:
        raise ValueError(f"{gguf}: architecture and tokenizer {kind}, not a Llama with SmolLM's tokenizer")
    save_file(weights(reader, fields), folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config(fields),
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": tokenizer_config(fields),
        "generation_config.json": special_ids(fields),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def weights(reader: GGUFReader, fields: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    out = {}
    for tensor in reader.tensors:
        w = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        module, *inside = tensor.name.removesuffix(".weight").split(".")
        if module == "blk":
            layer, part = inside
            name = f"model.layers.{layer}.{INSIDE[part]}"
            if part in heads:
                w = halves(w, heads[part])
        else:
            name = OUTSIDE[module]
        out[f"{name}.weight"] = w
    return out


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k from adjacent rotated pairs to Hugging Face's pairs (i, i + head_dim / 2)."""
    pairs = w.reshape(heads, len(w) // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def config(fields: dict[str, Any]) -> dict[str, Any]:
    f = {name.removeprefix("llama."): value for name, value in fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": f["embedding_length"],
        "intermediate_size": f["feed_forward_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": f["attention.head_count"],
        "num_key_value_heads": f["attention.head_count_kv"],
        # GGUF stores float32. The shortest decimal that rounds to it is the author's value.
        "rms_norm_eps": float(str(np.float32(f["attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(f["rope.freq_base"]),
        "max_position_embeddings": f["context_length"],
        "vocab_size": len(f["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        **special_ids(fields),
    }


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {f"{k}_token_id": fields[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos")}


def tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": i, "content": token, **plain}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.CONTROL
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    bpe = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False,
    }  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {"type": "BPE", **bpe, "vocab": vocabulary, "merges": fields["tokenizer.ggml.merges"]},
    }


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{k}_token": tokens[fields[f"tokenizer.ggml.{v}_token_id"]] for k, v in keys.items()}
    template = fields["tokenizer.chat_template"]
    return {"tokenizer_class": "GPT2Tokenizer", **named, "chat_template": template}
