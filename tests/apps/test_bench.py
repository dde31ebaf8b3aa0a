"""`tinychat bench` prints measured values and the bytes that the weights have."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

from tinychat_mlx.apps.bench import gguf_file, measure, shapes
from tinychat_mlx.apps.bench.machine import Subject as Machine
from tinychat_mlx.apps.bench.measure import Peer, Plan, _peer_result, _result, _Rounds, parse_peer
from tinychat_mlx.apps.bench.ours import Subject, layer_weights
from tinychat_mlx.apps.bench.stats import Sample
from tinychat_mlx.apps.bench.synthetic import RandomSource
from tinychat_mlx.apps.bench.worker import Worker
from tinychat_mlx.apps.cli import main
from tinychat_mlx.base import errors, limits
from tinychat_mlx.model.config import parse_config

ENV = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
SMALL = ("--shape", "tiny", "--pp", "16", "--tg", "4", "--threads", "1")
KEYS = [
    "shape",
    "backend",
    "threads",
    "pp_tok_s",
    "tg_tok_s",
    "bytes_per_token",
    "bandwidth_gb_s",
    "mbu",
    "load_s",
    "rss_bytes",
    "peers",
]


def bench(*args: str) -> tuple[dict[str, Any], str]:
    """Run bench. Returns (the JSON object, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "tinychat_mlx", "bench", *args, "--json"],
        capture_output=True, check=False, text=True, timeout=6000, env=ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), done.stderr


def tiny_bytes(head_bits: float, tg: int, depth: int, itemsize: int = 2, ends: int = 32) -> float:
    """Compute bytes by the format's definition: int4 codes, `ends` bits of scale and offset per group of 128."""
    c = shapes.SHAPES["tiny"]
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    products = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    weights = products * (4 + ends / 128) / 8 + c["vocab_size"] * hidden * head_bits / 8
    norms = 4 * hidden * (2 * layers + 1)
    tokens = depth + sum(range(1, tg + 1)) / tg  # in the cache, including the token itself
    return weights + norms + 2 * layers * kv * itemsize * tokens


