"""The model that is trained: a plain Llama decoder in torch.

Attribute names follow Hugging Face, so `state_dict()` is the checkpoint without renaming.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the demo model; every matrix side is a multiple of 128 (one AWQ group)."""

    vocab_size: int = 3072
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    def hf_config(self, bos: int, eos: int) -> dict[str, object]:
        """Return the content of `config.json` for this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": eos,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "use_cache": True,
            **asdict(self),
        }


class RMSNorm(nn.Module):
    """Scale each row to unit root mean square (Zhang & Sennrich 2019), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C) in x's dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by position (Su et al. 2021), halves layout: x (B, H, T, D), cos/sin (T, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weigh values causally: q, k, v (B, H, T, D) -> (B, H, T, D).

    Up to 512 tokens it uses the explicit form, whose compiled backward pass is twice as fast on a CPU.
    """
    T, D = q.shape[-2:]
    if T > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.transpose(-1, -2)).float() * D**-0.5
    weights = weights.masked_fill(~past, float("-inf")).softmax(-1)
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        q_size, kv_size = (
            s.num_attention_heads * s.head_dim,
            s.num_key_value_heads * s.head_dim,
        )
        self.q_proj = nn.Linear(s.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        s = self.s
        B, T, _ = x.shape
        repeat = s.num_attention_heads // s.num_key_value_heads
        q = self.q_proj(x).view(B, T, s.num_attention_heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, s.num_key_value_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, s.num_key_value_heads, s.head_dim).transpose(1, 2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = attend(q, k, v)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return out


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and last norm: `model` in Hugging Face's names."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.num_hidden_layers))
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)


class DemoLlama(nn.Module):
    """The whole model; the head is the embedding, transposed."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.model = Trunk(s)
        half = torch.arange(0, s.head_dim, 2, dtype=torch.float64) / s.head_dim
        angles = torch.arange(s.max_position_embeddings)[:, None] * s.rope_theta**-half
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * s.num_hidden_layers) ** 0.5 if deep else 0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """Map token ids (B, T) to normalised hidden states (B, T, C)."""
        T = ids.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]  # type: ignore[index]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V)."""
        return F.linear(self.hidden(ids), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Return the mean loss of predicting the ids (B, T) marked by keep (B, T) from the previous ones."""
        keep = keep[:, 1:].flatten()
        x = self.hidden(ids[:, :-1]).flatten(0, 1)[keep]
        target = ids[:, 1:].flatten()[keep]
        loss: Tensor = HeadLoss.apply(x, self.model.embed_tokens.weight, target)  # type: ignore[no-untyped-call]
        return loss


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy after a linear head, without the whole logits in memory.

    Rows are processed in chunks whose logits fit in the cache, and the gradient is computed in the same pass. On a CPU
    this halves the time of head and loss, which would otherwise be a third of the total.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Map x (R, C), weight (V, C), target (R,) to the mean loss, keeping its gradients."""
        low, n = weight.to(torch.bfloat16), x.shape[0]
        grad_x, grad_w = (
            torch.empty_like(x, dtype=torch.bfloat16),
            torch.zeros_like(weight),
        )
        total = x.new_zeros((), dtype=torch.float32)
        for i in range(0, n, HeadLoss.CHUNK):
            rows, t = (
                x[i : i + HeadLoss.CHUNK].to(torch.bfloat16),
                target[i : i + HeadLoss.CHUNK],
            )
            logits = (rows @ low.T).float()
            at = torch.arange(len(t))
            picked = logits[at, t]
            logits -= logits.amax(1, keepdim=True)
            shift = picked - logits[at, t]
            exp = logits.exp_()
            sums = exp.sum(1, keepdim=True)
            total += (sums[:, 0].log() + shift - picked).sum()
            exp /= sums * n
            exp[at, t] -= 1 / n
            grad = exp.to(torch.bfloat16)
            grad_x[i : i + HeadLoss.CHUNK] = grad @ low
            grad_w += grad.T @ rows
        ctx.save_for_backward(grad_x.to(x.dtype), grad_w)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the stored gradients."""
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grads[0], grad_w * grads[0], None
