"""A family is added with the two lines in docs/architectures.md, and all checks pass for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from tiny_models import VARIANTS

from tests.families import test_awq_fold, test_support
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.families import ARCHITECTURES
from tinychat_mlx.model.family import ArchSpec

PAGE = ROOT / "docs" / "architectures.md"
pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="the documents are in the checkout only"),
    pytest.mark.usefixtures("accepted"),
]


def shown(start: str) -> Any:
    """Return the evaluated line of code on the page that starts with this text."""
    (line,) = re.findall(rf"^ +({re.escape(start)}.*),$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return eval(f"{{{line}}}" if start.startswith('"') else line, {"ArchSpec": ArchSpec})


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    spec = shown("ArchSpec(")
    family: str = spec.model_type
    assert family not in ARCHITECTURES, "the page must show a family that the table lacks"
    (variant,) = shown(f'"{family}"').values()
    monkeypatch.setitem(ARCHITECTURES, family, spec)
    monkeypatch.setitem(VARIANTS, family, variant)
    yield family


@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_it_computes_what_transformers_does(
    added: str, int4: bool, backend: Backend, tiny_root: Path
) -> None:
    test_support.test_family_runs_on(added, int4, backend, tiny_root)


def test_awq_folds_and_converts_it(added: str, tiny_root: Path, tmp_path: Path) -> None:
    test_awq_fold.test_scaling_every_site_leaves_the_layer_unchanged(added, tiny_root)
    test_awq_fold.test_every_linear_belongs_to_one_site_and_every_norm_before_one_is_used(added, tiny_root)
    test_support.test_eight_bits_hardly_move_the_logits(added, tiny_root, tmp_path)
