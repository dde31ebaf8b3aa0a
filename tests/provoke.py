"""Calls that make the errors which no other test provokes: small, and each in one place of ours (test_errors.py)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from raise_sites import ROOT

from tinychat_mlx import errors, foreign, hub, limits, loading, rope, template, tensorfile
from tinychat_mlx.apps import config, doctor, fit, options
from tinychat_mlx.apps import convert as converting
from tinychat_mlx.apps import run as running
from tinychat_mlx.apps.bench import gguf_file, llamacpp, mac, torchlinear
from tinychat_mlx.apps.bench.ours import Subject
from tinychat_mlx.apps.bench.shapes import SHAPES
from tinychat_mlx.apps.chat import attach, session
from tinychat_mlx.apps.chat.cli import keep_prefixes, resume
from tinychat_mlx.apps.chat.commands import conversation, storage, tuning
from tinychat_mlx.apps.doctor import report
from tinychat_mlx.apps.doctor import settings as doctors
from tinychat_mlx.apps.models import facts, opening, remove
from tinychat_mlx.apps.models.pull import pull
from tinychat_mlx.awq import calibrate, dataset, documents, finish, selftext, stream, versus
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.awq.target import check_target
from tinychat_mlx.backend import CacheShape, Segment
from tinychat_mlx.backends.cpu import CpuBackend, _cache_kind, _threads
from tinychat_mlx.backends.cpu import engine as engines
from tinychat_mlx.backends.cpu import library as native
from tinychat_mlx.backends.cpu.engine import Engine
from tinychat_mlx.backends.cpu.pack import _packed_header
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Loader
from tinychat_mlx.errors import TinychatError
from tinychat_mlx.formats.stored import Stored
from tinychat_mlx.generate import _Run
from tinychat_mlx.hub import ask, http
from tinychat_mlx.loading import find_folder
from tinychat_mlx.tensorfile import TensorFile
from tinychat_mlx.weight import Dense, Packed

REF = hub.Ref("org/model")
DENSE = ROOT / "tests" / "data" / "demo-fp16"


def chat(*messages: str, **more: Any) -> Any:
    """What a slash command sees of a chat: messages by turns of user and assistant."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    kept = SimpleNamespace(messages=said, seen_from=0, ident="x", system="", set_system=print)
    plain = SimpleNamespace(terminal=SimpleNamespace(live=False), note=print, say=print)
    return SimpleNamespace(**({"session": kept, "data": None, "load": None, "view": plain} | more))


def refusal(name: str, status: int = 0) -> TinychatError:
    """What `explain` makes of an error of huggingface_hub."""
    from huggingface_hub import errors as theirs

    kind = getattr(theirs, name)
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status, headers={})
    raise http.explain(error, REF)


