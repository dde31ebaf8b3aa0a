"""ArchSpec: the structural differences between decoder families that config.json does not state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "embed_norm": "model.embed_norm",
    "positions": "model.embed_positions",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "pre_attn": "input_layernorm",
    "pre_mlp": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
    "shared_router": "mlp.shared_expert_gate",
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
}


@dataclass(frozen=True)
class ArchSpec:
    """Structure of a family. Sizes come from config.json, biases and ties from the tensors."""

    model_type: str
    norm: str = "rms"  # rms | layer
    norm_offset: float = 0.0  # 1.0: the checkpoint stores weight - 1 (Gemma)
    norms: tuple[str, ...] = ("pre_attn", "pre_mlp")  # and post_attn, post_mlp
    parallel: bool = False  # attention and MLP read the layer's input; without pre_mlp, through one norm
    qk_norm: str = ""  # "" | head (over head_dim) | full (over all heads)
    qkv: str = ""  # "" three tensors | blocks (q, then k, then v) | heads (each kv head's queries, k, v)
    gated: bool = True  # down(act(gate) * up), or down(act(up))
    fused_gate_up: bool = False  # one tensor, gate rows first
    positions: str = "rope"  # rope | learned | alibi
    position_offset: int = 0  # learned: row of position 0
    rope_interleaved: bool = False
    rope_layers: str = ""  # "" all | sliding (full layers have none) | listed (no_rope_layers)
    moe: bool = False  # layers are mixtures of experts, except those that config.json lists
    shared_expert: bool = False  # an additional expert for every row, weighted by its own gate
    embed_norm: bool = False
    embed_sqrt: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    default_theta: float | None = 10000.0  # if config.json has none
    window: str = ""  # "" never | all | layers (layer_types, or a pattern, or max_window_layers)
    window_pattern: int = 0  # every n-th layer has full attention if config.json has no layer_types
    reads: frozenset[str] = frozenset()  # keys of config.SCALARS in use; others must be neutral
    names: Mapping[str, str] = field(default_factory=dict)  # roles whose module name differs from NAMES
    keys: Mapping[str, str] = field(default_factory=dict)  # standard config key -> this family's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # config values that the file may omit
    adapt: Callable[[ArchSpec, dict[str, Any]], ArchSpec] | None = None  # flags that change the structure

    def name(self, role: str, layer: int | None = None) -> str:
        """Return the module name of a role in the checkpoint."""
        short = self.names.get(role) or NAMES[role]
        return short if layer is None else f"{self.prefix(layer)}.{short}"

    def expert(self, role: str, layer: int, e: int) -> str:
        """Return the module name of one expert's projection. role: "gate", "up" or "down"."""
        return self.name(f"expert_{role}", layer).replace("{e}", str(e))

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's modules: `model.layers.0`."""
        return f"{self.names.get('layers') or NAMES['layers']}.{layer}"
