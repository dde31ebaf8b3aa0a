"""Every model family on every backend, dense and int4, and through AWQ: the only pass over the family matrix.

`python tests/families/test_support.py` runs the pass, writes what it proved to tests/data/support.json, and prints the README's
table from that file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import proofs
import pytest
from checkout import DATA, ROOT
from decoding import decoder, logits
from proofs import proven
from tiny_models import RENAMED, VARIANTS, tiny
from virtual_gpu import SLACK

import tinychat_mlx
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sites import experts, module_name, modules
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.families import ARCHITECTURES
from tinychat_mlx.model.family import ArchSpec
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import Dense, Packed

pytestmark = pytest.mark.usefixtures("accepted")
README, STORED = ROOT / "README.md", DATA / "support.json"
FAMILIES, ALL = sorted(ARCHITECTURES), [*VARIANTS, *RENAMED]
TOKENS = 40  # longer than every window
# Kernels differ for one row, for 2 to 8 and for more: a piece of each, then token by token past every window.
CUTS = [7, 1, 15, *[1] * 17]
# float32 throughout: a logit sums about 100 products through 4 layers, 100 · 6e-8 · 4 ≈ 2e-5 of the largest.
# The smallest error of a wrong row of the table (interleaved rope) is 0.04. int4 changes the weights, not the
# sums.
TOLERANCE = 1e-4


def family_of(variant: str) -> str:
    return VARIANTS[variant][0] if variant in VARIANTS else variant.split("-")[0]


def variant_of(family: str, n: int = 0) -> str:
    """Return the n-th tiny model of a family, counting in a circle."""
    named = [v for v in ALL if family_of(v) == family]
    return named[n % len(named)]


@cache
def int4_of_reference(variant: str, root: Path) -> np.ndarray:
    t = tiny(variant, root)
    return logits(decoder(t.folder, ReferenceBackend(), True), t.ids, [TOKENS])


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("variant", ALL)
def test_family_runs_on(variant: str, int4: bool, backend: Backend, tiny_root: Path) -> None:
    """Dense equals transformers, int4 equals the reference: in one piece, in pieces and in steps."""
    t = tiny(variant, tiny_root)
    want = int4_of_reference(variant, tiny_root) if int4 else t.logits
    made = decoder(t.folder, backend, int4)
    bound = TOLERANCE * (SLACK if backend.name == "mlx" else 1) * np.abs(want).max()
    for cuts in ([TOKENS], CUTS):
        got = logits(made, t.ids, cuts)
        assert got.shape == want.shape and np.abs(got - want).max() < bound
    proven(variant, backend.name, "int4" if int4 else "dense", "whole", "pieces", "steps")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_and_settings_of_a_family(family: str, name: str, seed: int, tiny_root: Path) -> None:
    """As above with other random weights, norms, biases and tokens, in other variants of the family."""
    t = tiny(variant_of(family, seed), tiny_root, seed)
    got = tinychat_mlx.load(t.folder, backend=name, exact=True, threads=1).logits(t.ids)
    assert np.abs(got - t.logits).max() < TOLERANCE * np.abs(t.logits).max()
    proven(variant_of(family, seed), name, "dense", "whole", seed=seed)


def converted(variant: str, root: Path, target: Path, w_bit: int) -> Any:
    ids = np.random.default_rng(3).integers(3, 97, 256).astype(np.int32)
    source, settings = (
        Checkpoint.open(tiny(variant, root).folder),
        Settings(group_size=32, method="awq+", w_bit=w_bit),
    )
    return convert(source, target, settings, ReferenceBackend, lambda *_: ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_converts_to_int4(family: str, tiny_root: Path, tmp_path: Path) -> None:
    """Every linear of every layer except routers is in 4 bits, and cpu computes the folder like reference."""
    converted(variant_of(family), tiny_root, tmp_path / "out", w_bit=4)
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
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
    proven(variant_of(family), "AWQ", "converted", "4 bits")


@pytest.mark.parametrize("variant", ALL)
def test_eight_bits_hardly_move_the_logits(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    """With every fusion, folding and renaming.

    A step is 1/255 of a group's range, its rounding 0.3 % of a weight's size, and at random 5 times that over
    about 30 matrices. Rows in a wrong order, or a scale folded into the wrong place, give 50 % and more.
    """
    result = converted(variant, tiny_root, tmp_path / "out", w_bit=8)
    # A site's error includes the loss of the layers before it: 0.3 % for each of about 30 matrices, squared
    # and summed.
    assert max(site.error for layer in result.layers for site in layer.sites) < 5e-3
    t = tiny(variant, tiny_root)
    got = tinychat_mlx.load(tmp_path / "out", backend="reference").logits(t.ids)
    assert np.sqrt(np.square(got - t.logits).mean()) < 0.02 * np.abs(t.logits).max()
    proven(variant, "AWQ", "converted", "8 bits")


def test_every_architecture_has_a_tiny_model() -> None:
    assert {family_of(variant) for variant in ALL} == set(ARCHITECTURES)


# The README's table ------------------------------------------------------------------------------------
COLUMNS = {
    **dict.fromkeys(("reference", "cpu", "mlx", "cuda"), ("dense", "int4")),
    "AWQ": ("invariant", "converted"),
}


def summary(found: set[proofs.Proof]) -> dict[str, Any]:
    """Return the stored data of a pass: the number of proven combinations, and claims per family and column."""
    families: dict[str, dict[str, list[str]]] = {}
    for family in ARCHITECTURES:
        held = {(p.column, p.claim) for p in found if family_of(p.variant) == family}
        families[family] = {c: [w for w in words if (c, w) in held] for c, words in COLUMNS.items()}
    counts = Counter(f"{p.column} {p.claim}" for p in found)
    return {"combinations": {"all": len(found), **dict(sorted(counts.items()))}, "families": families}


def kind_of(spec: ArchSpec) -> str:
    if spec.moe:
        return "mixtures of experts"
    if spec.norm == "rms":
        return "RMSNorm behind the blocks" if "post_attn" in spec.norms else "RMSNorm"
    return "LayerNorm" if spec.positions == "rope" else "learned positions, ALiBi"


def table(families: dict[str, dict[str, list[str]]]) -> str:
    """Format Markdown: one line for the families of one kind with equal support."""
    lines = dict[tuple[str, ...], list[str]]()
    for family, claims in families.items():
        cells = (", ".join(claims[column]) or "–" for column in COLUMNS)
        lines.setdefault((kind_of(ARCHITECTURES[family]), *cells), []).append(f"`{family}`")
    head = [f"| {' | '.join(['families', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = [f"| {kind}: {', '.join(f)} | {' | '.join(cells)} |" for (kind, *cells), f in lines.items()]
    return "\n".join(head + rows)


def stored() -> dict[str, Any]:
    return dict(json.loads(STORED.read_text(encoding="utf-8")))


def test_the_stored_summary_has_every_family_and_no_claim_that_the_pass_does_not_try() -> None:
    families = stored()["families"]
    assert list(families) == list(ARCHITECTURES), "run `python tests/families/test_support.py`"
    assert all(set(c) == set(COLUMNS) and set(c[n]) <= set(COLUMNS[n]) for c in families.values() for n in c)


@pytest.mark.skipif(not README.exists(), reason="the documents are in the checkout only")
def test_the_readmes_table_is_the_stored_summary() -> None:
    text = (
        README.read_text(encoding="utf-8").partition("<!-- support -->")[2].partition("<!-- /support -->")[0]
    )
    shown = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    expected = table(stored()["families"])
    assert shown == expected, f"README.md's table should be:\n{expected}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ[proofs.FOLDER] = folder
        files = [__file__, str(Path(__file__).with_name("test_awq_fold.py"))]
        failed = pytest.main([*files, "-n", "logical", "-k", "not stored_summary"])
        if failed:
            return int(failed)
        made = summary(proofs.read(Path(folder)))
    STORED.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(table(made["families"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
