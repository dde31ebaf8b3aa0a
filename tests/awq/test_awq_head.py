"""A separate head is a site: scaled through the final norm, error feedback, byte-identical resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import DATA
from tiny_models import tiny

from tinychat_mlx.awq import head, layer_stream
from tinychat_mlx.awq.calibration.rows import Split
from tinychat_mlx.awq.calibration.tokens import encoded
from tinychat_mlx.awq.convert import Result, convert
from tinychat_mlx.awq.layer import Form
from tinychat_mlx.awq.output.tensors import joined_rows, rounded_rows
from tinychat_mlx.awq.quality.evaluate import evaluate
from tinychat_mlx.awq.quality.streamed_logits import last_rows, streamed
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sites import LayerWeights, fold
from tinychat_mlx.awq.time_estimate import estimate
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Decoder, Graph, Loader, Source
from tinychat_mlx.text.tokenizer import Tokenizer
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import TensorFile, entry, write
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight

# Models with separate heads: biases in norm and head (gptj, phi), parallel block, softcap, logit scale.
UNTIED = [
    "llama", "qwen2", "granite", "olmo2", "stablelm", "phi", "gptj", "gpt_neox", "opt-untied", "mixtral",
    "gemma2-untied", "gemma3-untied", "cohere-untied", "internlm2", "exaone",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("accepted")


def opened(variant: str, root: Path, aside: Path | None = None) -> Checkpoint:
    """Open a tiny model with a separate head.

    A tied family gets a copy in `aside` with a perturbed embedding as head.
    """
    name = variant.removesuffix("-untied")
    folder = tiny(name, root).folder
    if aside is None or name == variant:
        return Checkpoint.open(folder)
    shutil.copytree(folder, aside / variant)
    untie(aside / variant, noise=0.1)
    return Checkpoint.open(aside / variant)


def untie(folder: Path, noise: float = 0.0) -> None:
    """Add a head to the only weight file of a folder."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    spec, file = parse_config(config).spec, TensorFile(path)
    arrays = {name: np.array(file.read(name)) for name in file.names}
    own = arrays[f"{spec.name('embed')}.weight"]
    drawn = np.random.default_rng(0).normal(0, noise, own.shape).astype(own.dtype)
    arrays[f"{spec.name('head')}.weight"] = own + drawn
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write(path, [entry(name, a) for name, a in arrays.items()])


class Changed:
    """A model with another head and final norm."""

    def __init__(self, source: Source, head: Weight, vectors: Mapping[str, F32]) -> None:
        self.source, self.head, self.vectors, self.has = source, head, vectors, source.has

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        return self.head if module == self.head.name else self.source.weight(module, shape)

    def vector(self, name: str) -> F32:
        return self.vectors[name] if name in self.vectors else self.source.vector(name)


def norm_vectors(source: Checkpoint) -> dict[str, F32]:
    norm = parse_config(source.config).spec.name("final_norm")
    return {name: source.vector(name) for name in (f"{norm}.weight", f"{norm}.bias") if source.has(name)}


def logits(source: Source, config: Any, ids: Sequence[int]) -> F32:
    backend = ReferenceBackend()
    decoder = Decoder(config, source, backend)
    return backend.to_host(decoder.forward(ids, decoder.new_cache(len(ids)), last_only=False))


@pytest.mark.parametrize("variant", UNTIED)
def test_scaling_the_head_leaves_the_logits_unchanged(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    source = opened(variant, tiny_root, tmp_path)
    config = parse_config(source.config)
    matrix = source.weight(config.spec.name("head"))
    assert isinstance(matrix, Dense)
    weights = LayerWeights(config, 9, {"head": matrix.to_float32()}, {}, norm_vectors(source))
    s = np.exp(np.random.default_rng(1).uniform(-1.5, 1.5, config.hidden_size)).astype(np.float32)
    fold(weights, head.SITE, s, None)
    assert np.abs(weights.linears["head"] - matrix.to_float32()).max() > 0.1
    scaled = Dense(matrix.name, weights.linears["head"], matrix.bias)
    ids = tiny(variant.removesuffix("-untied"), tiny_root).ids
    before = logits(source, config, ids)
    after = logits(Changed(source, scaled, weights.vectors), config, ids)
    # The norm is matched exactly by s; products of ~100 terms, each with 3 float32 roundings: 100 · 3 · 6e-8.
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()


def converted(source: Checkpoint, target: Path, more: Any = None, **settings: Any) -> Result:
    ids = np.random.default_rng(3).integers(3, 97, 256).astype(np.int32)
    chosen = Settings(**({"group_size": 32, "head": "int4"} | settings))
    return convert(source, target, chosen, ReferenceBackend, lambda *_: ids, **(more or {}))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".md"}


