"""Compute the memory and disk space of a conversion from its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat_mlx.awq import head
from tinychat_mlx.awq.calibration.recorder import STEP_ROWS
from tinychat_mlx.awq.calibration.rows import SHARE
from tinychat_mlx.awq.output.tensors import rim_names
from tinychat_mlx.awq.settings import Settings, default_tokens, quantised_shapes
from tinychat_mlx.awq.sites import experts, layer_shapes, mixture, routers, shapes, sites
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint

BASE_BYTES = 120 << 20  # Python, NumPy, the buffers of BLAS, the tokenizer


def result_bytes(config: ModelConfig, source: Checkpoint, settings: Settings) -> int:
    """Return the size of the converted weights: codes, float16 scale and bias per group, the rest in float16."""
    body = sum(n * k for _, n, k in quantised_shapes(config))
    total = body * (settings.w_bit / 8 + 4 / settings.group_size)
    total += 2 * sum(n * k for layer in range(config.num_hidden_layers) for n, k in _kept(config, layer))
    matrices, _ = rim_names(config, source)
    for name in matrices:
        n, k = source.info(f"{name}.weight")[1]
        plain = settings.head_bits == 16 or name == config.spec.name("positions")
        total += n * k * (2 if plain else settings.head_bits / 8 + 4 / settings.group_size)
    return int(total)


def _kept(config: ModelConfig, layer: int) -> list[tuple[int, int]]:
    """Return (N, K) of a layer's routers."""
    moe, sizes = mixture(config, layer), shapes(config, layer)
    return [] if moe is None else [sizes[role] for role in routers(moe)]


def calibration_tokens(config: ModelConfig, settings: Settings) -> int:
    return 0 if settings.method == "rtn" else settings.tokens or default_tokens(config)


def disk_bytes(config: ModelConfig, source: Checkpoint, settings: Settings) -> int:
    """Return the peak disk space during the run: layers one by one and merged, and the rows of two layers."""
    rows = 4 * calibration_tokens(config, settings) * config.hidden_size * 4
    return 2 * result_bytes(config, source, settings) + rows


@dataclass(frozen=True)
class Peaks:
    """Peak memory in bytes.

    layer: one decoder layer of float weights. layers: the peak while layers, head and embedding are quantised
    one after another. own_text: while the whole model generates its text at 8 bits; 0 if it does not.
    """

    layer: int
    layers: int
    own_text: int

    @property
    def most(self) -> int:
        return max(self.layers, self.own_text)


def peaks(config: ModelConfig, source: Checkpoint, settings: Settings) -> Peaks:
    """Return the peak memory of each phase."""
    tokens, vocabulary = calibration_tokens(config, settings), config.vocab_size * config.hidden_size
    layer = max(
        sum(4 * n * k for n, k in part.values()) for i in kinds(config) for part in layer_shapes(config, i)
    )
    phases = [int(2 * vocabulary * settings.head_bits / 8)]
    for number in kinds(config):
        phases += _layer_phases(config, number, settings, tokens)
    if head.is_site(config, source, settings):
        phases.append(_head_phase(config, settings, tokens))
    own = 0
    if tokens and settings.calib == "self":
        matrices = len(rim_names(config, source)[0])
        body = sum(n * k for _, n, k in quantised_shapes(config))
        kv = tokens * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        own = BASE_BYTES + int(1.04 * (body + matrices * vocabulary) + kv + vocabulary)
    return Peaks(layer, BASE_BYTES + max(phases), own)


def kinds(config: ModelConfig) -> dict[int, int]:
    """Return {first layer of each kind (dense or mixture): number of such layers}."""
    found: dict[bool, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        found.setdefault(mixture(config, layer) is not None, []).append(layer)
    return {layers[0]: len(layers) for layers in found.values()}


def _head_phase(config: ModelConfig, settings: Settings, tokens: int) -> int:
    """Return the bytes in memory while the head is quantised.

    They are rows and moments, about seven copies of a stripe, the rows for the choice of scales with a scaled
    copy, and the codes twice while they are merged.
    """
    full, c, form = settings.method == "awq+", config.hidden_size, head.head_form(settings)
    stripe = 4 * c * min(head.ROWS, config.vocab_size)
    moments = 4 * c * (2 * c + 3 * c if full else form.group_size)
    codes = int(config.vocab_size * c * (form.w_bit / 8 + 4 / form.group_size))
    return (1 + full) * tokens * 4 * c + moments + 9 * stripe + 2 * codes


def _fed_site(n: int, k: int, tokens: int) -> int:
    """Return the bytes while error feedback quantises (N, K): moments, seven copies of the matrix, the permuted mean
    of H and its factor with a copy, and the held-out rows of both streams."""
    return 4 * k * (k + min(k, n)) + 7 * 4 * n * k + 3 * 4 * k * k + 2 * 4 * k * tokens // SHARE


def _layer_phases(config: ModelConfig, layer: int, settings: Settings, tokens: int) -> list[int]:
    """Return the bytes while a layer runs and while it is quantised, then the same for its largest expert."""
    full, moe = settings.method == "awq+", mixture(config, layer)
    streams, row = 2 if full else 1, 4 * config.hidden_size
    rows = int(tokens * row * (streams + 2 / SHARE))  # and the judged rows of the other streams
    if moe is not None:  # the experts' inputs, and as much again while they are concatenated
        rows += tokens * row * (streams + 1)
    phases, held = [], 0
    for part, sizes in enumerate(layer_shapes(config, layer)):
        read = {role: 4 * n * k for role, (n, k) in sizes.items()}
        weights = sum(read.values())
        if part:  # codes of all experts, and the stack that is being written
            codes = sum(weights // 4 for _ in experts(config, layer))
            held_now = held + int(codes * (settings.w_bit / 8 + 4 / settings.group_size) * 4 / 3)
        else:
            held_now = 0
        if not tokens:
            phases.append(2 * weights + held_now)
            continue
        own = [site for site in sites(config, layer) if site.roles[0] in sizes]
        stacks = [(sum(sizes[r][0] for r in site.roles), sizes[site.roles[0]][1]) for site in own]
        moments = sum(4 * k * (k + min(k, 2 * n) if full else settings.group_size) for n, k in stacks)
        if part:  # the moments of one site at a time
            moments = max(4 * k * (k + min(k, 2 * n) if full else settings.group_size) for n, k in stacks)
        elif moe is not None:
            moments += row * (config.hidden_size if full else settings.group_size)
            held = weights + moments
        widest = max(k for _, k in stacks)
        # Of a site: about seven copies of its matrix; of H the permuted mean, and its factor with a copy.
        site = max(7 * 4 * n * k + (3 * 4 * k * k if full else 0) for n, k in stacks)
        scratch = 8 * STEP_ROWS * widest * 4  # a device keeps what a step took
        running = 2 * weights + moments + scratch
        if full and not part:
            # The float model's inputs of each site are held in float16 until its codes are made.
            inputs = [2 * tokens * k for _, k in stacks]
            running += sum(inputs) - sum(4 * k * min(k, 2 * n) for n, k in stacks)
            site = scratch + max(_fed_site(n, k, tokens) + sum(inputs[i:]) for i, (n, k) in enumerate(stacks))
            moments = held - weights if moe is not None else 0
        phases += [running + rows + held_now, weights + moments + site + rows + held_now]
    return phases
