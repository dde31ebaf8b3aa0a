"""Quality bounds of the quantiser, on the demo's float16 model and on held-out text."""

from __future__ import annotations

from argparse import Namespace

import pytest
from checkout import DATA

from tinychat_mlx.awq.quality.evaluate import Quality, kl_ratio
from tinychat_mlx.awq.quality.table import Laboratory
from tinychat_mlx.awq.settings import Settings

CALIB = str(DATA / "demo_calib.jsonl")


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    """The dense model's predictions on 6,144 held-out tokens, computed once."""
    held = {"text": str(DATA / "demo_heldout_text.jsonl"), "max_tokens": 6144}
    return Laboratory(Namespace(model=str(DATA / "demo-fp16"), backend="cpu", threads=None, **held))


def measured(lab: Laboratory, method: str, w_bit: int, calib: str = CALIB) -> Quality:
    return lab.run(Settings(method=method, w_bit=w_bit, calib=calib, tokens=8192)).quality


@pytest.mark.parametrize("w_bit", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_awq_and_awq_plus_lose_the_promised_share_of_what_rounding_loses(lab: Laboratory, w_bit: int) -> None:
    """At most 0.9 and 0.45.

    Half the usual calibration text gives 0.78 and 0.37 at 4 bits, 0.74 and 0.39 at 3. Other seeds and
    processors change these by 0.02; the standard error from the text is 0.06 and 0.04.
    """
    rtn = measured(lab, "rtn", w_bit)
    for method, most in (("awq", 0.9), ("awq+", 0.45)):
        share, error = kl_ratio(measured(lab, method, w_bit), rtn)
        assert share <= most, f"{method}: {share:.3f} ± {error:.3f}"


@pytest.mark.slow
def test_so_does_text_that_the_model_wrote_itself(lab: Laboratory) -> None:
    share, error = kl_ratio(measured(lab, "awq+", 4, "self"), measured(lab, "rtn", 4))
    assert share <= 0.45, f"{share:.3f} ± {error:.3f}"
