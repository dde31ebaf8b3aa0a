"""Decoder families as data: what differs between architectures, and nothing that config.json says.

A new family is a row of ARCHITECTURES. Names map a role of the graph to the module name under a layer
(`q`: "self_attn.q_proj") or, for the five outside the layers, to the full name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinychat_mlx.errors import ConfigError

NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "pre_attn": "input_layernorm",
    "pre_mlp": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class ArchSpec:
    """Structure of a family. Sizes and biases come from the checkpoint."""

    model_type: str
    norm: str = "rms"  # rms | layer
    norm_offset: float = 0.0  # 1.0: the checkpoint stores weight - 1 (Gemma)
    norms: tuple[str, ...] = ("pre_attn", "pre_mlp")  # and post_attn, post_mlp
    parallel: bool = False  # attention and MLP read the same normed input
    qk_norm: str = ""  # "" | head (over head_dim) | full (over all heads)
    gated: bool = True  # down(act(gate) * up), or down(act(up))
    rope_interleaved: bool = False
    default_theta: float | None = 10000.0  # where config.json gives none
    default_act: str | None = None  # where config.json gives none
    window: str = ""  # "" never | all | layers (config's layer_types, or max_window_layers)
    reads: frozenset[str] = frozenset()  # keys of config.SCALARS this family obeys; others must be neutral
    names: Mapping[str, str] = field(default_factory=dict)  # roles whose name is not the usual one

    def name(self, role: str, layer: int | None = None) -> str:
        """Role -> module name in the checkpoint."""
        short = self.names.get(role) or NAMES[role]
        return short if layer is None else f"{self.prefix(layer)}.{short}"

    def prefix(self, layer: int) -> str:
        """Where a layer's modules stand: `model.layers.0`."""
        return f"{self.names.get('layers') or NAMES['layers']}.{layer}"


ARCHITECTURES: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        ArchSpec("llama"),
        ArchSpec("mistral", window="all"),
        ArchSpec("qwen2", window="layers"),
        ArchSpec("qwen3", qk_norm="head", window="layers"),
    )
}


def find(model_type: object) -> ArchSpec:
    """The row of a family; raises ConfigError naming the nearest supported one."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(sorted(ARCHITECTURES))
    near = difflib.get_close_matches(str(model_type), ARCHITECTURES, 1, 0.5)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ConfigError(f"config.json: model_type {model_type!r} is not supported{hint}; supported are {known}")