@pytest.mark.parametrize("method", ["awq", "awq+"])
def test_what_is_written_is_the_head_that_was_chosen(
    method: str, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes made in stripes equal those made at once, and the report states their error."""
    source = opened("llama", tiny_root)
    result = converted(source, tmp_path / "whole", method=method)
    monkeypatch.setattr(head, "ROWS", 40)
    seen: list[head.Head] = []
    real = head.Head.chosen_by
    monkeypatch.setattr(head.Head, "chosen_by", lambda *a: seen.append(real(*a)) or seen[-1])
    converted(source, tmp_path / "striped", method=method)
    striped, whole = (Checkpoint.open(tmp_path / name).weight("lm_head") for name in ("striped", "whole"))
    assert isinstance(striped, Packed) and isinstance(whole, Packed) and whole.w_bit == 4
    (report,) = result.layers[-1].sites
    assert report.key == "head" and report.error < report.rtn and not report.fell_back
    sampled = seen[0].chosen.parts["head"].to_float32()  # every third row, by which the scales were chosen
    # Rows are independent. Only the order of sums differs, which changes a few codes.
    assert np.mean(striped.to_float32()[::3] != sampled) < 0.02


def test_a_tied_one_is_rounded_and_so_is_one_at_8_bits(tiny_root: Path, tmp_path: Path) -> None:
    for variant, bits in (("llama-tied", "int4"), ("llama", "int8"), ("llama", "fp16")):
        source, target = opened(variant, tiny_root), tmp_path / f"{variant}-{bits}"
        result = converted(source, target, head=bits, method="awq")
        found = Checkpoint.open(target)
        assert [site.key for site in result.layers[-1].sites] != ["head"] and len(result.layers) == 4
        assert np.array_equal(found.vector("model.norm.weight"), half(source.vector("model.norm.weight")))


def half(v: F32) -> F32:
    return v.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "before", "kept"),
    [
        ("awq+", "head_inputs", True),
        ("awq", "head_inputs", True),
        ("awq", "entries", True),
        ("awq", "rim_entries", False),
    ],
)
def test_killed_at_the_head_and_resumed_it_ends_with_the_same_bytes(
    method: str, before: str, kept: bool, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before, in and after the head.

    No layer runs again. kept: the head's input rows still exist.
    """
    source = opened("llama", tiny_root)
    converted(source, tmp_path / "whole", method=method)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(head.Head if before == "entries" else layer_stream, before, stop)
        converted(source, tmp_path / "broken", method=method)
    work = tmp_path / ".broken.converting"
    assert (work / "rows-0004.npy").exists() == kept and (work / "layer-0003.safetensors").exists()
    again: list[int] = []
    with monkeypatch.context() as m:
        quantize = layer_stream.LayerQuantizer.run
        m.setattr(layer_stream.LayerQuantizer, "run", lambda *a: again.append(1) or quantize(*a))
        result = converted(source, tmp_path / "broken", method=method, more={"resume": True})
    assert not again and [site.key for site in result.layers[-1].sites] == ["head"]
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_the_estimate_knows_of_it(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("llama", tiny_root)
    settings = Settings(group_size=32, head="int4", calib="x", tokens=512)
    done: list[int] = []
    real = head.Head.stripes
    monkeypatch.setattr(head.Head, "stripes", lambda self: done.append(1) or real(self))
    with_head = estimate(source, settings, lambda exact: ReferenceBackend())
    assert done == [1] and with_head.seconds > 0
    estimate(source, replace(settings, head="int8"), lambda exact: ReferenceBackend())
    assert done == [1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo model with a copy of its embedding as its head."""
    folder = tmp_path_factory.mktemp("demo") / "untied"
    shutil.copytree(DATA / "demo-fp16", folder)
    untie(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def loss(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Method -> KL of the demo model with that head and final norm against the original, on held-out text."""
    config, backend = parse_config(demo.config), ReferenceBackend()
    tokenizer = Tokenizer.load(demo.folder)
    calib = np.asarray(encoded(str(DATA / "demo_calib.jsonl"), tokenizer)[:4096], np.int32)
    held = encoded(str(DATA / "demo_heldout_text.jsonl"), tokenizer)[:2048]
    dense = streamed(config, demo, backend, held, 512)
    x = last_rows(Graph(config, backend), Loader(config, demo, backend), calib.tolist(), 512, lambda: None)
    of: dict[str, float] = {}
    for method in ("rtn", "awq", "awq+"):
        form, matrix = Form(4, 128), demo.weight("lm_head")
        assert isinstance(matrix, Dense)
        made: Weight = rounded_rows(matrix, 4, 128)
        vectors = norm_vectors(demo)
        if method != "rtn":
            inputs = head.head_inputs(config, demo, backend, x, Split.of(len(x), 512), form, method)
            found = head.Head.chosen_by(config, demo, *inputs, form)
            made, vectors = joined_rows(matrix, found.stripes()), found.weights.vectors
        one = streamed(config, Changed(demo, made, vectors), backend, held, 512)
        kl = evaluate(held, one, dense).kl_mean
        assert kl is not None
        of[method] = kl
    return of


def test_held_out_kl_of_the_demo_with_a_4_bit_head_falls(loss: dict[str, float]) -> None:
    """To 0.88 and 0.35 of rounding's with 8192 calibration tokens and 4096 of text; both are fewer here."""
    assert loss["awq"] < 0.95 * loss["rtn"] and loss["awq+"] < 0.4 * loss["rtn"]
