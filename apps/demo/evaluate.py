"""Score an exported demo model on the held-out prompts, with a greedy run in torch.

    python -m tinychat_mlx.apps.demo.evaluate tests/data/demo-fp16 tests/data/demo_heldout.jsonl

This is the reference for fp16; other engines call `score.score` with their own `generate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tinychat_mlx.apps.demo import tokenizer
from tinychat_mlx.apps.demo.model import Block, DemoLlama, Shape, rope
from tinychat_mlx.apps.demo.score import Message, load_items, score

Cache = list[tuple[Tensor, Tensor]]


def load(folder: Path) -> tuple[DemoLlama, Tokenizer]:
    """Read an exported folder; compute in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = DemoLlama(Shape(**{f.name: config[f.name] for f in fields(Shape)}))
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.inference_mode()
def extend(model: DemoLlama, ids: list[int], cache: Cache) -> Tensor:
    """Run new tokens after those in the cache, extend it, return the last logits (V,)."""
    s = model.s
    start, T = cache[0][0].shape[1] if cache else 0, len(ids)
    cos, sin = model.cos[start : start + T], model.sin[start : start + T]  # type: ignore[index]
    x = model.model.embed_tokens(torch.tensor(ids))  # (T, C)
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, Block)
        a, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(y).view(T, -1, s.head_dim).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if start:
            k, v = torch.cat((cache[i][0], k), 1), torch.cat((cache[i][1], v), 1)
            cache[i] = (k, v)
        else:
            cache.append((k, v))
        mask = torch.ones(T, start + T, dtype=torch.bool).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + a.o_proj(y.transpose(0, 1).reshape(T, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return F.linear(model.model.norm(x[-1]), model.model.embed_tokens.weight)


def greedy(model: DemoLlama, tok: Tokenizer, limit: int = 220) -> Callable[[list[Message]], str]:
    """Return a function that answers a conversation greedily."""
    end = tokenizer.token_id(tok, tokenizer.END)

    def generate(messages: list[Message]) -> str:
        cache: Cache = []
        logits = extend(model, tok.encode(tokenizer.render(messages)).ids, cache)
        out: list[int] = []
        while len(out) < limit and (best := int(logits.argmax())) != end:
            out.append(best)
            logits = extend(model, [best], cache)
        return tok.decode(out)

    return generate


def main() -> None:
    """Print the scores, and the wrong answers with --wrong."""
    parser = argparse.ArgumentParser(description="score an exported demo model")
    parser.add_argument("model", type=Path)
    parser.add_argument("items", type=Path)
    parser.add_argument("--wrong", action="store_true", help="show the wrong answers too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores = score(greedy(*load(args.model)), load_items(args.items))
    for item, reply in scores.wrong if args.wrong else ():
        asked = item["messages"][-1]["content"]
        print(f"[{item['skill']}] {asked}\n  gold: {item['gold']}\n  said: {reply}")
    for skill, share in scores.skills.items():
        print(f"{skill:10} {100 * share:5.1f} %")
    print(f"{'total':10} {100 * scores.total:5.1f} %")


if __name__ == "__main__":
    main()
