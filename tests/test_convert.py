"""`tinychat convert` end to end: what it writes, that it can be killed anywhere, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_dense

import tinychat_mlx
from tinychat_mlx.apps.cli import main
from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.tensorfile import TensorFile, entry, write
from tinychat_mlx.weight import Packed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, `dense`, and calibration text."""
    home = tmp_path_factory.mktemp("convert")
    tiny_dense.save(home / "dense")
    tiny_dense.text(home)
    return home


def arguments(home: Path, target: Path, *more: str) -> list[str]:
    common = ["--calib", str(home / "text-0.jsonl"), "--group-size", "32", "--backend", "reference"]
    return ["convert", str(home / "dense"), "-o", str(target), *common, *more]


def converted(home: Path, name: str, *more: str) -> Path:
    target = home / name
    if not target.exists():
        assert main(arguments(home, target, *more)) == 0
    return target


def logits(folder: Path) -> np.ndarray:
    model = tinychat_mlx.load(folder, backend="reference")
    return model.logits(np.random.default_rng(9).integers(0, 80, 40).tolist())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kl(folder: Path, dense: np.ndarray) -> float:
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (dense.astype(np.float64), logits(folder)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_awq_plus_is_closer_to_the_dense_model_than_rounding(home: Path) -> None:
    dense = logits(home / "dense")
    loss = {m: kl(converted(home, f"m-{m}", "--method", m, "--w-bit", "3"), dense) for m in ("rtn", "awq+")}
    assert loss["awq+"] < 0.8 * loss["rtn"]
    plain = {b: kl(converted(home, f"b-{b}", "--w-bit", b), dense) for b in ("4", "8")}
    assert plain["8"] < 0.1 * plain["4"] < 0.1 * loss["awq+"]


def test_the_folder_is_whole(home: Path) -> None:
    target = converted(home, "b-4", "--w-bit", "4")
    config = json.loads((target / "config.json").read_text())
    assert config["a_key_nobody_knows"] == [1, {"x": None}] and config["torch_dtype"] == "float16"
    assert config["quantization"]["bits"] == 4 and config["quantization"]["group_size"] == 32
    assert config["quantization"] == config["quantization_config"]
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        assert (target / name).read_bytes() == (home / "dense" / name).read_bytes()
    card = (target / "README.md").read_text()
    assert card.startswith("---\n") and 'base_model: "org/base"' in card and 'license: "mit"' in card
    file = TensorFile(target / "model.safetensors")
    assert file.metadata == {"format": "mlx"} and not (target / "model.safetensors.index.json").exists()
    dense = TensorFile(home / "dense" / "model.safetensors")
    kept = {n for n in dense.names if n.endswith("norm.weight")}
    assert {n for n in file.names if not n.endswith((".scales", ".biases"))} == set(dense.names)
    assert all(file.info(name)[0] == "F16" for name in kept)
    assert not list(home.glob(".*"))  # no work folder is left


@pytest.mark.parametrize(("head", "w_bit"), [("int8", 8), ("int4", 4), ("fp16", 0)])
def test_the_head_is_stored_as_asked_and_tied_only_once(home: Path, head: str, w_bit: int) -> None:
    target = converted(home, f"head-{head}", "--method", "rtn", "--head", head)
    found = Checkpoint.open(target)
    weight = found.weight("model.embed_tokens")
    assert (weight.w_bit if isinstance(weight, Packed) else 0) == w_bit and not found.has("lm_head")
    if w_bit:
        block = json.loads((target / "config.json").read_text())["quantization"]
        assert block["model.embed_tokens"] == {"group_size": 32, "bits": w_bit}


def test_an_untied_head_is_rounded_too(home: Path) -> None:
    weights = tiny_dense.tensors(tiny_dense.CONFIG | {"tie_word_embeddings": False})
    tiny_dense.save(home / "untied", weights, tie_word_embeddings=False)
    target = home / "untied-rtn"
    assert (
        main(["convert", str(home / "untied"), "-o", str(target), "--method", "rtn", "--group-size", "64"])
        == 0
    )
    found = Checkpoint.open(target)
    for name in ("lm_head", "model.embed_tokens"):
        head = found.weight(name)
        assert isinstance(head, Packed) and head.w_bit == 8
        off = np.abs(head.to_float32() - weights[f"{name}.weight"].astype(np.float32)).reshape(96, -1, 64)
        # Half a step, and the rounding of zero · scale to float16: at most 255 · 2^-11 of a step.
        assert (off <= head.scales[..., None].astype(np.float32) * 0.63).all()
    assert np.isfinite(logits(target)).all()


def test_mlx_lm_gives_our_logits(home: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx_lm.utils import load_model

    for name, more in (("b-4", ("--w-bit", "4")), ("gemm", ("--format", "awq")), ("b-3", ("--w-bit", "3"))):
        target = converted(home, name, *more)
        model, _ = load_model(target)
        model.set_dtype(mx.float32)  # on a CPU mlx-lm computes in float32 only with any speed
        ids = np.random.default_rng(9).integers(0, 80, 40).tolist()
        theirs = np.array(model(mx.array([ids]))[0].astype(mx.float32))
        ours = logits(target)
        # Codes, scales and zeros are the same; sums of 128 products in float32 in another order, three layers.
        assert np.abs(theirs - ours).max() < 1e-3 * np.abs(ours).max(), name


def test_both_formats_hold_the_same_weights_and_convert_into_each_other(home: Path) -> None:
    mlx, gemm = converted(home, "b-4", "--w-bit", "4"), converted(home, "gemm", "--format", "awq")
    a, b = Checkpoint.open(mlx), Checkpoint.open(gemm)
    assert b.quantization.format == "awq-gemm" and a.quantization.format == "mlx"
    layers = [m for m in b.modules if "layers" in m]
    assert len(layers) == 21 == len(b.modules)
    for module in layers:
        one, two = a.weight(module), b.weight(module)
        assert isinstance(one, Packed) and isinstance(two, Packed)
        assert np.array_equal(one.qweight, two.qweight) and np.array_equal(one.scales, two.scales)
        assert np.array_equal(one.to_float32(), two.to_float32())
    there, back = home / "to-mlx", home / "to-awq"
    assert main(["convert", str(gemm), "-o", str(there), "--format", "mlx"]) == 0
    assert main(["convert", str(there), "-o", str(back), "--format", "awq"]) == 0
    first, last = (TensorFile(f / "model.safetensors") for f in (gemm, back))
    assert set(first.names) == set(last.names)
    for name in first.names:
        assert first.read(name).tobytes() == last.read(name).tobytes(), name
    assert np.array_equal(logits(there), logits(gemm))


def run(home: Path, target: Path, *more: str, kill_at: int = 0) -> int:
    """convert in a process of its own, which kills itself before its kill_at-th rename -> its exit code."""
    code = (
        "import os, signal, sys\n"
        "from tinychat_mlx.apps.cli import main\n"
        f"left, real = [{kill_at}], (os.replace, os.rename)\n"
        "def counted(rename):\n"
        "    def wrapped(*a, **k):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return rename(*a, **k)\n"
        "    return wrapped\n"
        "os.replace, os.rename = map(counted, real)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments(home, target, *more)]
    return subprocess.run(command, env=env, capture_output=True, timeout=300, check=False).returncode


# Every file appears by a rename. In order: 1 plan, 2 calibration, 3-5 rows, measurements and shard of layer 0,
# 6-8 of layer 1, 9-10 of layer 2, 11 embedding; then weights, config, 5 side files, card, and the last rename.
@pytest.mark.parametrize("kill_at", [2, 4, 7, 10, 12, 20])
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(home: Path, kill_at: int) -> None:
    whole = home / "whole"
    if not whole.exists():
        assert run(home, whole) == 0
    target = home / f"killed-{kill_at}"
    assert run(home, target, kill_at=kill_at) == -signal.SIGKILL
    assert not target.exists() and (home / f".{target.name}.converting").exists()
    assert main(arguments(home, target)) == 2  # not by accident: it says --resume or --force
    assert run(home, target, "--resume") == 0
    assert files(target) == files(whole)
    assert not (home / f".{target.name}.converting").exists()


def test_two_runs_with_one_seed_are_the_same_and_self_written_text_is_seeded(home: Path) -> None:
    def made(name: str, seed: str) -> dict[str, bytes]:
        target = home / name
        args = [
            "convert",
            str(home / "dense"),
            "-o",
            str(target),
            "--group-size",
            "32",
            "--backend",
            "reference",
        ]
        assert main([*args, "--calib-tokens", "256", "--seed", seed]) == 0
        return files(target)

    one, again, other = made("self-1", "1"), made("self-2", "1"), made("self-3", "2")
    assert one == again
    assert one["model.safetensors"] != other["model.safetensors"]


def test_resuming_with_other_settings_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = home / "changed"
    assert run(home, target, kill_at=5) == -signal.SIGKILL
    assert main(arguments(home, target, "--resume", "--w-bit", "3")) == 2
    assert "other settings" in capsys.readouterr().err
    assert main(arguments(home, target, "--force", "--w-bit", "3")) == 0


def test_a_full_disk_leaves_nothing_at_the_target(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinychat_mlx.awq import finish

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(finish, "write_sharded", full)
        assert main(arguments(home, home / "full")) == 1
    assert not (home / "full").exists()
    assert main(arguments(home, home / "full", "--resume")) == 0


def test_an_interrupt_leaves_nothing_at_the_target(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinychat_mlx.awq import stream

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(stream.Conversion, "_rim", stop)
        assert main(arguments(home, home / "stopped")) == 130
    assert not (home / "stopped").exists() and "--resume" in capsys.readouterr().err


def test_what_exists_is_not_replaced_without_force(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = home / "there"
    target.mkdir()
    (target / "precious").write_text("mine")
    assert main(arguments(home, target, "--method", "rtn")) == 2
    assert "--force" in capsys.readouterr().err and (target / "precious").read_text() == "mine"
    assert main(arguments(home, target, "--method", "rtn", "--force")) == 0
    assert not (target / "precious").exists() and (target / "config.json").exists()


def damaged(home: Path, name: str, change: Any) -> Path:
    weights = tiny_dense.tensors(tiny_dense.CONFIG)
    change(weights)
    return tiny_dense.save(home / name, weights)


BAD = "model.layers.1.mlp.down_proj.weight"


def large(name: str, weights: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """A tensor in float32 with one value that float16 cannot hold."""
    wide = weights[name].astype(np.float32)
    wide.flat[7] = value
    return {name: wide}


@pytest.mark.parametrize(
    ("name", "change", "settings", "says"),
    [
        ("nan", lambda w: w[BAD].__setitem__((3, 5), np.nan), {}, BAD),
        ("infinite", lambda w: w["model.norm.weight"].__setitem__(0, np.inf), {}, "model.norm.weight"),
        (
            "large-norm",
            lambda w: w.update(large("model.norm.weight", w, 65520)),
            {},
            "model.norm.weight' holds a",
        ),
        ("large-linear", lambda w: w.update(large(BAD, w, -3e6)), {}, f"{BAD}' holds a number beyond 65504"),
        ("absent", lambda w: w.pop(BAD), {}, "model.layers.1.mlp.down_proj"),
        ("group", lambda w: None, {"--group-size": "128"}, "self_attn.o_proj"),
        ("family", lambda w: None, {"model_type": "llamma"}, "llamma"),
        ("empty", lambda w: None, {"--calib": ""}, "at least"),
        ("no-file", lambda w: None, {"--calib": "./nowhere.txt"}, "nowhere.txt"),
        ("blank", lambda w: None, {"--calib": '{"text": " "}\n\n'}, "0 tokens, at least"),
        ("binary", lambda w: None, {"--calib": "\x93\udcff"}, "not UTF-8 text"),
        ("line", lambda w: None, {"--calib": '{"messages": 3}\n'}, "line 1"),
        ("parquet", lambda w: None, {"--calib": "x.parquet"}, "parquet"),
        ("bits", lambda w: None, {"--w-bit": "3", "--format": "awq"}, "4 bits"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    home: Path,
    name: str,
    change: Any,
    settings: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = damaged(home, f"bad-{name}", change)
    options = {
        "--calib": str(home / "text-0.jsonl"),
        "--group-size": "32",
        "--backend": "reference",
    } | settings
    if "model_type" in options:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": options.pop("model_type")}))
    calib = options["--calib"]
    if name in ("empty", "blank", "binary", "line", "parquet"):
        file = home / f"{name}{'.parquet' if 'parquet' in calib else '.jsonl'}"
        file.write_bytes(calib.encode(errors="surrogateescape"))
        options["--calib"] = str(file)
    target = home / f"from-{name}"
    flat = [part for pair in options.items() for part in pair]
    assert main(["convert", str(source), "-o", str(target), *flat]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not target.exists() and not list(
        home.glob(f".{target.name}*")
    )  # the next attempt needs no --force


def test_a_missing_shard_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_dense.save(home / "shards")
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {BAD: "model-00002-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["convert", str(source), "-o", str(home / "from-shards"), "--method", "rtn"]) == 1
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err
    assert not (home / "from-shards").exists()


def test_a_site_whose_error_cannot_fall_keeps_plain_rounding_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matrix that rounding holds exactly cannot be bettered."""
    weights = tiny_dense.tensors(tiny_dense.CONFIG)
    weights["model.layers.1.self_attn.o_proj.weight"][:] = 0
    source = tiny_dense.save(home / "zero", weights)
    args = [
        "convert",
        str(source),
        "-o",
        str(home / "from-zero"),
        "--group-size",
        "32",
        "--backend",
        "reference",
    ]
    assert main([*args, "--calib", str(home / "text-0.jsonl")]) == 0
    assert "layer 1 o_in" in capsys.readouterr().err
    assert np.isfinite(logits(home / "from-zero")).all()


def test_dry_run_writes_nothing_and_knows_the_size(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in home.iterdir())
    assert main([*arguments(home, home / "never"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in home.iterdir()) == before
    actual = Checkpoint.open(converted(home, "b-4", "--w-bit", "4")).nbytes
    assert abs(found["result_bytes"] / actual - 1) < 0.02
    assert found["seconds"] > 0 and found["disk_bytes"] >= 2 * found["result_bytes"]
    assert found["peak_bytes"] > found["result_bytes"]


def test_the_report_shows_every_method_beside_the_others(home: Path) -> None:
    folder, calib = home / "report", tiny_dense.text(home, 5000, seed=7)
    more = ("--report", str(folder), "--calib", str(calib), "--calib-tokens", "600")
    assert main(arguments(home, home / "reported", *more)) == 0
    found = json.loads((folder / "report.json").read_text())
    assert len(found["layers"]) == 3
    for layer in found["layers"]:
        for site in layer:
            assert 0 < site["error"] < site["rtn"] and site["error"] < site["others"]["awq"] <= site["rtn"]
    text = (folder / "report.md").read_text()
    assert "rtn | awq | awq+" in text
    for key in ("attn_in", "o_in", "mlp_in", "down_in"):
        assert f"error-{key}.svg" in text
        assert (folder / f"error-{key}.svg").read_text().count("<title>") == 9  # 3 layers, 3 methods
    for part, size in found["sizes"].items():
        assert sum(size.values()) == found[f"{part}_bytes"] and size["embedding and head"] > 0
    assert found["quality"]["text"] == "what the calibration left of text-7.jsonl"
    assert found["quality"]["text"] in text
    quality = found["quality"]["of"]
    assert 0 < quality["awq+"]["kl_mean"] < quality["rtn"]["kl_mean"] and quality["rtn"]["tokens"] > 2048
    for name in ("sizes", "quality", "error-o_in"):
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


def test_every_backend_estimates_converts_and_reports(
    home: Path, backend_name: str, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    target, folder, text = (
        home / f"on-{backend_name}",
        home / f"r-{backend_name}",
        tiny_dense.text(home, 900, 8),
    )
    more = ("--w-bit", "4", "--backend", backend_name, "--threads", "2")
    assert main([*arguments(home, target, *more), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    assert main(arguments(home, target, *more, "--report", str(folder), "--report-text", str(text))) == 0
    of = json.loads((folder / "report.json").read_text())["quality"]["of"]
    assert of["awq+"]["kl_mean"] < of["rtn"]["kl_mean"]
    # Another rounding of activations chooses a few other codes; plain rounding loses three times as much.
    dense = logits(home / "dense")
    assert kl(target, dense) < 1.1 * kl(converted(home, "b-4", "--w-bit", "4"), dense)


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_the_reports_figures_are_those_of_eval(
    home: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder, target = tiny_dense.text(home, 900, seed=8), home / f"report-{form}", home / f"told-{form}"
    more = ("--report", str(folder), "--report-text", str(text), "--format", form, "--method", "rtn")
    assert main(arguments(home, target, *more)) == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]
    assert quality["text"] == "text-8.jsonl" and set(quality["of"]) == {"rtn"}
    capsys.readouterr()
    args = ["eval", "-m", str(target), "--against", str(home / "dense"), "--text", str(text), "--json"]
    assert main([*args, "--backend", "reference"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["kl_mean"] > 1e-5
    for key, value in quality["of"]["rtn"].items():
        # Rows of several windows or of one, float32 sums of 128 terms in another order: 1e-5 of a logit.
        assert value == pytest.approx(measured[key], rel=2e-3), key


def test_without_text_left_over_the_report_says_that_the_model_wrote_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinychat_mlx.awq import calibrate

    monkeypatch.setattr(calibrate, "default_tokens", lambda _: 640)
    folder = home / "report-self"
    assert main(arguments(home, home / "reported-self", "--method", "rtn", "--report", str(folder))) == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]
    assert quality["text"].startswith("text the model wrote itself, for the calibration left no more than")
    assert quality["of"]["rtn"]["tokens"] == 315  # 5 windows of 64, the first token of each not predicted


def test_a_report_does_not_change_the_model(home: Path) -> None:
    whole = converted(home, "b-4", "--w-bit", "4")
    more = ("--report", str(home / "rb"), "--report-text", str(home / "text-0.jsonl"))
    assert files(converted(home, "reported-b", "--w-bit", "4", *more)) == files(whole)


def test_json_says_what_was_done(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(home, home / "told", "--json", "--method", "awq")) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["bytes"] == Checkpoint.open(home / "told").nbytes and found["plain_rounding"] == []
    assert [len(layer) for layer in found["layers"]] == [4, 4, 4]
    for layer in found["layers"]:
        assert all(site["error"] <= site["rtn"] for site in layer)


def test_text_packs_every_token_and_says_what_it_left(home: Path) -> None:
    from tinychat_mlx.awq.calibrate import packed, read_documents
    from tinychat_mlx.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(home / "dense")
    documents, _ = read_documents(str(home / "text-0.jsonl"))
    lengths = [len(tokenizer.encode_chat(d)) for d in documents if not isinstance(d, str)]
    ids, used = packed(documents, tokenizer, 10**6, seed=0)
    assert len(ids) == sum(lengths) and used == len(documents) == 30
    some, used = packed(documents, tokenizer, 200, seed=0)
    assert np.array_equal(some, ids[:200]) and used < 30
    assert not np.array_equal(packed(documents, tokenizer, 200, seed=1)[0], some)


def test_plain_text_is_one_document(home: Path) -> None:
    from tinychat_mlx.awq.calibrate import read_documents

    (home / "plain.txt").write_text("w1 w2\nw3\n")
    assert read_documents(str(home / "plain.txt"))[0] == ["w1 w2\nw3\n"]
    (home / "lines.jsonl").write_text('{"text": "a"}\n\n"b"\n')
    assert read_documents(str(home / "lines.jsonl"))[0] == ["a", "b"]


def test_a_float32_source_of_the_same_numbers_gives_the_same_codes(home: Path) -> None:
    source = tiny_dense.save(home / "dense-f32")
    weights = tiny_dense.tensors(tiny_dense.CONFIG)
    write(source / "model.safetensors", [entry(n, a.astype(np.float32)) for n, a in weights.items()])
    args = ["convert", str(source), "-o", str(home / "from-f32"), *arguments(home, home)[4:]]
    assert main(args) == 0
    same = converted(home, "b-4", "--w-bit", "4") / "model.safetensors"
    assert (home / "from-f32" / "model.safetensors").read_bytes() == same.read_bytes()


@pytest.mark.parametrize(
    ("bits", "refused"), [(0x477F, False), (0xC780, True), (0x7F80, True), (0xFFC0, True)]
)
def test_a_bfloat16_number_beyond_float16_is_refused(tmp_path: Path, bits: int, refused: bool) -> None:
    """65280 is the last that float16 holds, -65536 the first that it does not; then infinity and NaN."""
    norm = np.full(64, 0x3F80, np.uint16)
    norm[5] = bits
    source = tiny_dense.save(tmp_path / "dense")
    tensors = {n: entry(n, a) for n, a in tiny_dense.tensors(tiny_dense.CONFIG).items()}
    tensors["model.norm.weight"] = entry("model.norm.weight", norm, "BF16")
    write(source / "model.safetensors", tensors.values())
    args = ["convert", str(source), "-o", str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"]
    assert main(args) == int(refused) and (tmp_path / "out").exists() != refused


def test_a_weight_whose_offset_float16_cannot_hold_is_refused_by_name(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of -65000 to 60000 in 3 bits the scale is 17920 and the zero point 4: their product is 71680."""
    source = damaged(home, "wide", lambda w: w[BAD].__setitem__((3, slice(2)), (60000, -65000)))
    args = ["convert", str(source), "-o", str(home / "from-wide"), "--group-size", "32", "--w-bit", "3"]
    assert main([*args, "--method", "rtn"]) == 1
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.down_proj: has numbers beyond 65504" in error and error.count("\n") == 1
    assert not (home / "from-wide").exists()
    assert main([*args, "--method", "rtn", "--w-bit", "8", "--force"]) == 0  # a finer scale is smaller


def test_a_bfloat16_source_converts(home: Path) -> None:
    source = tiny_dense.save(home / "dense-bf16")
    wide = {n: a.astype(np.float32).view(np.uint32) for n, a in tiny_dense.tensors(tiny_dense.CONFIG).items()}
    cut = [entry(n, (a >> np.uint32(16)).astype(np.uint16), "BF16") for n, a in wide.items()]
    write(source / "model.safetensors", cut)
    assert main(["convert", str(source), "-o", str(home / "from-bf16"), *arguments(home, home)[4:]]) == 0
    limit = kl(converted(home, "m-rtn", "--method", "rtn", "--w-bit", "3"), logits(home / "dense"))
    assert kl(home / "from-bf16", logits(source)) < limit
