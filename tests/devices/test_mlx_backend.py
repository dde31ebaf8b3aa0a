"""MLX in float32, on a CPU or a Mac: the graph equals the reference, tokens equal mlx-lm's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import agree, answer, decoder, logits, quantised, tokens
from tiny_models import REPRESENTATIVES, VARIANTS, tiny

import tinychat_mlx
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Backend, Segment


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel. Only one test below uses it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("variant", [*REPRESENTATIVES, "qwen2-window", "phi3-longrope"])
def test_logits_equal_the_reference_in_one_piece_in_pieces_and_step_by_step(
    variant: str, tiny_root: Path
) -> None:
    t = tiny(variant, tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend()), t.ids, [40])
    for captured, every in ((False, ([40], [17, 1, 7, 1, 1, 13])), (True, ([8, *[1] * 16, 16],))):
        d = decoder(t.folder, MlxBackend(exact=True, compiled=captured))
        for cuts in every:
            agree(logits(d, t.ids, cuts), expected)


@pytest.mark.parametrize(
    "form", [(4, 32), (8, 32), (3, 32), (4, 64), (8, 64)], ids=lambda f: f"int{f[0]}g{f[1]}"
)
def test_packed_weights_stay_packed_and_mean_the_same(
    form: tuple[int, int], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"intermediate_size": 128, "tie_word_embeddings": True}
    monkeypatch.setitem(VARIANTS, "mlx-wide", ("llama", wide))
    t = tiny("mlx-wide", tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend(), form), t.ids, [40])
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True), form)
    assert d.head.bits == form[0] and d.layers[0].qkv[0].w.dtype == mx.uint32
    agree(logits(d, t.ids, [30, *[1] * 10]), expected)


@pytest.mark.parametrize("variant", ["qwen2_moe", "olmoe"])
@pytest.mark.parametrize("form", [None, (4, 32), (8, 32)], ids=["dense", "int4", "int8"])
def test_experts_stay_on_the_device(
    variant: str, form: tuple[int, int] | None, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 rows are sorted by expert, 9 are not; a captured step includes the routing."""
    t = tiny(variant, tiny_root)
    expected = logits(decoder(t.folder, ReferenceBackend(), form), t.ids, [40])
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True), form)
    hosts: list[Any] = []
    monkeypatch.setattr(Backend, "moe", lambda *a: hosts.append(a))
    for cuts in ([40], [9, 20, *[1] * 11]):
        agree(logits(d, t.ids, cuts), expected)
    assert not hosts


def test_groups_wider_than_mlx_knows_are_the_same_numbers() -> None:
    w = quantised(np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32), 4, 512)
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    b = MlxBackend(exact=True)
    agree(b.to_host(b.linear(b.put(x), b.pack(w))), x @ w.to_float32().T)
    with pytest.raises(BackendError, match="groups of 16"):
        b.pack(quantised(np.ones((8, 64), np.float32), 4, 16))


def test_a_compiled_step_equals_the_eager_one_across_spans(tiny_root: Path, monkeypatch: Any) -> None:
    """Real mx.compile: the position is traced, so one program serves every position of a span."""
    monkeypatch.setattr("tinychat_mlx.backends.mlx.cache.SPAN", 8)
    mx.enable_compile()
    t = tiny("llama", tiny_root)
    eager = logits(decoder(t.folder, MlxBackend(exact=True, compiled=False)), t.ids, [3, *[1] * 37])
    compiled = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    agree(logits(compiled, t.ids, [3, *[1] * 37]), eager)
    first = decoder(t.folder, MlxBackend(exact=True, compiled=True)).new_cache(40)
    assert [first.span() for first.length in (0, 7, 8, 15, 16, 31, 39)] == [8, 8, 16, 16, 32, 32, 40]


def test_a_captured_step_serves_two_conversations_and_a_rewind(tiny_root: Path) -> None:
    t = tiny("qwen2-window", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    whole = logits(d, t.ids, [40])
    caches = [d.new_cache(40) for _ in range(2)]
    for i, token in enumerate(t.ids[:12]):
        for cache in caches:
            agree(d.backend.to_host(d.forward((token,), cache)), whole[i : i + 1])
    for _ in range(4):
        d.forward((7,), caches[0])
    caches[0].rewind(12)
    agree(d.backend.to_host(d.forward(t.ids[12:20], caches[0], last_only=False)), whole[12:20])
    agree(d.backend.to_host(d.forward((t.ids[20],), caches[0])), whole[20:21])
    agree(d.backend.to_host(d.forward((t.ids[12],), caches[1])), whole[12:13])


def test_three_conversations_in_one_step_equal_three_steps(tiny_root: Path) -> None:
    t = tiny("mistral", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    whole = logits(d, t.ids, [40])
    caches = [d.new_cache(40) for _ in range(3)]
    for cache, n in zip(caches, (3, 9, 20), strict=True):
        d.forward(t.ids[:n], cache)
    rows = [t.ids[3:5], t.ids[9:10], t.ids[20:24]]
    step = d.backend.step(tuple(Segment(c, len(r)) for c, r in zip(caches, rows, strict=True)))
    x = d._hidden(d.backend.ids([i for r in rows for i in r]), step)
    agree(d.backend.to_host(d._logits(x)), np.concatenate([whole[3:5], whole[9:10], whole[20:24]]))


@pytest.mark.parametrize("bits, group", [(bits, group) for bits in (4, 8) for group in (32, 64, 128)])
def test_folders_of_mlx_lm_give_its_tokens(
    bits: int, group: int, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, 24 tokens, on the folder that mlx_lm.convert writes; logits within float32's accuracy."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx_lm.models.cache import make_prompt_cache

    sizes = {"hidden_size": 256, "intermediate_size": 384, "rope_theta": 5e5}
    monkeypatch.setitem(VARIANTS, "mlx-lm", ("llama", sizes))
    t = tiny("mlx-lm", tiny_root)
    folder = convert(t.folder, tmp_path / "q", bits, group)
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    cache, prompt = make_prompt_cache(theirs), t.ids[:6]
    y = theirs(mx.array([prompt]), cache=cache)
    first, expected = np.array(y[0, -1]), []
    for _ in range(24):
        expected.append(int(mx.argmax(y[0, -1])))
        y = theirs(mx.array([[expected[-1]]]), cache=cache)
    model = tinychat_mlx.load(folder, backend="mlx", exact=True)
    assert f"int{bits} g{group}" in model.quantization
    agree(model.logits(prompt)[-1], first)
    assert tokens(answer(model.engine, prompt, temperature=0, max_tokens=24)) == expected


def convert(source: Path, target: Path, bits: int, group: int) -> Path:
    """Convert a folder like mlx_lm.convert, without the tokenizer that a tiny model does not have."""
    import mlx_lm.utils as u

    config = json.loads((source / "config.json").read_text())
    # mlx-lm does not read transformers 5's key
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    model, config = u.load_model(source, lazy=True)
    model, config = u.quantize_model(model, config, group, bits)
    u.save_model(target, model)
    u.save_config(config, target / "config.json")
    assert json.loads((target / "config.json").read_text())["quantization"]["bits"] == bits
    return target
