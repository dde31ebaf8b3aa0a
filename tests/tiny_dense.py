"""A tiny dense Llama folder with a tokenizer and a chat template, for the tests of `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tinychat_mlx.tensorfile import entry, write

WORDS = [f"w{i}" for i in range(80)]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 80,
    "eos_token_id": 81,
    "torch_dtype": "float16",
    "a_key_nobody_knows": [1, {"x": None}],
}
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random float16 weights with a few input channels ten times as large as the others."""
    r = np.random.default_rng(seed)
    c, f = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    out = {"model.embed_tokens.weight": r.normal(0, 1, (config["vocab_size"], c))}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = r.normal(0, 0.3, (config["vocab_size"], c))
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        sizes = {"self_attn.q": (q, c), "self_attn.k": (kv, c), "self_attn.v": (kv, c), "self_attn.o": (c, q)}
        sizes |= {"mlp.gate": (f, c), "mlp.up": (f, c), "mlp.down": (c, f)}
        for name, shape in sizes.items():
            out[f"{p}{name}_proj.weight"] = r.normal(0, shape[1] ** -0.5, shape)
        for norm in ("input", "post_attention"):
            loud = np.where(r.random(c) < 0.05, 10, 1)
            out[f"{p}{norm}_layernorm.weight"] = loud * (1 + 0.1 * r.normal(size=c))
    out["model.norm.weight"] = 1 + 0.1 * r.normal(size=c)
    return {name: a.astype(np.float16) for name, a in out.items()}


def save(folder: Path, weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """Write the folder. `changes` replace keys of config.json."""
    config = CONFIG | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = tensors(config) if weights is None else weights
    write(folder / "model.safetensors", [entry(name, a) for name, a in arrays.items()])
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<s>", "</s>", "<user>", "<assistant>", "<unk>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    raw.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [81]}))
    (folder / "LICENSE").write_text("all yours\n")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n# tiny\n")
    return folder


def text(folder: Path, tokens: int = 600, seed: int = 0) -> Path:
    """Write chats of random words as a .jsonl file."""
    r = np.random.default_rng(seed)
    path = folder / f"text-{seed}.jsonl"
    lines = []
    for _ in range(tokens // 20):
        said = [" ".join(r.choice(WORDS, 8)) for _ in range(2)]
        roles = ("user", "assistant")
        lines.append(
            json.dumps({"messages": [{"role": a, "content": b} for a, b in zip(roles, said, strict=True)]})
        )
    path.write_text("\n".join(lines) + "\n")
    return path