# a whole run ---------------------------------------------------------------------------------------------
def test_a_run_prints_the_keys_programs_rely_on_and_they_agree() -> None:
    made, progress = bench(*SMALL, "--depth", "8")
    assert set(KEYS) <= set(made)
    assert (made["shape"], made["threads"], made["peers"]) == ("tiny", 1, [])
    whole, half = (tiny_bytes(bits + 32 / 128, tg=4, depth=8, ends=16) for bits in (8, 4))
    assert half < made["bytes_per_token"] < whole  # the head at half its width, and some of it at full width
    for name in ("pp_tok_s", "tg_tok_s", "bandwidth_gb_s"):
        runs = made["spread"][name]["runs"]
        assert len(runs) == 5 and made[name] == sorted(runs)[2] > 0
    paces = zip(made["spread"]["tg_tok_s"]["runs"], made["spread"]["bandwidth_gb_s"]["runs"], strict=True)
    shares = sorted(made["bytes_per_token"] * tg / (read * 1e9) for tg, read in paces)
    assert made["mbu"] == pytest.approx(shares[2], rel=1e-9)
    assert made["load_s"] > 0 and made["rss_bytes"] > made["weight_bytes"]
    assert progress.count("\nround ") == 5


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")
def test_an_interrupt_ends_all_of_it_in_silence() -> None:
    argv = [sys.executable, "-m", "tinychat_mlx", "bench", *SMALL, "--repeat", "999"]
    run = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=ENV,
    )  # fmt: skip
    assert run.stderr is not None
    while "on cpu" not in run.stderr.readline():  # both workers are running
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=600)  # returns when the last holder of the pipe, a worker, has ended
    assert run.returncode == 130 and "Traceback" not in err


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = recorded([1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [3.0, 4.0, 5.0])
    monkeypatch.setattr(measure, "run", lambda plan, say: ours | {"peers": [peer]})
    assert main(["bench", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "llama.cpp Q4_0" in shown and "1.50 (0.75–3.00)" in shown and "2.00 (1.50–2.50)" in shown


def test_a_sweep_measures_each_number_of_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "run", lambda plan, say: {"threads": plan.threads, "tg_tok_s": 10.0 - abs(plan.threads - 4)}
    )
    assert main(["bench", "--shape", "tiny", "--threads", "6", "--threads-sweep", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["threads"] == 4 and [r["threads"] for r in made["sweep"]] == [1, 2, 4, 6]


# refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--shape", "lama-3.2-1b"], "nearest: llama-3.2-1b"),
        (["--shape", "tiny", "-m", "demo"], "exclude each other"),
        (["-m", "demo", "--head", "int4"], "--head applies to --shape"),
        (["--shape", "tiny", "--repeat", "4"], "x>=5"),
        (["--shape", "tiny", "--against", "vllm"], "unknown peer 'vllm'"),
        (["--shape", "tiny", "--against", "llama.cpp:Q9"], "unknown peer 'llama.cpp:Q9'"),
        ([*SMALL, "--depth", "2000"], "more than the 1024 of this model"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


@pytest.mark.parametrize(
    ("peer", "package", "install"),
    [
        ("llama.cpp", "llama_cpp", "pip install llama-cpp-python gguf"),
        ("torch", "torch", "pip install torch"),
    ],
)
def test_an_absent_peer_is_one_clear_line(
    peer: str, package: str, install: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert main(["bench", *SMALL, "--against", peer]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and install in err


def test_a_shape_too_large_for_the_memory_is_refused_before_it_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "memory_free", lambda mapped=0: 1 << 30)
    assert main(["bench", "--shape", "llama-2-7b", "--backend", "cpu"]) == 1
    # 6.48 G weights of 4.125 bits and two tables of 131 M at 8.25 bits: 3.61 GB; 640 tokens of 524 kB: 0.34
    # GB; the program 0.16 GB, activations of 512 rows (4 x 4096 + 11008 wide) 0.08 GB
    line = capsys.readouterr().err
    assert "llama-2-7b: needs 4.2 GB of memory on the cpu backend with a context of 640 tokens" in line


# figures -------------------------------------------------------------------------------------------------
def test_a_sample_is_its_median_and_spread() -> None:
    odd, even = Sample.of([3.0, 1.0, 2.0]), Sample.of([1.0, 2.0, 4.0, 9.0])
    assert (odd.median, even.median) == (2.0, 3.0)
    assert even.deviation == pytest.approx(np.std(even.values, ddof=1))
    assert Sample.of([5.0]).deviation == 0.0
    assert odd.over(Sample.of([1.0, 2.0, 4.0])).values == (3.0, 0.5, 0.5)
    shown = odd.as_dict()
    assert (shown["min"], shown["max"], shown["mean"], shown["runs"]) == (1.0, 3.0, 2.0, [3.0, 1.0, 2.0])


class Scripted:
    """A worker that answers from lists and records the order of all calls."""

    def __init__(self, name: str, answers: dict[str, list[Any]], log: list[str]) -> None:
        self.name, self.answers, self.log = name, {k: list(v) for k, v in answers.items()}, log

    def call(self, name: str, **arguments: Any) -> Any:
        self.log.append(f"{self.name}.{name}")
        values = self.answers[name]
        return values.pop(0) if len(values) > 1 else values[0]


def recorded(
    pp: list[float],
    tg: list[float],
    their_pp: list[float],
    their_tg: list[float],
    log: list[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run rounds of these seconds after another warm-up round. Returns the results of ours and a peer."""
    log = [] if log is None else log
    plan = Plan(None, "tiny", "cpu", "int4", pp=100, tg=10, repeat=len(pp))
    mine = Scripted(
        "ours",
        {
            "prefill": [99.0, *pp],
            "decode": [99.0, *tg],
            "products": [{"ops_per_s": 4e9}],
            "peak_rss": [9],
            "bytes_per_token": [10**9],
        },
        log,
    )
    theirs = Scripted(
        "peer", {"prefill": [77.0, *their_pp], "decode": [77.0, *their_tg], "peak_rss": [5]}, log
    )
    machine = Scripted("machine", {"bandwidth": [2e9], "int8_peak": [8e9]}, log)
    about = {"version": "1", "load_s": 0.1, "type": "Q4_0", "weight_bytes": {"read": 1000, "total": 2000}}
    peer = Peer("llama.cpp Q4_0", theirs, about)  # type: ignore[arg-type]
    rounds = _Rounds(plan, mine, machine, [peer], lambda line: None)  # type: ignore[arg-type]
    for number in range(-1, plan.repeat):
        rounds.one(number)
    said = {"name": "tiny", "backend": "cpu", "device": "x", "detail": "y", "load_s": 0.2, "weight_bytes": 7}
    said |= {"ops_per_token": 10**7, "kv_bytes": 3}
    ours = _result(plan, said, 1, rounds)
    return ours, _peer_result(peer, ours, rounds, plan)


def test_subjects_take_turns_and_ratios_are_formed_round_by_round() -> None:
    log: list[str] = []
    ours, peer = recorded([1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [3.0, 4.0, 5.0], log)
    assert ours["pp_tok_s"] == 50.0 and ours["tg_tok_s"] == 5.0  # the warm-up's 99 s are not included
    assert peer["pp_ratio"]["runs"] == [3.0, 1.5, 0.75] and peer["tg_ratio"]["runs"] == [1.5, 2.0, 2.5]
    assert ours["mbu"] == 5.0 * 1e9 / 2e9 and ours["matmul_gop_s"] == 4.0 and ours["prefill_gop_s"] == 0.5
    first = [name for name in log if name.endswith("decode")]
    assert first == ["ours.decode", "peer.decode"] * 2 + [
        "peer.decode",
        "ours.decode",
        "ours.decode",
        "peer.decode",
    ]
    assert log.count("machine.bandwidth") == 4


# our subject ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("head", "bits"), [("int4", 4.25), ("int8", 8.25), ("fp16", 16)])
def test_bytes_per_token_are_what_the_weights_hold(head: str, bits: float) -> None:
    made = Subject(backend="reference", shape="tiny", head=head, pp=4, tg=3, depth=5)
    assert made.bytes_per_token() == round(tiny_bytes(bits, tg=3, depth=5, itemsize=4))


def test_of_a_head_that_is_read_at_half_its_width_the_rest_is_what_tiles_were_read_whole() -> None:
    made = Subject(backend="cpu", shape="tiny", pp=4, tg=3, depth=5, threads=1)
    whole, choice = tiny_bytes(8.25, tg=3, depth=5, ends=16), made.decoder.backend.choice  # type: ignore[attr-defined]
    assert made.bytes_per_token() == round(whole)
    made.decode(), made.decode()
    assert 6 <= choice.tiles < 6 * 64
    tile = 16 * 256 * 8.25 / 8
    assert made.bytes_per_token() == round(whole - 1024 * 256 / 2 + choice.tiles / 6 * tile)


def test_of_an_untied_embedding_one_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shapes.SHAPES["tiny"] | {"tie_word_embeddings": False}
    monkeypatch.setitem(shapes.SHAPES, "untied", config)
    tied = Subject(backend="reference", shape="tiny", pp=4, tg=1, depth=0)
    untied = Subject(backend="reference", shape="untied", pp=4, tg=1, depth=0)
    table = 1024 * 256 * 8.25 / 8
    assert untied.weight_bytes - tied.weight_bytes == table
    assert untied.bytes_per_token() - tied.bytes_per_token() == table / 1024


def test_a_models_bytes_are_those_of_its_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    made = Subject(backend="reference", model=str(folder), pp=4, tg=2, depth=0)
    stored = sum(a.nbytes for a in written_tensors().values())
    kv = 2 * 4 * 128 * 4 * 1.5
    assert made.bytes_per_token() == round(stored + kv)
    assert made.name == "m"


def written_tensors() -> dict[str, np.ndarray]:
    """The tiny shape as float16 tensors under Hugging Face's names."""
    config = shapes.SHAPES["tiny"]
    random, tensors = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = (0.06 * random.standard_normal(shape)).astype(np.float16)

    c, f, kv = config["hidden_size"], config["intermediate_size"], 128
    add("model.embed_tokens", config["vocab_size"], c)
    add("model.norm", c)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        add(f"{at}.input_layernorm", c)
        add(f"{at}.post_attention_layernorm", c)
        for name, n, k in (("q", c, c), ("k", kv, c), ("v", kv, c), ("o", c, c)):
            add(f"{at}.self_attn.{name}_proj", n, k)
        for name, n, k in (("gate", f, c), ("up", f, c), ("down", c, f)):
            add(f"{at}.mlp.{name}_proj", n, k)
    return tensors


def write_folder(folder: Path) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shapes.SHAPES["tiny"]))
    save_file(written_tensors(), folder / "model.safetensors")
    return folder


def test_repetitions_find_the_cache_as_it_was() -> None:
    """Every repetition decodes at the same depth; otherwise the runs are not comparable."""
    made = Subject(backend="reference", shape="tiny", pp=6, tg=3, depth=5)
    for _ in range(2):
        assert made.prefill() > 0 and made.decode() > 0
        assert (made._prompt.length, made._talk.length) == (6, 8)


def test_tokens_are_decoded_in_a_cache_of_a_chats_size() -> None:
    """A device that copies its cache for each token is as slow here as in the chat.

    Only used bytes are counted.
    """
    made = Subject(backend="reference", shape="tiny", pp=6, tg=3, depth=5)
    assert made._talk.capacity == 1024 and made._prompt.capacity == 6
    assert made.about()["kv_bytes"] == made.decoder.new_cache(6 + 8).shape.bytes_per_token(4) * (6 + 8)


def test_the_work_of_a_prompt_is_counted_as_published() -> None:
    """Two operations per weight of the layers: the models' published parameter counts minus their embeddings."""
    published = {"qwen2.5-0.5b": 0.36e9, "qwen3-0.6b": 0.44e9, "qwen3-4b": 3.6e9, "qwen2.5-7b": 6.53e9}
    for name, count in published.items():
        assert layer_weights(parse_config(shapes.find(name))) == pytest.approx(count, rel=0.02), name


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_every_shape_is_a_config_this_program_reads(name: str) -> None:
    config = parse_config(shapes.find(name))
    assert config.hidden_size == shapes.SHAPES[name]["hidden_size"]


@pytest.mark.parametrize("head", ["int4", "int8", "fp16"])
def test_random_weights_keep_the_scale_of_what_passes_through(head: str) -> None:
    """Deviation 1 / sqrt(K): within a factor of 1.5 for fp16, within 10 % for codes with ±20 % scales."""
    source = RandomSource(shapes.SHAPES["tiny"], head)
    for name, tolerance in (("model.embed_tokens", 0.5 if head == "fp16" else 0.1), ("x.down_proj", 0.1)):
        w = source.weight(name, (512, 1024)).to_float32()
        assert w.std() * math.sqrt(1024) == pytest.approx(1, rel=tolerance)
        assert abs(w.mean()) < 0.1 * w.std()
    made = Subject(backend="reference", shape="tiny", head=head, pp=4, tg=1, depth=0)
    logits = made.decoder.backend.to_host(made.decoder.forward([1, 2, 3], made.decoder.new_cache(3)))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


def test_only_qwen2_has_biases_in_its_attention() -> None:
    for shape, biased in (("qwen2.5-0.5b", True), ("llama-3.2-1b", False), ("qwen3-0.6b", False)):
        source = RandomSource(shapes.find(shape))
        assert (source.weight("model.layers.0.self_attn.q_proj", (32, 128)).bias is not None) == biased
        assert source.weight("model.layers.0.self_attn.o_proj", (32, 128)).bias is None


# workers -------------------------------------------------------------------------------------------------
def test_a_worker_passes_its_error_on() -> None:
    worker = Worker("ours", {"backend": "reference", "shape": "nope", "pp": 4, "tg": 1, "depth": 0})
    with pytest.raises(errors.UsageError, match="nope"):
        worker.opened()
    worker.close()


def test_a_worker_that_dies_is_reported_and_its_memory_is_its_own() -> None:
    held = np.ones(200 << 20, np.uint8)  # the parent's 200 MB must not count as the worker's
    worker = Worker("ours", {"backend": "reference", "shape": "tiny", "pp": 4, "tg": 1, "depth": 0})
    worker.opened()
    assert 10e6 < worker.call("peak_rss") < held.nbytes
    worker._process.kill()
    with pytest.raises(errors.BackendError, match="killed"):
        worker.call("decode")
    worker.close()


def test_the_machine_is_probed_for_what_a_backend_can_use() -> None:
    assert Machine("reference", 1).about() is None
    machine = Machine("cpu", 1)
    read, peak = machine.bandwidth(), machine.int8_peak()
    assert read is not None and peak is not None
    # Every machine that runs this reads more than 0.1 GB/s and does more than 0.1 GOP/s; no CPU does a
    # thousand times more.
    assert 1e8 < read < 5e12 and 1e8 < peak < 1e15


# llama.cpp -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "file_type", "megabytes"),
    [  # the bytes read per token after llama.cpp's quantiser converted these shapes
        ("qwen2.5-0.5b", "Q4_0", 278),
        ("qwen2.5-0.5b", "Q4_K_M", 392),
        ("tinyllama-1.1b", "Q4_0", 582),
        ("tinyllama-1.1b", "Q4_K_M", 630),
        ("llama-3.2-1b", "Q4_0", 695),
        ("llama-3.2-1b", "Q4_K_M", 800),
        ("llama-2-7b", "Q4_0", 3718),
        ("llama-2-7b", "Q4_K_M", 4006),
    ],
)
def test_a_gguf_has_the_types_llama_cpp_gives(shape: str, file_type: str, megabytes: int) -> None:
    config, total = shapes.find(shape), 0
    for name, n, k in gguf_file.matrices(config):
        weights, size, *_ = gguf_file.BLOCKS[gguf_file.type_of(name, k, config, file_type)]
        rows = 1 if name == "token_embd" and not config["tie_word_embeddings"] else n
        total += rows * k // weights * size
    assert total / 1e6 == pytest.approx(megabytes, abs=2)  # norms are not counted here


def test_our_kind_decides_llama_cpps_type() -> None:
    assert parse_peer("llama.cpp", "int4") == ("llama.cpp", "Q4_0", True)
    assert parse_peer("llama.cpp", "int8") == ("llama.cpp", "Q4_K_M", True)
    assert parse_peer("llama.cpp:q4_0:norepack", "int8") == ("llama.cpp", "Q4_0", False)


@pytest.mark.parametrize("kind", sorted(gguf_file.BLOCKS))
def test_random_blocks_are_valid(kind: str) -> None:
    """gguf's dequantiser returns finite weights of about unit gain."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    data = gguf_file.blocks(np.random.Generator(np.random.SFC64(0)), kind, 64, 512)
    w = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert w.shape == (64, 512) and np.isfinite(w).all()
    assert 0.2 < w.std() * math.sqrt(512) < 5


@pytest.mark.skipif(not (find_spec("llama_cpp") and find_spec("gguf")), reason="llama.cpp is not installed")
def test_llama_cpp_runs_beside_us() -> None:
    made, progress = bench(*SMALL, "--head", "int4", "--against", "llama.cpp")
    (peer,) = made["peers"]
    assert (
        peer["name"] == "llama.cpp Q4_0" and peer["tg_tok_s"] > 0 and peer["rss_bytes"] > peer["weight_bytes"]
    )
    assert len(peer["tg_ratio"]["runs"]) == 5 and "ratio" in progress
    assert peer["tg_ratio"]["runs"][0] == pytest.approx(
        made["spread"]["tg_tok_s"]["runs"][0] / peer["spread"]["tg_tok_s"]["runs"][0]
    )


# on a Mac ------------------------------------------------------------------------------------------------
def test_the_cost_on_paper_needs_no_mac(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "qwen2.5-0.5b", "--model-cost", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    m1 = next(r for r in rows if r["chip"] == "M1")
    # 494 M weights of 4.25 bits at 68.25 GB/s: 260 tokens/s is the limit by bytes
    assert m1["ceiling"] == pytest.approx(68.25e9 / (494e6 * 4.25 / 8), rel=0.01)
    chips = {r["chip"]: r for r in rows if r["gb_s"]}
    assert {f"M{n} {kind}".strip() for n in range(1, 6) for kind in ("", "Pro", "Max")} <= chips.keys()
    for row in chips.values():  # bandwidth = bus width in bits / 8 · million transfers per second
        bits, _, rate = row["bandwidth from"].partition(" bit LPDDR")
        expected = int(bits) * float(rate.partition("-")[2]) / 8000 if rate else row["gb_s"]
        assert row["gb_s"] == pytest.approx(expected, rel=1e-3) and (rate or bits.startswith("Apple 20"))
    # an Ultra is two Maxes, a Max two Pros, except for the M3's and for Apple's rounding
    for n, kind, half in (
        (1, "Ultra", "Max"),
        (2, "Ultra", "Max"),
        (3, "Ultra", "Max"),
        (4, "Max", "Pro"),
        (5, "Max", "Pro"),
    ):
        assert chips[f"M{n} {kind}"]["gb_s"] == pytest.approx(2 * chips[f"M{n} {half}"]["gb_s"], rel=0.03)


def test_kernels_are_measured_on_a_mac_only(capsys: pytest.CaptureFixture[str]) -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    assert main(["bench", "--shape", "tiny", "--kernels"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Mac" in err
