"""`tinychat convert` end to end: its output, interruption at any point, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense

import tinychat_mlx
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq import sizes
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import TensorFile, entry, write
from tinychat_mlx.weights.weight import Packed


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
        model.set_dtype(mx.float32)  # on a CPU, mlx-lm is only fast in float32
        ids = np.random.default_rng(9).integers(0, 80, 40).tolist()
        theirs = np.array(model(mx.array([ids]))[0].astype(mx.float32))
        ours = logits(target)
        # Codes, scales and zeros are the same; float32 sums of 128 products in another order, three layers.
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


def damaged(home: Path, name: str, change: Any) -> Path:
    weights = tiny_dense.tensors(tiny_dense.CONFIG)
    change(weights)
    return tiny_dense.save(home / name, weights)


BAD = "model.layers.1.mlp.down_proj.weight"


def large(name: str, weights: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """A float32 tensor with one value too large for float16."""
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
            "model.norm.weight' has a",
        ),
        ("large-linear", lambda w: w.update(large(BAD, w, -3e6)), {}, f"{BAD}' has a number beyond 65504"),
        ("absent", lambda w: w.pop(BAD), {}, "model.layers.1.mlp.down_proj"),
        ("group", lambda w: None, {"--group-size": "128"}, "self_attn.o_proj"),
        ("family", lambda w: None, {"model_type": "llamma"}, "llamma"),
        ("empty", lambda w: None, {"--calib": ""}, "at least"),
        ("no-file", lambda w: None, {"--calib": "./nowhere.txt"}, "nowhere.txt"),
        ("typo", lambda w: None, {"--calib": "texts/typo.txt"}, "texts/typo.txt: no such file"),
        ("typo.gz", lambda w: None, {"--calib": "texts/typo.jsonl.gz"}, "no such file"),
        (
            "few",
            lambda w: None,
            {"--calib-tokens": "10"},
            "10 calibration tokens are too few — give at least 128",
        ),
        ("few-own", lambda w: None, {"--calib": "self", "--calib-tokens": "127"}, "127 calibration tokens"),
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
    """A matrix that rounding represents exactly cannot be improved."""
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
    assert main([*arguments(home, home / "never"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    kilobytes = re.search(r"([\d.]+) kB in the end", said)
    assert kilobytes and abs(float(kilobytes[1]) * 1000 / actual - 1) < 0.02
    assert re.search(r"about \d+ s on this machine", said) and " 0.0" not in said


def test_dry_run_says_what_is_in_memory_when(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One decoder layer of float32 weights, and for generated text the whole model at 8 bits."""
    args = arguments(home, home / "never")
    layer = (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) * 4  # q, o; k, v; gate, up, down
    assert main([*args, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer_bytes"] == layer and found["own_text_bytes"] == 0
    assert found["peak_bytes"] == found["layers_bytes"]
    own = [*args, "--calib", "self"]
    assert main([*own, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    whole = 3 * layer / 4 + 96 * 64  # one byte per weight
    assert whole < found["own_text_bytes"] - sizes.BASE_BYTES
    assert found["peak_bytes"] == max(found["own_text_bytes"], found["layers_bytes"])
    assert main([*own, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the whole model, at 8 bits, writes its own text" in out and "one decoder layer of float" in out


@pytest.mark.parametrize(
    ("hidden", "inner", "group"),
    [
        (576, 1536, 64),
        (960, 2560, 64),
        (2880, 2880, 64),
        (4096, 11008, 128),
        (4096, 11296, 32),
        (32, 4096, 32),
    ],
)
def test_auto_is_the_largest_group_that_fits_every_matrix(hidden: int, inner: int, group: int) -> None:
    config = parse_config(
        tiny_dense.CONFIG | {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 32}
    )
    assert Settings().resolved(config).group_size == group
    assert Settings(group_size=32).resolved(config).group_size == 32


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_auto_is_the_same_as_the_number_it_stands_for(
    home: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry run, the model, its card and --json name it, and an interrupted run resumes with it."""
    source, command = str(home / "dense"), ["--method", "rtn", "--format", form, "--backend", "reference"]
    auto, given = home / f"auto-{form}", home / f"given-{form}"
    assert main(["convert", source, *command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["group_size"] == 64
    assert main(["convert", source, *command, "--dry-run"]) == 0
    assert "4 bits in groups of 64\n" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinychat_mlx.awq.convert.write_folder", None)
        main(["convert", source, *command, "-o", str(auto)])
    capsys.readouterr()
    assert (
        main(["convert", source, *command, "-o", str(auto), "--json", "--resume", "--group-size", "64"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["settings"]["group_size"] == 64
    assert main(["convert", source, *command, "-o", str(given), "--group-size", "64"]) == 0
    assert Checkpoint.open(auto).quantization.group_size == 64 and files(auto) == files(given)
    assert "in groups of 64 " in (auto / "README.md").read_text()


def test_a_matrix_that_no_group_fits_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If another group size fits, the message suggests it."""
    odd = tiny_dense.save(home / "odd", None, intermediate_size=72)
    assert main(["convert", str(odd), "-o", str(home / "from-odd"), "--method", "rtn"]) == 1
    error = capsys.readouterr().err
    assert "down_proj: 72 inputs cannot be stored in groups of 32, 64 or 128" in error
    args = ["convert", str(home / "dense"), "-o", str(home / "from-odd"), "--group-size", "128"]
    assert main(args) == 1 and "use --group-size 64" in capsys.readouterr().err
    assert not (home / "from-odd").exists()


def test_json_says_what_was_done(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(home, home / "told", "--json", "--method", "awq")) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["bytes"] == Checkpoint.open(home / "told").nbytes and found["plain_rounding"] == []
    assert [len(layer["sites"]) for layer in found["layers"]] == [4, 4, 4]
    for layer in found["layers"]:
        assert all(site["error"] <= site["rtn"] for site in layer["sites"])


def test_text_packs_every_token_and_says_what_it_left(home: Path) -> None:
    from tinychat_mlx.awq.calibration.tokens import packed, read_documents
    from tinychat_mlx.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(home / "dense")
    documents, _ = read_documents(str(home / "text-0.jsonl"))
    lengths = [len(tokenizer.encode_chat(d)) for d in documents if not isinstance(d, str)]
    ids, used = packed(documents, tokenizer, 10**6, seed=0)
    assert len(ids) == sum(lengths) and used == len(documents) == 30
    some, used = packed(documents, tokenizer, 200, seed=0)
    assert np.array_equal(some, ids[:200]) and used < 30
    assert not np.array_equal(packed(documents, tokenizer, 200, seed=1)[0], some)


def test_plain_text_is_one_document(home: Path) -> None:
    from tinychat_mlx.awq.calibration.tokens import read_documents

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
def test_a_bfloat16_number_beyond_float16_is_refused(
    tmp_path: Path, bits: int, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """65280 is the last number that fits float16, -65536 the first that does not; then infinity and NaN."""
    norm = np.full(64, 0x3F80, np.uint16)
    norm[5] = bits
    source = tiny_dense.save(tmp_path / "dense")
    tensors = {n: entry(n, a) for n, a in tiny_dense.tensors(tiny_dense.CONFIG).items()}
    tensors["model.norm.weight"] = entry("model.norm.weight", norm, "BF16")
    write(source / "model.safetensors", tensors.values())
    args = ["convert", str(source), "-o", str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"]
    assert main(args) == int(refused) and (tmp_path / "out").exists() != refused
    assert ("'model.norm.weight' has a" in capsys.readouterr().err) == refused  # before anything is written


def test_a_weight_whose_offset_float16_cannot_hold_is_refused_by_name(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From -65000 to 60000 in 3 bits the scale is 17920 and the zero point 4: their product is 71680."""
    source = damaged(home, "wide", lambda w: w[BAD].__setitem__((3, slice(2)), (60000, -65000)))
    args = ["convert", str(source), "-o", str(home / "from-wide"), "--group-size", "32", "--w-bit", "3"]
    assert main([*args, "--method", "rtn"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.1.mlp.down_proj: has numbers beyond 65504" in error
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


def test_without_a_terminal_each_line_says_how_long_the_rest_takes(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this clock a layer takes ten seconds; a layer that an interrupted run finished takes none."""
    from tinychat_mlx.apps.conversion_progress import Screen
    from tinychat_mlx.awq.layer import LayerReport
    from tinychat_mlx.awq.layer_stream import Progress

    seconds = [100.0]
    monkeypatch.setattr("tinychat_mlx.apps.conversion_progress.time.perf_counter", lambda: seconds[0])
    screen, site = Screen(quiet=False), LayerReport((), 0.1, 0.2)
    screen.show(Progress("layers", 1, 10, "kept", site))
    screen.show(Progress("layers", 1, 10))
    for done in (2, 3):
        seconds[0] += 10
        screen.show(Progress("layers", done, 10, "", site))
    lines = capsys.readouterr().err.splitlines()
    assert ["left" in line for line in lines] == [False, True, True]
    assert lines[1].endswith(", 80 s left") and lines[2].endswith(", 70 s left")
    screen.show(Progress("calibrate", 1, 100))
    seconds[0] += 49
    screen.show(Progress("calibrate", 50, 100))
    assert capsys.readouterr().err.splitlines() == ["calibrate 50%, 50 s left"]


def test_the_time_left_of_own_text_is_right_within_a_half_after_a_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first five steps are cold, and the last takes twice as long as the sixth, because caches grow."""
    from tinychat_mlx.apps.conversion_progress import Rate

    steps, seconds = 500, [0.0]
    monkeypatch.setattr("tinychat_mlx.apps.conversion_progress.time.perf_counter", lambda: seconds[0])
    costs, rate = [30.0] * 5 + [1 + at / steps for at in range(5, steps)], Rate()
    for done, cost in enumerate(costs, 1):
        seconds[0] += cost
        rate.add(done)
        if done * 10 >= steps and done < steps:
            assert abs(rate.seconds(steps - done) / sum(costs[done:]) - 1) < 0.5