def wrote(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def configured(text: str, preset: str | None = None) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    """Read a config file with this text."""

    def call(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
        patch.setenv("TINYCHAT_CONFIG", str(wrote(tmp / "c.toml", text)))
        return config.settings(preset)

    return call


def model_config(**values: Any) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    """Parse a small Llama's config.json with these values; None takes one out."""

    def call(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
        whole = SHAPES["tiny"] | values
        return parse_config({k: v for k, v in whole.items() if v is not None})

    return call


def asked_of_the_hub(
    what: str, refuses: str, call: Callable[[], Any]
) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    """Call while the hub answers with an error of huggingface_hub, or with nothing worth having."""
    from huggingface_hub import errors as theirs

    def answer(*_: Any, **__: Any) -> Any:
        if not refuses:
            return SimpleNamespace(sha="nonsense", siblings=[], tags=[])
        kind = getattr(theirs, refuses)
        raise kind.__new__(kind)

    def made(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(f"huggingface_hub.HfApi.{what}", answer)
        return call()

    return made


def said(*texts: str) -> session.Session:
    return session.Session(messages=chat(*texts).session.messages)


def text_of(name: str, data: bytes) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    """Read calibration text from a file."""
    return lambda tmp, patch: list(documents.documents(name, wrote(tmp / name, data).open("rb")))


def weights(tmp: Path) -> TensorFile:
    tensorfile.write(tmp / "w.safetensors", [tensorfile.entry("a", np.ones(4, np.float32))], {})
    return TensorFile(tmp / "w.safetensors")


def without(patch: pytest.MonkeyPatch, target: Any, name: str, value: Any) -> None:
    patch.setattr(target, name, value)


def broken_move(*_: Any, **__: Any) -> None:
    raise OSError(5, "Input/output error", "x")


def no_library(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(native.tinychat_mlx, "__path__", [str(tmp)])
    return native.find_library()


def bad_library(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(native, "find_library", lambda: wrote(tmp / "tinychat_cpu.so", b"no library"))
    return native.open_library.__wrapped__()


def other_library(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(native, "_SIZES", {native.LINEAR: native.MapOp})
    return native.open_library.__wrapped__()


def put_in_place(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    (tmp / "out").mkdir()
    (tmp / "work").mkdir()
    patch.setattr("os.rename", broken_move)
    return finish.put_in_place(tmp / "out", tmp / "target", tmp / "work", tmp / "work" / "renaming")


def refusing(*_: Any, **__: Any) -> Any:
    raise AssertionError("not to be called")


def large_download_refused(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    remote, found = (
        SimpleNamespace(missing=10**10),
        SimpleNamespace(trouble="", nbytes=1, quantization="int4", dense=False),
    )
    for name, value in {"hub.look": remote, "hub.check_room": None, "detect": SimpleNamespace(interactive=True),
                        "fit.describe": "", "fit.context_for": None, "_key": "n"}.items():  # fmt: skip
        patch.setattr(f"tinychat_mlx.apps.models.opening.{name}", lambda *a, value=value: value)
    patch.setattr(facts, "remote", lambda *a: found)
    return opening._fetch(REF, {"backend": "cpu"}, print, 0)


def past_its_end(backend: CpuBackend) -> Any:
    cache = backend.new_cache(CacheShape(1, 1, 16), 16)
    cache.length = 1000
    return backend._segments(0, backend.step([Segment(cache, 1)]))


def unlike_experts(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """Gate in float16, up in float32."""
    shape = parse_config(SHAPES["tiny"] | {
        "model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 64,
    })  # fmt: skip
    forms = {"gate": np.float16, "up": np.float32}
    of = lambda name, _: Dense(name, np.zeros((64, 256), forms["gate" if "gate" in name else "up"]))
    return list(Loader(shape, SimpleNamespace(weight=of), ReferenceBackend()).experts(0))


def nan_ahead() -> Any:
    """A run whose device has drawn what it draws from logits that are no numbers."""
    decoder = SimpleNamespace(backend=SimpleNamespace(to_host=lambda token: [-1]))
    return SimpleNamespace(
        engine=SimpleNamespace(decoder=decoder), logits=0, completion=0, params=SimpleNamespace(max_tokens=1)
    )


def odd_sizes(tmp: Path, **sizes: int) -> Any:
    return SimpleNamespace(config=SHAPES["tiny"] | sizes, folder=tmp)


def other_tokenizer(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """Calibration text in more tokens than the model has."""
    demo = Checkpoint.open(loading.DEMO)
    small, text = replace(parse_config(demo.config), vocab_size=8), wrote(tmp / "c.txt", "What is AWQ? " * 99)
    return calibrate.calibration_ids(small, demo, refusing, Settings(calib=str(text)), 64, print)


def overflow(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """A float layer whose output is infinite."""
    patch.setattr(stream.Conversion, "_record", lambda *_: ({}, []))
    run = stream.Conversion(None, None, Settings(), refusing, None, 64)
    return run._quantized(SimpleNamespace(layer=3), np.full((1, 2, 2), np.inf, np.float32))


def absent(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")


# mlx-lm, which knows no architecture.
THEIRS = SimpleNamespace(load=lambda *a, **k: (None, None, {"model_type": "x"}), AWQ_MODEL_CONFIGS={})


def broken_dataset(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename="a.bin", size=1)])


def pulled_in_pieces(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """A download that is what the hub has, and lacks a tensor."""
    shutil.copytree(loading.DEMO, tmp / "m")
    (tmp / "m" / "model.safetensors").write_bytes(b"")
    patch.setattr("tinychat_mlx.apps.models.pull.hub.look", lambda *a: None)
    patch.setattr("tinychat_mlx.apps.models.pull._plan", lambda remote: "")
    patch.setattr("tinychat_mlx.apps.models.pull.download", lambda *a: tmp / "m")
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    return pull("org/model", False, True)


def unknown_kind(tmp: Path) -> Path:
    """A model whose architecture nobody knows."""
    folder = shutil.copytree(loading.DEMO, tmp / "m")
    told = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba9"}
    wrote(folder / "config.json", json.dumps(told))
    return folder


def then_shown(finding: Any) -> None:
    """doctor catches the error, and its words become the finding's."""
    assert "mamba9" in finding.text
    raise errors.ConfigError("seen")


def llama(patch: pytest.MonkeyPatch, **answers: int) -> Any:
    """Our driver of llama.cpp over a library that answers so; everything else works."""
    found = {"model": 1, "context": 1, "decode": 0} | answers
    names = {
        "llama_model_load_from_file": "model",
        "llama_init_from_model": "context",
        "llama_decode": "decode",
    }

    class Library:
        llama_token = np.ctypeslib.ctypes.c_int32

        def __getattr__(self, name: str) -> Any:
            value = found[names[name]] if name in names else SimpleNamespace()
            return (lambda *a: 1) if name in ("llama_n_batch", "llama_vocab_n_tokens") else lambda *a: value

    patch.setattr(llamacpp, "library", lambda name: Library())
    made = llamacpp.Subject.__new__(llamacpp.Subject)
    made.ids = bytearray(64)
    if "decode" in answers:
        made.lib, made.context = Library(), 1
    else:
        llamacpp.Subject.__init__(made, path="x", pp=1, tg=1, depth=0, threads=1, repack=True, vocabulary=9)
    return made


def mlx_part(name: str) -> Any:
    return import_module(f"tinychat_mlx.backends.mlx.{name}")


def mlx_absent(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """The module that imports MLX, run again where there is none."""
    path = str(ROOT / "backends" / "mlx" / "device.py")
    patch.setitem(sys.modules, "mlx.core", None)
    return run_path(path)


def one_gpu(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """A torch with CUDA on a machine with one device; the eighth is asked for."""
    patch.setattr("torch.version.cuda", "12.6")
    patch.setattr("torch.cuda.init", lambda: None)
    patch.setattr("torch.cuda.device_count", lambda: 1)
    patch.setenv("TINYCHAT_CUDA_DEVICE", "7")
    return import_module("tinychat_mlx.backends.cuda.device").find()


def nvrtc_refuses(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    """A compiler that says no and does not say why."""
    fake = SimpleNamespace(
        nvrtc=type("Nvrtc", (), {"__getattr__": lambda self, name: lambda *a: int(name == "nvrtcCompileProgram")})(),
        arch="sm_0", version="0",
    )  # fmt: skip
    return import_module("tinychat_mlx.backends.cuda.nvrtc").Compiler.compile(fake, "rows", b"")


# In order: a plain call with (tmp_path, monkeypatch). Where it ends says which site it provoked.
PROVOKE: list[Callable[[Path, pytest.MonkeyPatch], Any]] = [
    # the chat's commands
    lambda tmp, patch: attach.read(str(tmp / "absent")),
    lambda tmp, patch: attach.read(str(wrote(tmp / "x", b"\xff\xfe"))),
    lambda tmp, patch: (patch.setattr(attach, "MOST_BYTES", 2), attach.read(str(wrote(tmp / "x", "abc")))),
    lambda tmp, patch: storage.save(chat(), ""),
    lambda tmp, patch: storage.save(chat(data=tmp), ""),
    lambda tmp, patch: storage.load(chat(data=tmp), ""),
    lambda tmp, patch: storage.search(chat(data=tmp), ""),
    lambda tmp, patch: storage.export(chat(), ""),
    lambda tmp, patch: storage.export(chat("hi", "ho"), "x.pdf"),
    lambda tmp, patch: storage.export(chat(session=said("hi", "ho")), str(wrote(tmp / "x.md", ""))),
    lambda tmp, patch: storage.file(chat(), ""),
    lambda tmp, patch: (patch.setenv("TINYCHAT_PREFIX_MB", "much"), keep_prefixes(SimpleNamespace(), False)),
    lambda tmp, patch: (patch.setattr(Path, "is_file", broken_move), attach.read(str(tmp / "x"))),
    lambda tmp, patch: session.Session.load(wrote(tmp / "s", '{"what": 1}\n{}\n')),
    lambda tmp, patch: storage.copy(chat(), ""),
    lambda tmp, patch: storage.copy(chat("hi", "no code"), "code"),
    lambda tmp, patch: (patch.setattr(storage, "CLIPBOARDS", ()), storage.copy(chat("hi", "ho"), "")),
    lambda tmp, patch: conversation.last_question(chat()),
    lambda tmp, patch: conversation.compact(chat("hi", "ho")),
    lambda tmp, patch: conversation.compact(chat(
        session=said("hi", "ho", "hm"), settings=SimpleNamespace(think=None),
        view=SimpleNamespace(note=print, glyphs=SimpleNamespace(ellipsis="")),
        model=SimpleNamespace(context=99, chat=lambda *a, **k: [SimpleNamespace(text=" ", stats=None)]))),
    lambda tmp, patch: tuning.backend(chat(), "gpu"),
    lambda tmp, patch: tuning.switch(chat(), {}),
    lambda tmp, patch: tuning.system(chat(), f"@{tmp / 'absent'}"),
    lambda tmp, patch: tuning.set_(chat(), "colour red"),
    lambda tmp, patch: tuning.set_(chat(), "on_full never"),
    lambda tmp, patch: tuning.set_(chat(), "temperature hot"),
    lambda tmp, patch: tuning.think(chat(settings=SimpleNamespace()), "loudly"),
    lambda tmp, patch: session.find(tmp, "nothing"),
    lambda tmp, patch: list(session._records(tmp)),
    lambda tmp, patch: list(session._records(wrote(tmp / "s", "[]\n{}\n"))),
    # settings
    configured("temprature = 1"),
    configured("temperature = 'hot'"),
    configured("= 1"),
    configured("", "coder"),
    configured("presets = 1"),
    lambda tmp, patch: (patch.setenv("TINYCHAT_CONFIG", str(tmp / "no.toml")), config.settings("coder")),
    lambda tmp, patch: (patch.setattr(Path, "read_text", broken_move), configured("")(tmp, patch)),
    # models
    lambda tmp, patch: fit.look_for("mlx"),
    lambda tmp, patch: (patch.setattr(loading, "has_nvidia", lambda: False), fit.look_for("cuda")),
    lambda tmp, patch: (patch.setattr(loading, "has_nvidia", lambda: True),
                        patch.setattr(fit, "find_spec", lambda name: None), fit.look_for("cuda")),
    lambda tmp, patch: fit.refuse("x", fit.Cost(9, 0, 0, 0, 1), 8, 1, "cpu", 4),
    lambda tmp, patch: remove._agreed("x", False),
    lambda tmp, patch: (patch.setattr("shutil.rmtree", broken_move), remove._delete(tmp)),
    lambda tmp, patch: (patch.setenv("HF_HUB_CACHE", str(tmp)), remove._folder("org/none", REF)),
    lambda tmp, patch: (patch.setenv("HF_HUB_CACHE", str(tmp)), remove._remove_revision(hub.Ref("org/none", "v1"), True)),
    large_download_refused,
    lambda tmp, patch: find_folder(wrote(tmp / "file", "")),
    lambda tmp, patch: hub.find("not an id"),
    lambda tmp, patch: refusal("GatedRepoError", 403),
    lambda tmp, patch: refusal("RevisionNotFoundError", 404),
    lambda tmp, patch: refusal("RepositoryNotFoundError", 404),
    lambda tmp, patch: refusal("EntryNotFoundError", 404),
    *[lambda tmp, patch, s=s: refusal("HfHubHTTPError", s) for s in (401, 403, 429, 503, 418)],
    lambda tmp, patch: pull("no id", False, True),
    asked_of_the_hub("model_info", "", lambda: hub.look(REF)),
    lambda tmp, patch: ask._weight_files(SimpleNamespace(ref=REF), {}, print),
    lambda tmp, patch: (patch.setattr(ask, "read", lambda *a, **k: b"\xff" * 8),
                        hub.read_header(SimpleNamespace(ref=REF), hub.File("m.safetensors", 99, ""))),
    lambda tmp, patch: hub.read_json(SimpleNamespace(ref=REF), hub.File("config.json", 1 << 40, "")),
    lambda tmp, patch: (patch.setitem(loading.BACKENDS, "cpu", ("no_such_module", "X")), loading.create("cpu", False, None)),
    lambda tmp, patch: Checkpoint.open(tmp / "no"),
    pulled_in_pieces,
    # what a command line says
    lambda tmp, patch: report.check(str(wrote(tmp / "r.md", ""))),
    lambda tmp, patch: report.check(str(tmp / "no" / "r.md")),
    lambda tmp, patch: options.check_writable(wrote(tmp / "x", "") / "y", "-o"),
    lambda tmp, patch: options.check_writable(tmp / ("x" * 300), "-o"),
    lambda tmp, patch: options.check_writable(Path("/proc/x"), "-o"),
    lambda tmp, patch: options.text_or_file(f"@{tmp / 'absent'}"),
    lambda tmp, patch: options.text_or_file(f"@{wrote(tmp / 'x', bytes([255]))}"),
    lambda tmp, patch: check_target(None, tmp, False),
    lambda tmp, patch: check_target(None, wrote(tmp / "x", "") / "y", False),
    lambda tmp, patch: check_target(tmp / "model", tmp, True),
    lambda tmp, patch: doctor.doctor.main(["--json", "--report", "-"], standalone_mode=False),
    lambda tmp, patch: converting.convert.main(["demo"], standalone_mode=False),
    lambda tmp, patch: converting.convert.main(["demo", "-o", "x", "--report-text", __file__], standalone_mode=False),
    lambda tmp, patch: resume(None, "a name", False, None),
    lambda tmp, patch: (patch.setattr("sys.stdin", None), running.gather(())),
    lambda tmp, patch: then_shown(doctors._model(str(unknown_kind(tmp)), "flag", "cpu")),
    # config.json
    model_config(model_type="bloom", n_head=4, n_layer=2, apply_residual_connection_post_layernorm=True),
    model_config(model_type="mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"alibi": False}),
    model_config(model_type="mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"alibi": True, "qk_ln": True}),
    model_config(model_type="opt", do_layer_norm_before=False, ffn_dim=64),
    model_config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, mlp_only_layers="x"),
    model_config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=9, moe_intermediate_size=64),
    model_config(model_type="smollm3", no_rope_layers=[1]),
    model_config(model_type="gemma2", head_dim=64, query_pre_attn_scalar="many"),
    model_config(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                               "original_max_position_embeddings": 64}),
    model_config(model_type="phi3", original_max_position_embeddings=64,
                 rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    lambda tmp, patch: rope.rope_table({}, 64, None),
    lambda tmp, patch: foreign.read(wrote(tmp / "x.json", "{")),
    lambda tmp, patch: foreign.read(wrote(tmp / "x.json", "[]")),
    # weights
    lambda tmp, patch: weights(tmp).info("b"),
    lambda tmp, patch: TensorFile(tmp),
    lambda tmp, patch: TensorFile(Path("a\0b")),
    lambda tmp, patch: (weights(tmp), patch.setattr("mmap.mmap", broken_move), TensorFile(tmp / "w.safetensors")),
    lambda tmp, patch: (patch.setattr("os.replace", broken_move), weights(tmp)),
    lambda tmp, patch: Loader.vector(SimpleNamespace(source=SimpleNamespace(vector=lambda name: np.zeros(2))), "norm", 3),
    unlike_experts,
    lambda tmp, patch: Stored(SimpleNamespace(where=str), "a").packed(*[None] * 3, 4, 48),
    # running
    lambda tmp, patch: Subject(backend="reference", pp=2000, tg=1, depth=0, shape="tiny"),
    lambda tmp, patch: list(_Run.tokens_ahead(nan_ahead(), SimpleNamespace(length=1, capacity=1), lambda logits: logits)),
    lambda tmp, patch: template._open_final_message([{"content": "x"}], "content", "{{ nothing }}"),
    # quantising
    lambda tmp, patch: selftext._around("no mark", selftext.MARKS),
    lambda tmp, patch: converting.convert.main([str(loading.DEMO), "-o", str(tmp / "x")], standalone_mode=False),
    lambda tmp, patch: converting.convert.main([str(loading.DEMO), "-o", str(tmp / "x"), "--seed", "1"], standalone_mode=False),
    lambda tmp, patch: (patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1)),
                        convert(Checkpoint.open(loading.DEMO), tmp / "x", Settings(format="awq"), refusing, refusing)),
    lambda tmp, patch: (patch.setattr(limits, "memory_free", lambda mapped=0: 1),
                        convert(Checkpoint.open(DENSE), tmp / "x", Settings(), refusing, refusing)),
    lambda tmp, patch: versus.compare(SimpleNamespace(window=64, text=lambda *a: (np.zeros(9), 0, 1)), Settings()),
    lambda tmp, patch: (patch.setattr(versus, "import_module", absent), versus.mlx_lm_awq(tmp, tmp, None, 1, Settings())),
    lambda tmp, patch: (patch.setattr(versus, "import_module", lambda name: THEIRS),
                        versus.mlx_lm_awq(tmp, tmp, None, 1, Settings())),
    lambda tmp, patch: open_dense(odd_sizes(tmp, intermediate_size=100), Settings()),
    lambda tmp, patch: open_dense(odd_sizes(tmp, intermediate_size=96), Settings(group_size=64)),
    lambda tmp, patch: open_dense(odd_sizes(tmp, num_attention_heads=8, num_key_value_heads=1, head_dim=4), Settings(format="awq")),
    other_tokenizer,
    overflow,
    lambda tmp, patch: Settings(method="magic"),
    put_in_place,
    lambda tmp, patch: selftext.sampled(np.full((1, 4), np.nan, np.float32), np.random.default_rng(0)),
    lambda tmp, patch: dataset.choose("org/data", {"a.bin": 1}, 10),
    lambda tmp, patch: dataset.fetch("no id at all", 10),
    lambda tmp, patch: dataset.fetch("org/data", 10),  # conftest: HF_HUB_OFFLINE
    lambda tmp, patch: (patch.setattr("huggingface_hub.HfApi.dataset_info", broken_dataset), dataset.fetch("org/data", 10)),
    lambda tmp, patch: (patch.setattr(documents, "MAX_CELL", 4), text_of("a.csv", b"text\n" + b"x" * 99)(tmp, patch)),
    lambda tmp, patch: (patch.setattr(documents, "MAX_JSON", 4), list(documents._whole("a.json", "[1, 2]"))),
    lambda tmp, patch: calibrate._read(tmp),
    asked_of_the_hub("dataset_info", "GatedRepoError", lambda: dataset.fetch("org/data", 10)),
    asked_of_the_hub("dataset_info", "RepositoryNotFoundError", lambda: dataset.fetch("org/data", 10)),
    asked_of_the_hub("dataset_info", "", lambda: dataset.fetch("org/data:none.txt", 10)),
    lambda tmp, patch: documents.document({"instruction": 1, "output": 2}, "x"),
    # the cpu backend
    lambda tmp, patch: _packed_header(SimpleNamespace(shape=(4, 64), w_bit=5, group_size=32, name="w")),
    lambda tmp, patch: _packed_header(SimpleNamespace(shape=(4, 64), w_bit=4, group_size=48, name="w")),
    lambda tmp, patch: _cache_kind("fp4"),
    lambda tmp, patch: (patch.setenv("TINYCHAT_THREADS", "all"), _threads(None)),
    lambda tmp, patch: Engine("sve9", 1),
    lambda tmp, patch: Engine(None, 0),
    lambda tmp, patch: (patch.setattr(engines, "open_library", lambda: SimpleNamespace(tc_new=lambda *a: 0)), Engine(None, 1)),
    lambda tmp, patch: CpuBackend(threads=1).engine._check(1),
    lambda tmp, patch: CpuBackend(threads=1).engine._check(2),
    lambda tmp, patch: past_its_end(CpuBackend(threads=1)),
    no_library,
    bad_library,
    other_library,
]  # fmt: skip

# bench beside other programs
PROVOKE += [
    lambda tmp, patch: gguf_file.library("no_such_program"),
    lambda tmp, patch: (patch.setattr(gguf_file, "library", print), gguf_file.write(tmp / "x", {"model_type": "x"}, "Q4_0")),
    lambda tmp, patch: llama(patch, model=0),
    lambda tmp, patch: llama(patch, context=0),
    lambda tmp, patch: llama(patch, decode=1)._feed(0, 1),
    lambda tmp, patch: (patch.setitem(sys.modules, "tinychat_mlx.backends.mlx", None), mac.kernels(None, print)),
    lambda tmp, patch: (patch.setattr(torchlinear, "import_module", absent), torchlinear.Subject(linears=[], layers=1, threads=1)),
    lambda tmp, patch: torchlinear.Subject._int4(
        SimpleNamespace(torch=SimpleNamespace(ops=SimpleNamespace(aten=None), __version__="0")), 1, 1),
]  # fmt: skip

# What needs a library of the test extras -> it, and the call.
WITH: list[tuple[str, Callable[[Path, pytest.MonkeyPatch], Any]]] = [
    ("torch", lambda tmp, patch: (patch.setenv("TINYCHAT_CUDA_DEVICE", "cpu"), patch.setenv("TINYCHAT_CUDA_KV", "fp4"),
                                  loading.create("cuda", False, None))),
    ("torch", one_gpu),
    ("torch", nvrtc_refuses),
    ("mlx", mlx_absent),
    ("mlx", lambda tmp, patch: mlx_part("winners").choice("magic", True, "M1")),
    ("mlx", lambda tmp, patch: mlx_part("interop").read_config(wrote(tmp / "config.json", "[]").parent)),
    ("mlx", lambda tmp, patch: mlx_part("backend").MlxBackend.check_weights(
        SimpleNamespace(_taken=lambda: 0, chip=SimpleNamespace(limit=0, name="M1")), "w", 1)),
    ("mlx", lambda tmp, patch: mlx_part("weights").arrays_of(
        [Packed("w", np.zeros((1, 14), np.uint32), np.ones((1, 1)), np.ones((1, 1)), 7, 64)], None, False)),
    ("mlx", lambda tmp, patch: (patch.setattr(mlx_part("interop"), "load_model", print), mlx_part("interop").MlxLmDecoder(
        wrote(tmp / "config.json", '{"vocab_size": "many"}').parent))),
    ("mlx", lambda tmp, patch: (patch.setitem(sys.modules, "mlx_lm", None), mlx_part("interop").load_model(tmp))),
    ("mlx_lm", lambda tmp, patch: (patch.setattr("mlx_lm.__version__", "0.9"), mlx_part("interop").load_model(tmp))),
]  # fmt: skip
