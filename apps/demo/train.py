"""Train the demo model: one pass over conversations that are generated on the fly.

    python -m tinychat_mlx.apps.demo.train --out demo-fp16 --minutes 80

Muon (Jordan et al. 2024) optimises matrices, AdamW embeddings and norms. The learning rate is constant and then falls
to zero over the last part, so that a run limited by time ends annealed, too. With `--steps` instead of `--minutes`, the
run depends only on its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tinychat_mlx.apps.demo import corpus, tokenizer
from tinychat_mlx.apps.demo.model import DemoLlama, Shape

SEED = 20
BATCH_TOKENS = 6144
MICRO_TOKENS = 2048  # activations of one layer then fit in the CPU's cache
USER_SHARE = 0.25  # share of user turns in the loss, so that the model can write both sides
SHORT = (128, 128, 256, 256, 256, 512)
LONG = (256, 512, 2048, 4096)
LONG_FROM, DECAY_FROM, WARMUP_STEPS = 0.87, 0.65, 60
MUON_LR, ADAM_LR = 6e-3, 4e-3


@dataclass
class Budget:
    """Progress of the run: by steps if given, else by minutes."""

    steps: int
    minutes: float
    step: int = 0
    elapsed_s: float = 0.0

    def progress(self) -> float:
        """Return 0 at the start and 1 at the end."""
        return self.step / self.steps if self.steps else self.elapsed_s / (60 * self.minutes)

    def rate(self) -> float:
        """Return the factor on both learning rates."""
        left = (1 - self.progress()) / (1 - DECAY_FROM)
        return max(0.01, min(1.0, self.step / WARMUP_STEPS, left))


class Rows:
    """Encodes conversations and cuts them to rows of exactly the requested length."""

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.end = tokenizer.token_id(tok, tokenizer.END)

    def row(self, rng: Random, length: int) -> tuple[list[int], list[bool]]:
        """Return the first tokens of a conversation, and which of them are in the loss."""
        ids, keep = [tokenizer.token_id(self.tok, tokenizer.BOS)], [False]
        for message in corpus.conversation(rng):
            body = self.tok.encode(message["content"]).ids
            reply = message["role"] == "assistant"
            learned = reply or rng.random() < USER_SHARE
            ids += [tokenizer.token_id(self.tok, f"<|{message['role']}|>"), *body, self.end]
            keep += [not reply and learned, *[learned] * len(body), learned]
            if len(ids) >= length:
                break
        return ids[:length], keep[:length]

    def batches(self, seed: int, lengths: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the micro batches (ids, keep) of one optimiser step."""
        rng, made = Random(seed), 0
        while made < BATCH_TOKENS:
            length = rng.choice(lengths)
            rows = [self.row(rng, length + 1) for _ in range(max(1, MICRO_TOKENS // length))]
            made += length * len(rows)
            yield (
                torch.from_numpy(np.array([r[0] for r in rows], np.int64)),
                torch.from_numpy(np.array([r[1] for r in rows], np.bool_)),
            )


def optimizers(model: DemoLlama) -> list[torch.optim.Optimizer]:
    """Assign the layers' matrices to Muon and the rest to AdamW."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train_step(
    model: DemoLlama, rows: Rows, opts: list[torch.optim.Optimizer], budget: Budget
) -> tuple[float, int]:
    """Run one optimiser step; return the loss and the number of tokens."""
    lengths = LONG if budget.progress() > LONG_FROM else SHORT
    micro = list(rows.batches(SEED * 1_000_000 + budget.step, lengths))
    total = 0.0
    for ids, keep in micro:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, keep) / len(micro)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt, lr in zip(opts, (MUON_LR, ADAM_LR), strict=True):
        for group in opt.param_groups:
            group["lr"] = lr * budget.rate()
        opt.step()
        opt.zero_grad(set_to_none=True)
    return total, sum(ids.shape[0] * (ids.shape[1] - 1) for ids, _ in micro)


def plain_state(model: DemoLlama) -> dict[str, Tensor]:
    """Return the weights under their Hugging Face names (compiled layers add a prefix)."""
    state = model.state_dict()
    return {name.replace("_orig_mod.", ""): t.detach() for name, t in state.items()}


def export(model: DemoLlama, tok: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder in float16, replacing an older one atomically."""
    work = folder.with_name(folder.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bos, eos = tokenizer.token_id(tok, tokenizer.BOS), tokenizer.token_id(tok, tokenizer.END)
    config = model.s.hf_config(bos, eos)
    chat = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_new_tokens": 256,
    }
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (work / "generation_config.json").write_text(json.dumps(chat, indent=2) + "\n")
    tokenizer.save(tok, work, model.s.max_position_embeddings)
    weights = {name: t.to(torch.float16).contiguous() for name, t in plain_state(model).items()}
    save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(__file__).with_name("README.md"), work)  # the model card
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(work, folder)
    shutil.rmtree(old, ignore_errors=True)


def run(args: argparse.Namespace) -> None:
    """Train until the budget is used, exporting periodically."""
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    model, budget = DemoLlama(Shape()), Budget(args.steps, args.minutes)
    tok = tokenizer.train(model.s.vocab_size)
    rows, opts, tokens = Rows(tok), optimizers(model), 0
    if args.resume:
        saved: dict[str, Any] = torch.load(args.resume, weights_only=True)
        tok = Tokenizer.from_str(saved["tokenizer"])
        rows = Rows(tok)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        budget.step, budget.elapsed_s, tokens = (
            saved["step"],
            saved["elapsed_s"],
            saved["tokens"],
        )
    torch._dynamo.config.recompile_limit = 64
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, dynamic=False)  # type: ignore[assignment]
    clock, mean = time.monotonic() - budget.elapsed_s, 0.0
    next_save = budget.elapsed_s + 60 * args.save_minutes
    while budget.progress() < 1:
        loss, n = train_step(model, rows, opts, budget)
        budget.step, tokens = budget.step + 1, tokens + n
        budget.elapsed_s = time.monotonic() - clock
        mean = loss if not mean else 0.95 * mean + 0.05 * loss
        if budget.step % 10 == 0:
            print(
                f"step {budget.step} {100 * budget.progress():.1f}% tokens {tokens} "
                f"loss {mean:.4f} rate {budget.rate():.3f} {tokens / budget.elapsed_s:.0f} tok/s",
                flush=True,
            )
        if budget.elapsed_s > next_save:
            next_save = budget.elapsed_s + 60 * args.save_minutes
            _save(model, tok, opts, budget, tokens, args.out)
    _save(model, tok, opts, budget, tokens, args.out)


def _save(
    model: DemoLlama,
    tok: Tokenizer,
    opts: list[torch.optim.Optimizer],
    budget: Budget,
    tokens: int,
    out: Path,
) -> None:
    export(model, tok, out)
    state = {
        "model": plain_state(model),
        "opts": [o.state_dict() for o in opts],
        "step": budget.step,
        "elapsed_s": budget.elapsed_s,
        "tokens": tokens,
        "tokenizer": tok.to_str(),
    }
    path = out.with_name(out.name + ".resume.pt")
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="train the demo model from scratch")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--steps", type=int, default=0, help="exact length, instead of minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=10.0)
    parser.add_argument("--resume", type=Path, help="the .resume.pt beside an earlier export")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
