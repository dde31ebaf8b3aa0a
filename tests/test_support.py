"""Which family runs where, dense and int4, and what AWQ makes of it: the README's table says exactly what passed.

`python tests/test_support.py` tries everything and prints the table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_convert_families import converted
from tiny_models import RENAMED, VARIANTS, tiny
from virtual_gpu import SLACK

import tinychat_mlx
from tinychat_mlx.arch import ARCHITECTURES
from tinychat_mlx.archspec import ArchSpec
from tinychat_mlx.awq.sites import experts, module_name, modules
from tinychat_mlx.backend import Backend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Decoder
from tinychat_mlx.weight import Dense, Packed, Weight, pack_codes

README = Path(__file__).resolve().parent.parent / "README.md"
FAMILIES = sorted(ARCHITECTURES)
GROUP, TOKENS = 32, 40  # longer than every window


def family_of(variant: str) -> str:
    return VARIANTS[variant][0] if variant in VARIANTS else variant.split("-")[0]


def variant_of(family: str, n: int = 0) -> str:
    """The n-th tiny model of a family; after the last comes the first."""
    named = [v for v in (*VARIANTS, *RENAMED) if family_of(v) == family]
    return named[n % len(named)]


def round_to_int4(weight: Dense) -> Packed:
    """Plain rounding, enough to have int4 weights: scale and offset from each group's ends."""
    w = weight.to_float32()
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    q = (groups - biases[..., None].astype(np.float32)) / scales[..., None].astype(np.float32)
    codes = np.clip(np.rint(q), 0, 15).astype(np.uint8).reshape(w.shape)
    return Packed(weight.name, pack_codes(codes, 4), scales, biases, 4, GROUP, weight.bias)


class Int4:
    """A checkpoint whose linears are int4; routers and learned positions stay dense, as AWQ keeps them."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.has, self.vector = source, source.has, source.vector

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        weight = self.source.weight(module, shape)
        dense = re.search(r"(mlp|block_sparse_moe)\.gate$|shared_expert_gate$|wpe$|embed_positions$", module)
        return weight if dense or not isinstance(weight, Dense) else round_to_int4(weight)


def decoder(folder: Path, backend: Backend, int4: bool) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    return Decoder(parse_config(checkpoint.config), Int4(checkpoint) if int4 else checkpoint, backend)


def logits(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """Half in one piece, the rest token by token, so that both ways of running are tried."""
    cache, host = decoder.new_cache(len(ids)), decoder.backend.to_host
    half = len(ids) // 2
    rows = [host(decoder.forward(ids[:half], cache, last_only=False))]
    rows += [host(decoder.forward([t], cache)) for t in ids[half:]]
    return np.concatenate(rows)


@cache
def expected(family: str, int4: bool, root: Path) -> np.ndarray:
    t = tiny(variant_of(family), root)
    return logits(decoder(t.folder, ReferenceBackend(), int4), t.ids) if int4 else t.logits


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_runs_on(family: str, int4: bool, backend: Backend, tiny_root: Path) -> None:
    """Dense equals transformers, int4 equals the reference on the same codes, to 1e-4 of the largest logit.

    float32 sums of about 100 terms through 4 layers are good to 2e-5; int4 changes the weights, not that.
    """
    t = tiny(variant_of(family), tiny_root)
    got = logits(decoder(t.folder, backend, int4), t.ids)
    want = expected(family, int4, tiny_root)
    bound = 1e-4 * (SLACK if backend.name == "mlx" else 1)
    assert np.abs(got - want).max() < bound * np.abs(want).max()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_and_settings_of_a_family(family: str, name: str, seed: int, tiny_root: Path) -> None:
    """As above with other random weights, norms, biases and tokens, in the family's other variants where it has some."""
    t = tiny(variant_of(family, seed), tiny_root, seed)
    got = tinychat_mlx.load(t.folder, backend=name, exact=True, threads=2).logits(t.ids)
    assert np.abs(got - t.logits).max() < 1e-4 * np.abs(t.logits).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_converts_to_int4(family: str, tiny_root: Path, tmp_path: Path) -> None:
    """Every linear of every layer but routers comes out in 4 bits, and cpu computes the folder as reference does."""
    converted(variant_of(family), tiny_root, tmp_path / "out", method="awq+", w_bit=4)
    made = Checkpoint.open(tmp_path / "out")
    config = parse_config(made.config)
    for layer in range(config.num_hidden_layers):
        for expert in (None, *experts(config, layer)):
            for module in modules(config, layer, expert):
                weight = made.weight(module_name(config, layer, module.role, expert))
                if module.role.endswith("router"):
                    assert isinstance(weight, Dense)
                else:
                    assert isinstance(weight, Packed) and weight.w_bit == 4
    ids = tiny(variant_of(family), tiny_root).ids
    want, got = (
        tinychat_mlx.load(tmp_path / "out", backend=b, exact=True).logits(ids) for b in ("reference", "cpu")
    )
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


