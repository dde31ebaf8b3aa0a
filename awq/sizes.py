"""Compute the memory and disk space of a conversion from its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat_mlx.awq import head
from tinychat_mlx.awq.calibration.recorder import STEP_ROWS
from tinychat_mlx.awq.calibration.rows import SHARE
from tinychat_mlx.awq.output.tensors import rim_names
from tinychat_mlx.awq.quality.streamed_logits import LOGITS
from tinychat_mlx.awq.settings import Settings, default_tokens, quantised_shapes
from tinychat_mlx.awq.sites import experts, layer_shapes, mixture, routers, shapes, sites
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.checkpoint import Checkpoint

KEPT_BYTES = (
    40 << 20
)  # an array of a step that is not larger stays with the device (KEPT of backends/cpu/memory.py)
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
    if tokens:
        phases.append(_verdict_phase(config, settings))
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


def _verdict_phase(config: ModelConfig, settings: Settings) -> int:
    """Return the bytes in memory while the result's head is compared with the float one and with plain rounding.

    They are the head in float32, the pages of the file that it is read from, the codes of both, and logits.
    """
    weights = config.vocab_size * config.hidden_size
    return int(weights * (4 + 2 + 2 * settings.head_bits / 8)) + 6 * 8 * LOGITS


def _layer_phases(config: ModelConfig, layer: int, settings: Settings, tokens: int) -> list[int]:
    """Return the bytes in memory in each phase of a layer, and of each of its experts."""
    moe = mixture(config, layer)
    shown = 0 if moe is None else tokens  # rows that enter experts
    streams = 2 if settings.method == "awq+" else 1
    # Of the calibration rows, the judged ones are in three streams. The experts' inputs are concatenated.
    rows = 4 * config.hidden_size * int(tokens * (streams + 2 / SHARE) + shown * (streams + 1))
    phases, router = [], 0
    for part, sizes in enumerate(layer_shapes(config, layer)):
        weights = 4 * sum(n * k for n, k in sizes.values())
        held = 0
        if part:  # the rest of the layer, and the codes of all experts with the stack that is being written
            per_weight = settings.w_bit / 8 + 4 / settings.group_size
            held = router + int(len(experts(config, layer)) * weights / 4 * per_weight * 4 / 3)
        if not tokens:
            phases.append(2 * weights + held)
            continue
        own = [site for site in sites(config, layer) if site.roles[0] in sizes]
        stacks = [(sum(sizes[role][0] for role in site.roles), sizes[site.roles[0]][1]) for site in own]
        moments = [_moments(n, k, settings) for n, k in stacks]
        running = max(moments) if part else sum(moments)  # experts: of one site at a time
        quantising = running + max(_search(*stack, settings) for stack in stacks)
        if settings.method == "awq+" and not part:
            running, quantising = _fed_phases(stacks, weights, tokens)
        if moe is not None and not part:
            entering = _moments(config.hidden_size, config.hidden_size, settings)
            router, running, quantising = weights + entering, running + entering, quantising + entering
        scratch = 8 * STEP_ROWS * max(k for _, k in stacks) * 4  # a device keeps what a step took
        phases += [held + rows + 2 * weights + running + scratch, held + rows + weights + quantising]
    return phases


def _moments(n: int, k: int, settings: Settings) -> int:
    """Return the bytes of the moments of the inputs of (N, K)."""
    return 4 * k * (k + min(k, 2 * n) if settings.method == "awq+" else settings.group_size)


def _search(n: int, k: int, settings: Settings) -> int:
    """Return the bytes while (N, K) is quantised: copies of the matrix, and of H the mean and its factor."""
    return 7 * 4 * n * k + (3 * 4 * k * k if settings.method == "awq+" else 0)


def _fed_phases(stacks: list[tuple[int, int]], weights: int, tokens: int) -> tuple[int, int]:
    """Return the bytes, next to rows and float weights, while the float layer runs and while error feedback
    quantises its sites (N, K) in turn.

    The float model's inputs of every site are held in float16 until its codes are made. A site takes the mean of H
    and its factor, copies of its matrix, and the held-out rows of both streams. Next to it are the weights with
    scales folded in, the pages of the file, and what two devices keep.
    """
    inputs = [2 * tokens * k for _, k in stacks]
    running = sum(4 * k * k for _, k in stacks) + sum(inputs)
    each = [
        8 * 4 * n * k + 2 * 4 * k * k + 2 * 4 * k * tokens // SHARE + sum(inputs[i:])
        for i, (n, k) in enumerate(stacks)
    ]
    kept = max((4 * STEP_ROWS * k for _, k in stacks if 4 * STEP_ROWS * k <= KEPT_BYTES), default=0)
    return running, max(each) + weights + weights // 2 + 8 * kept
