"""The demo model: the properties of its corpus, its scorer, and the share of correct answers."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkout import DATA

from tinychat_mlx.awq.quality.evaluate import evaluate, kl_ratio
from tinychat_mlx.awq.quality.table import Laboratory
from tinychat_mlx.open import DEMO
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import Packed

try:
    from tinychat_mlx.apps.demo import corpus, talk
    from tinychat_mlx.apps.demo.score import Message, is_right, load_items, score
except ModuleNotFoundError:
    pytest.skip("a wheel has no apps/demo", allow_module_level=True)

FP16 = DATA / "demo-fp16"


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return load_items(DATA / "demo_heldout.jsonl")


def test_the_held_out_files_are_what_the_generator_writes(items: list[dict[str, Any]]) -> None:
    assert corpus.held_out_items() == items
    for name, seed in (("demo_heldout_text.jsonl", 1_000_001), ("demo_calib.jsonl", 1_000_002)):
        assert corpus.text_of_size(seed, 200_000) == load_items(DATA / name)


def test_training_never_sees_a_kept_out_sum() -> None:
    """Sums are read from the text, so that a drill cannot contain a held-out sum."""
    rng, seen = Random(3), 0
    for _ in range(300):
        for message in corpus.some_turns(rng, 12):
            if message["role"] == "assistant":
                for a, op, b in re.findall(r"(?<![\d-])(\d+) ([+-]) (\d+) =", message["content"]):
                    assert not talk.kept_out("sum", int(a), op, int(b))
                    seen += 1
    assert seen > 1000


def test_every_sum_the_corpus_writes_is_right() -> None:
    rng = Random(4)
    for _ in range(200):
        for message in corpus.some_turns(rng, 12):
            lines = re.findall(r"(\d+) ([+-]) (\d+) = \**(-?\d+)", message["content"])
            for a, op, b, value in lines if message["role"] == "assistant" else ():
                assert int(value) == int(a) + (int(b) if op == "+" else -int(b))


def test_a_scored_prompt_asks_for_a_kept_out_combination(items: list[dict[str, Any]]) -> None:
    for item in items:
        if item["skill"] == "sums":
            a, op, b = re.findall(r"(\d+) ([+-]) (\d+) =", item["gold"])[0]
            assert talk.kept_out("sum", int(a), op, int(b))


def test_the_expected_answers_pass_their_own_checks(items: list[dict[str, Any]]) -> None:
    assert len(items) >= 300
    for item in items:
        assert is_right(item["check"], item["gold"]), item


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"kind": "number", "value": -5}, "3 - 8 = **-5**", "3 - 8 = **5**"),
        ({"kind": "number", "value": 12}, "5 + 7 = 12.", "5 + 7 = 112"),
        ({"kind": "contains", "all": ["Rome"]}, "It is **Rome**.", "Romeo knows."),
        ({"kind": "regex", "pattern": "(?i)don't know"}, "I DON'T know.", "It is Rome."),
        ({"kind": "story", "words": ["fox"]}, "A fox. B. C. D. E.", "A fox. B. C. D."),
    ],
)
def test_a_check_tells_right_from_wrong(check: dict[str, Any], right: str, wrong: str) -> None:
    assert is_right(check, right)
    assert not is_right(check, wrong)


def test_scores_count_per_skill_and_in_all(items: list[dict[str, Any]]) -> None:
    """A model that only repeats the expected sums scores all sums and nothing else."""
    gold = {json.dumps(i["messages"]): i["gold"] for i in items if i["skill"] == "sums"}
    scores = score(lambda messages: gold.get(json.dumps(messages), ""), items)
    assert scores.skills["sums"] == 1
    assert scores.skills["facts"] == 0
    assert scores.total == pytest.approx(sum(i["skill"] == "sums" for i in items) / len(items))
    assert all(item["skill"] != "sums" for item, _ in scores.wrong)


def test_the_demo_is_small_and_its_shapes_take_groups_of_128() -> None:
    config = json.loads((FP16 / "config.json").read_text())
    head = config["head_dim"]
    sides = [config[k] for k in ("hidden_size", "intermediate_size", "vocab_size")]
    sides += [head * config[k] for k in ("num_attention_heads", "num_key_value_heads")]
    assert all(side % 128 == 0 for side in sides)
    assert sum(f.stat().st_size for f in FP16.iterdir()) <= 20 * 2**20


def test_the_chat_template_is_what_training_saw() -> None:
    pytest.importorskip("tokenizers")
    from tinychat_mlx.apps.demo import tokenizer
    from tinychat_mlx.text.tokenizer import Tokenizer

    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi 🙂 你好"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "12 + 7"},
    ]
    loaded = Tokenizer.load(FP16)
    assert loaded.render(messages) == tokenizer.render(messages)
    text = "Zürich 🙂 你好\n\t12 + 7 = **19**  x"
    assert loaded.decode(loaded.encode(text)) == text


# The shipped model was made with these: instructions of the cpu backend, NumPy's BLAS and its kernels.
MADE_ON = ("avx2", "0.3.31", "Haswell")


def made_here() -> bool:
    """Return whether this machine rounds like the one that made the shipped model."""
    from threadpoolctl import threadpool_info

    from tinychat_mlx.open import create

    (blas,) = (x for x in threadpool_info() if "numpy" in x["filepath"])
    isa = create("cpu", False, 1).describe().detail.partition(",")[0]
    return (isa, ".".join(blas["version"].split(".")[:3]), blas.get("architecture")) == MADE_ON


def agreement(one: Checkpoint, two: Checkpoint, part: str) -> float:
    """Return the share of equal codes of two models, in modules whose names contain `part`."""
    same, total = 0, 0
    for module in (m for m in one.modules if part in m):
        a, b = one.weight(module), two.weight(module)
        assert isinstance(a, Packed) and isinstance(b, Packed)
        same, total = same + int((a.codes() == b.codes()).sum()), total + a.codes().size
    return same / total


@pytest.mark.slow
def test_the_shipped_model_is_what_its_recipe_gives_today(tmp_path: Path) -> None:
    """Runs the command of its card.

    Another processor gives other last bits and so other codes, but the same loss.
    """
    from tinychat_mlx.apps.cli import main

    (recipe,) = re.findall(r"^    tinychat (convert .*)$", (FP16 / "README.md").read_text(), re.MULTILINE)
    given = recipe.replace("tests/data", str(DATA)).replace(
        "tinychat_mlx/models/demo", str(tmp_path / "demo")
    )
    assert main(given.split()) == 0
    made, shipped = Checkpoint.open(tmp_path / "demo"), Checkpoint.open(DEMO)
    assert agreement(made, shipped, "embed") == 1
    if made_here():
        assert agreement(made, shipped, "") > 0.999
    held = {"text": str(DATA / "demo_heldout_text.jsonl"), "max_tokens": 8192}
    lab = Laboratory(Namespace(model=str(FP16), backend="cpu", threads=None, **held))
    today, then = (evaluate(lab.ids, lab.scores(m), lab.dense, lab.window) for m in (made, shipped))
    assert 0.8 < kl_ratio(today, then)[0] < 1.25
    files = {p.name for p in DEMO.iterdir() if p.name != "model.safetensors"}
    assert files == {p.name for p in (tmp_path / "demo").iterdir()} - {"model.safetensors"}
    assert all((DEMO / name).read_bytes() == (tmp_path / "demo" / name).read_bytes() for name in files)


def right_share(folder: str | Path, items: list[dict[str, Any]], exact: bool) -> float:
    """Return the share of held-out prompts that a model answers correctly with greedy decoding."""
    import tinychat_mlx

    model = tinychat_mlx.load(folder, backend="cpu", exact=exact)

    def generate(messages: list[Message]) -> str:
        return "".join(e.text for e in model.chat(messages, temperature=0.0, max_tokens=220))

    return score(generate, items).total


def test_nine_of_ten_held_out_prompts_are_right_and_int4_loses_at_most_two_points(
    items: list[dict[str, Any]],
) -> None:
    """The bundled int4 model with int8 activations, compared with its fp16 original."""
    fp16 = right_share(FP16, items, exact=True)
    int4 = right_share("demo", items, exact=False)
    assert fp16 >= 0.9 and int4 >= fp16 - 0.02
