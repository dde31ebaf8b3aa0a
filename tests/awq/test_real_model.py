"""The default conversion of a trained model on real English keeps most of its quality.

The model and the text come from the package registry: without it these tests skip, unless TINYCHAT_REQUIRE_EMULATORS
is set (as in CI). Every run converts with a quarter of the usual calibration text. The promises for the defaults, the
published AWQ and 3 bits take minutes each: pytest -m slow tests/awq/test_real_model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_model
import real_quality as rq
import real_text
from emulators import absent
from registry_wheels import Unreachable

import tinychat_mlx
from tinychat_mlx.awq import layer, layer_stream
from tinychat_mlx.awq.calibration.tokens import encoded
from tinychat_mlx.awq.quality.evaluate import Quality
from tinychat_mlx.awq.search.cholesky import solve

WINDOWS = 5  # of 512 tokens, per kind: 10,240 tokens
# With a quarter of the usual text the last bits of a product decide more: a ruined model gives above 1, and no answer.
FEW_TOKENS, FEW_WINDOWS, WITH_LITTLE_TEXT, RIGHT_WITH_LITTLE_TEXT = 2048, 1, 0.6, 7
# Shares of the KL of plain rounding at the same bits, as a mean over the kinds and for each.
WITH_FILE, WITH_OWN_TEXT, ANY_KIND = 0.33, 0.36, 0.40
PUBLISHED_AWQ, THREE_BITS = 0.5, 0.34
RIGHT = 9  # of the answers below
# A word in the float model's greedy answer.
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of England?": "London",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What is the chemical symbol for water?": "H2O",
    "What is the largest ocean on Earth?": "Pacific",
    "Who painted the Mona Lisa?": "Leonardo",
    "What is the tallest mountain in the world?": "Everest",
    "What is the currency of Japan?": "yen",
    "Which organ pumps blood through the body?": "heart",
}
# float32 throughout: each of 210 products sums 576 to 1536 terms, √1536 · 6e-8 = 2.3e-6 of its result at
# random, and the errors of 210 add as a random walk: 2.3e-6 · √210 · 30 (the largest logit) = 1e-3. Rows of q
# and k in the order of GGUF change logits by more than 1.
TOLERANCE = 1e-3

Measure = Callable[..., Quality]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        real_text.folder()
        return real_model.folder()
    except Unreachable as error:
        absent(f"a trained model and real English come from the package registry: {error}")


@pytest.fixture(scope="module")
def bench(folder: Path) -> rq.Bench:
    return rq.Bench(WINDOWS)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (method, w_bit, calib) -> folder. Each conversion runs once."""
    root = tmp_path_factory.mktemp("real")

    @lru_cache
    def make(method: str = "awq+", w_bit: int = 4, calib: str = "self") -> Path:
        target = root / f"{method}-{w_bit}-{calib}"
        rq.convert(target, method, w_bit, calib)
        return target

    return make


@pytest.fixture(scope="module")
def measured(bench: rq.Bench, converted: Callable[..., Path]) -> Measure:
    return lru_cache(lambda *how: bench.quality(converted(*how)))


def test_a_quarter_of_the_usual_text_is_far_better_than_rounding_and_answers_questions(
    folder: Path, tmp_path: Path
) -> None:
    """The usual command otherwise: own text, 4 bits, the whole model and the check at the end."""
    bench, made, rtn = rq.Bench(FEW_WINDOWS), tmp_path / "made", tmp_path / "rtn"
    rq.convert(made, tokens=FEW_TOKENS)
    rq.convert(rtn, "rtn")
    found = rq.shares(bench.quality(made), bench.quality(rtn))
    assert rq.mean(found) <= WITH_LITTLE_TEXT, found
    assert right(given := answers(made)) >= RIGHT_WITH_LITTLE_TEXT, given


def test_the_folder_computes_what_transformers_computes(folder: Path) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    model = tinychat_mlx.load(folder, backend="cpu", exact=True)
    ids = encoded(str(real_text.evaluation("prose")), model.tokenizer)[:200]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    ours = model.logits(ids)
    assert np.abs(ours - expected).max() <= TOLERANCE
    chosen = expected[:-1].argmax(-1) == np.array(ids[1:])
    assert (
        chosen.mean() > 0.25
    )  # a model of this size predicts a third of English tokens: the weights are in place


@pytest.mark.slow
@pytest.mark.parametrize(("calib", "most"), [("file", WITH_FILE), ("self", WITH_OWN_TEXT)])
def test_the_default_conversion_keeps_two_thirds_of_what_rounding_loses(
    measured: Measure, calib: str, most: float
) -> None:
    found = rq.shares(measured("awq+", 4, calib), measured("rtn", 4, "self"))
    assert rq.mean(found) <= most and max(found.values()) <= ANY_KIND, found


@pytest.mark.slow
def test_the_published_awq_keeps_half(measured: Measure) -> None:
    found = rq.shares(measured("awq", 4, "file"), measured("rtn", 4, "self"))
    assert rq.mean(found) <= PUBLISHED_AWQ, found


@pytest.mark.slow
def test_three_bits_keep_two_thirds_of_what_rounding_loses(measured: Measure) -> None:
    found = rq.shares(measured("awq+", 3, "file"), measured("rtn", 3, "self"))
    assert rq.mean(found) <= THREE_BITS, found


def old_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the whole drift that enters a layer at each of its sites, as if the sites before it had not."""
    ready, fed_site = layer_stream.LayerQuantizer._ready, layer_stream.LayerQuantizer._fed_site

    def floats(self: Any, weights: Any, _: Any) -> Any:
        return ready(self, weights.weights, self.backend)

    def before_codes(*args: Any) -> Any:
        """Quantise a site for what the layer's floats, not the codes that it has so far, make of the rows."""
        with monkeypatch.context() as inside:
            inside.setattr(layer_stream.LayerQuantizer, "_ready", floats)
            return fed_site(*args)

    def whole(w: Any, moments: Any, made: Any, judge: Any) -> Any:
        turned = moments.correction(w)[made.order]
        solve(made.f.u, made.f.d, turned)
        change = np.empty_like(w)
        change[:, made.order] = turned.T
        return change, 1.0

    monkeypatch.setattr(layer_stream.LayerQuantizer, "_fed_site", before_codes)
    monkeypatch.setattr(layer, "corrected", whole)


@pytest.mark.slow
def test_the_old_correction_is_caught_and_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 layers, each corrected four times: the network is worse than rounded, though each site is better."""
    old_correction(monkeypatch)
    rq.convert(tmp_path / "out", calib="file", tokens=4096)
    printed = capsys.readouterr()
    assert "awq+ lost more than plain rounding" in printed.out + printed.err
    assert "awq was used instead" in printed.out + printed.err
    assert "awq+ lost more than plain rounding" in (tmp_path / "out" / "README.md").read_text()


def answers(folder: Path) -> dict[str, str]:
    model = tinychat_mlx.load(folder, backend="cpu")
    return {
        question: "".join(
            e.text for e in model.chat([{"role": "user", "content": question}], temperature=0, max_tokens=40)
        )
        for question in QUESTIONS
    }


def right(given: dict[str, str]) -> int:
    return sum(word.lower() in given[question].lower() for question, word in QUESTIONS.items())


@pytest.mark.slow
def test_questions_that_the_float_model_answers_are_answered_still(
    folder: Path, converted: Callable[..., Path]
) -> None:
    dense = answers(folder)
    assert right(dense) == len(QUESTIONS), dense
    given = answers(converted("awq+", 4, "self"))
    assert right(given) >= RIGHT, given