# The README's table: what it says is what passed -------------------------------------------------------
COLUMNS = {
    **dict.fromkeys(("reference", "cpu", "mlx", "cuda"), ("dense", "int4")),
    "AWQ": ("invariant", "converted"),
}
Claim = tuple[str, str, str]  # family, column, word
AWQ_TESTS = {  # tests of a variant each, in files that run before this one
    "test_scaling_every_site_leaves_the_layer_unchanged": "invariant",
    "test_eight_bits_hardly_move_the_logits": "converted",
}


def claim(nodeid: str) -> Claim | None:
    """What a test shows when it passes."""
    name, _, rest = nodeid.rpartition("::")[2].partition("[")
    ids = rest.removesuffix("]")
    if name in AWQ_TESTS:
        return family_of(ids), "AWQ", AWQ_TESTS[name]
    if name == "test_family_converts_to_int4":
        return ids, "AWQ", "converted"
    if name in ("test_family_runs_on", "test_other_weights_and_settings_of_a_family"):
        said = set(ids.split("-"))
        family, column = (next(iter(said & set(known))) for known in (ARCHITECTURES, COLUMNS))
        return family, column, "int4" if "int4" in said else "dense"
    return None


def outcomes(config: pytest.Config, *kinds: str) -> set[Claim]:
    """The claims of tests of this run that ended so."""
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    found = (claim(report.nodeid) for kind in kinds for report in stats.get(kind, ()))
    return {c for c in found if c is not None}


def kind_of(spec: ArchSpec) -> str:
    if spec.moe:
        return "mixtures of experts"
    if spec.norm == "rms":
        return "RMSNorm behind the blocks" if "post_attn" in spec.norms else "RMSNorm"
    return "LayerNorm" if spec.positions == "rope" else "learned positions, ALiBi"


def table(claims: Iterable[Claim]) -> str:
    """Markdown: a line for the families of one kind that can do the same."""
    held, lines = set(claims), dict[tuple[str, ...], list[str]]()
    for family, spec in ARCHITECTURES.items():
        cells = (", ".join(w for w in words if (family, c, w) in held) or "–" for c, words in COLUMNS.items())
        lines.setdefault((kind_of(spec), *cells), []).append(f"`{family}`")
    head = [f"| {' | '.join(['families', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = [f"| {kind}: {', '.join(f)} | {' | '.join(cells)} |" for (kind, *cells), f in lines.items()]
    return "\n".join(head + rows)


def claims_of(lines: list[str]) -> set[Claim]:
    """A table read back."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (family, column, word)
        for first, *cells in rows[2:]
        for family in re.findall(r"`(\w+)`", first)
        for column, cell in zip(rows[0][1:], cells, strict=True)
        for word in cell.split(", ")
    }


@pytest.mark.skipif(not README.exists(), reason="a checkout's documents are not here")
def test_the_readme_says_what_passed(pytestconfig: pytest.Config) -> None:
    """What this run did not try, for want of a library or because it was asked for a part, is left as it is."""
    text = (
        README.read_text(encoding="utf-8").partition("<!-- support -->")[2].partition("<!-- /support -->")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    failed = outcomes(pytestconfig, "failed", "error")
    expected = table((claims_of(lines) | outcomes(pytestconfig, "passed")) - failed)
    assert "\n".join(lines) == expected, f"README.md's table should be:\n{expected}"


class Printer:
    """Shows the table when the tests are done."""

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        print(table(outcomes(config, "passed") - outcomes(config, "failed", "error")))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    files = [str(here / name) for name in ("test_awq_fold.py", "test_convert_families.py", "test_support.py")]
    sys.exit(pytest.main([*files, "-k", "not the_readme"], [Printer()]))
