"""How much memory and disk does a conversion need? Told from shapes, so that it can be refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tinychat_mlx import limits
from tinychat_mlx.awq import head
from tinychat_mlx.awq.record import STEP_ROWS
from tinychat_mlx.awq.settings import Settings, default_tokens, quantised_shapes
from tinychat_mlx.awq.sites import experts, layer_shapes, mixture, routers, shapes, sites
from tinychat_mlx.awq.tensors import rim_group, rim_names
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.words import size

BASE_BYTES = 120 << 20  # Python, NumPy, the buffers of BLAS, the tokenizer


@dataclass(frozen=True)
class Needs:
    """peak_bytes of memory; disk while it runs, and in the end."""

    peak_bytes: int
    disk_bytes: int
    result_bytes: int
    calibration_tokens: int


def needs(config: ModelConfig, source: Checkpoint, settings: Settings) -> Needs:
    """What the conversion of a dense model takes."""
    tokens = 0 if settings.method == "rtn" else settings.tokens or default_tokens(config)
    result = result_bytes(config, source, settings)
    rows = 4 * tokens * config.hidden_size * 4  # of two layers
    return Needs(peak_bytes(config, source, settings, tokens), 2 * result + rows, result, tokens)


def shortage(wanted: Needs, target: Path, kept: int = 0) -> str:
    """What this machine lacks for a conversion to `target`, or "". kept: bytes of it that are on the disk already."""
    if wanted.peak_bytes > (free := limits.available()):
        return f"the conversion needs {size(wanted.peak_bytes)} of memory, {size(free)} are free"
    if wanted.disk_bytes - kept > (room := limits.disk_free(target.parent)):
        return (
            f"the conversion needs {size(wanted.disk_bytes - kept)} more on the disk of {target.parent}, "
            f"which has {size(room)} free"
        )
    return ""


def smaller(config: ModelConfig, source: Checkpoint, settings: Settings) -> str:
    """How the same conversion would take less memory, or ""."""
    if settings.method == "rtn" or settings.calib != "self":
        return ""
    least = needs(config, source, replace(settings, calib="a file")).peak_bytes
    return (
        f"give --calib FILE (then {size(least)} do), "
        if least < 0.9 * needs(config, source, settings).peak_bytes
        else ""
    )


def kinds(config: ModelConfig) -> dict[int, int]:
    """The first layer of each kind, dense or a mixture, and how many there are of it."""
    found: dict[bool, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        found.setdefault(mixture(config, layer) is not None, []).append(layer)
    return {layers[0]: len(layers) for layers in found.values()}


def result_bytes(config: ModelConfig, source: Checkpoint, settings: Settings) -> int:
    """Size of the converted weights: codes, a float16 scale and bias a group, all else in float16."""
    body = sum(n * k for _, n, k in quantised_shapes(config))
    total = body * (settings.w_bit / 8 + 4 / settings.group_size)
    total += 2 * sum(n * k for layer in range(config.num_hidden_layers) for n, k in _kept(config, layer))
    matrices, _ = rim_names(config, source)
    for name in matrices:
        n, k = source.info(f"{name}.weight")[1]
        plain = settings.head_bits == 16 or name == config.spec.name("positions")
        total += n * k * (2 if plain else settings.head_bits / 8 + 4 / rim_group(config, settings.group_size))
    return int(total)


def _kept(config: ModelConfig, layer: int) -> list[tuple[int, int]]:
    """(N, K) of a layer's routers."""
    moe, sizes = mixture(config, layer), shapes(config, layer)
    return [] if moe is None else [sizes[role] for role in routers(moe)]


def peak_bytes(config: ModelConfig, source: Checkpoint, settings: Settings, tokens: int) -> int:
    """The most memory any phase holds."""
    vocabulary = config.vocab_size * config.hidden_size
    phases = [int(2 * vocabulary * settings.head_bits / 8)]
    for layer in kinds(config):
        phases += _layer_phases(config, layer, settings, tokens)
    if head.is_site(config, source, settings):
        phases.append(_head_phase(config, settings, tokens))
    if tokens and settings.calib == "self":
        matrices = len(rim_names(config, source)[0])
        body = sum(n * k for _, n, k in quantised_shapes(config))
        kv = tokens * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        phases.append(int(1.04 * (body + matrices * vocabulary) + kv + vocabulary))
    return BASE_BYTES + max(phases)


def _head_phase(config: ModelConfig, settings: Settings, tokens: int) -> int:
    """Bytes held while the head is quantised: rows and moments, a stripe about seven times over, the rows by which
    scales were chosen with theirs scaled, codes and the whole that they are put together into."""
    full, c, form = settings.method == "awq+", config.hidden_size, head.head_form(config, settings)
    stripe = 4 * c * min(head.ROWS, config.vocab_size)
    moments = 4 * c * (2 * c + 3 * c if full else form.group_size)
    codes = int(config.vocab_size * c * (form.w_bit / 8 + 4 / form.group_size))
    return (1 + full) * tokens * 4 * c + moments + 9 * stripe + 2 * codes


def _layer_phases(config: ModelConfig, layer: int, settings: Settings, tokens: int) -> list[int]:
    """Bytes held while a layer runs and while it is quantised; then the same for the largest of its experts."""
    full, moe = settings.method == "awq+", mixture(config, layer)
    streams, row = 2 if full else 1, 4 * config.hidden_size
    rows = tokens * row * streams
    if moe is not None:  # what comes to the experts, and as much again while it is put together
        rows += tokens * row * (streams + 1)
    phases, held = [], 0
    for part, sizes in enumerate(layer_shapes(config, layer)):
        read = {role: 4 * n * k for role, (n, k) in sizes.items()}
        weights = sum(read.values())
        if part:  # codes of all experts, the stack that is being written
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
        if part:  # one site's at a time
            moments = max(4 * k * (k + min(k, 2 * n) if full else settings.group_size) for n, k in stacks)
        elif moe is not None:
            moments += row * (config.hidden_size if full else settings.group_size)
            held = weights + moments
        widest = max(k for _, k in stacks)
        # Of a site: its matrix about seven times over, and of H the permuted mean and its factor with a copy.
        site = max(7 * 4 * n * k + (3 * 4 * k * k if full else 0) for n, k in stacks)
        running = 2 * weights + moments + 8 * STEP_ROWS * widest * 4
        phases += [running + rows + held_now, weights + moments + site + rows + held_now]
    return phases
