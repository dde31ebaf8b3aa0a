"""Every error says what is wrong, where, and what to do; every place that makes one is provoked by some test.

What other tests provoke stands in data/raised.json, written by `pytest -p raise_sites tests/test_foo.py …`; PROVOKE
does the rest here; NOT_HERE says why of what needs a device, a hub or a disk that no test has.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from raise_sites import NOTES, ROOT, Site, noting, sites

from tinychat_mlx import errors, foreign, hub, loading, rope, template, tensorfile
from tinychat_mlx.apps import config, fit
from tinychat_mlx.apps.bench.ours import Subject
from tinychat_mlx.apps.bench.shapes import SHAPES
from tinychat_mlx.apps.chat import attach, session
from tinychat_mlx.apps.chat.cli import keep_prefixes
from tinychat_mlx.apps.chat.commands import conversation, storage, tuning
from tinychat_mlx.apps.doctor import report
from tinychat_mlx.apps.models import facts, opening, remove
from tinychat_mlx.apps.models.pull import pull
from tinychat_mlx.awq import calibrate, dataset, documents, finish, selftext, stream
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.awq.target import check_target
from tinychat_mlx.backend import CacheShape, Segment
from tinychat_mlx.backends.cpu import CpuBackend, _cache_kind, _threads
from tinychat_mlx.backends.cpu import library as native
from tinychat_mlx.backends.cpu.engine import Engine
from tinychat_mlx.backends.cpu.pack import _packed_header
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Loader
from tinychat_mlx.errors import TinychatError, in_words
from tinychat_mlx.formats.stored import Stored
from tinychat_mlx.generate import _Run
from tinychat_mlx.hub import ask, http
from tinychat_mlx.loading import find_folder
from tinychat_mlx.tensorfile import TensorFile
from tinychat_mlx.weight import Dense

REF = hub.Ref("org/model")


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


def no_words(*_: Any, **__: Any) -> Any:
    raise errors.TokenizerError("it encodes nothing")


def large_download_refused(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    remote, found = (
        SimpleNamespace(missing=10**10),
        SimpleNamespace(trouble="", nbytes=1, quantization="int4", dense=False),
    )
    for name, value in {"hub.look": remote, "hub.check_room": None, "detect": SimpleNamespace(interactive=True),
                        "fit.describe": "", "fit.check": None, "_key": "n"}.items():  # fmt: skip
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


def odd_sizes(inner: int, tmp: Path) -> Any:
    return SimpleNamespace(config=SHAPES["tiny"] | {"intermediate_size": inner}, folder=tmp)


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
    # models
    lambda tmp, patch: fit.free_on("mlx"),
    lambda tmp, patch: (without(patch, sys.modules["tinychat_mlx.loading"], "has_nvidia", lambda: False), fit.free_on("cuda")),
    lambda tmp, patch: (without(patch, sys.modules["tinychat_mlx.loading"], "has_nvidia", lambda: True),
                        without(patch, fit, "find_spec", lambda name: None), fit.free_on("cuda")),
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
    lambda tmp, patch: (patch.setattr(hub, "read", lambda *a, **k: b"\xff" * 8),
                        facts._remote_header(SimpleNamespace(ref=REF), hub.File("m.safetensors", 99, ""), print)),
    lambda tmp, patch: (patch.setitem(loading.BACKENDS, "cpu", ("no_such_module", "X")), loading.create("cpu", False, None)),
    lambda tmp, patch: Checkpoint.open(tmp / "no"),
    # doctor
    lambda tmp, patch: report.write(str(wrote(tmp / "r.md", "")), "x"),
    lambda tmp, patch: report.write(str(tmp / "no" / "r.md"), "x"),
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
    lambda tmp, patch: selftext.turns(SimpleNamespace(render=lambda *a, **k: "", encode=no_words), np.random.default_rng(0)),
    lambda tmp, patch: check_target(tmp / "model", tmp / "no" / "x", False),
    lambda tmp, patch: open_dense(odd_sizes(100, tmp), Settings(group_size=32)),
    lambda tmp, patch: open_dense(odd_sizes(100, tmp), Settings(group_size=32, format="awq")),
    other_tokenizer,
    overflow,
    lambda tmp, patch: Settings(method="magic"),
    put_in_place,
    lambda tmp, patch: selftext.sampled(np.full((1, 4), np.nan, np.float32), np.random.default_rng(0)),
    lambda tmp, patch: dataset.choose("org/data", {"a.bin": 1}, 10),
    lambda tmp, patch: dataset.fetch("no id at all", 10),
    lambda tmp, patch: dataset.fetch("org/data", 10),  # conftest: HF_HUB_OFFLINE
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
    lambda tmp, patch: CpuBackend(threads=1).engine._check(1),
    lambda tmp, patch: CpuBackend(threads=1).engine._check(2),
    lambda tmp, patch: past_its_end(CpuBackend(threads=1)),
    no_library,
    bad_library,
    other_library,
]  # fmt: skip

# Beginning of a site's key -> why nothing provokes it here.
NOT_HERE = {
    "apps/bench/gguf_file.py:": "needs the gguf library; test_bench.py runs it where that is installed",
    "apps/bench/llamacpp.py:": "needs llama-cpp-python and a failure inside it",
    "apps/bench/mac.py:": "needs a Mac",
    "apps/bench/torchlinear.py:": "needs another torch",
    "awq/versus.py:": "compares with mlx-lm for our own table; no command of the program reaches it",
    "backends/cuda/": "needs a GPU, or a torch or a driver that fails; test_cuda_build.py has what can be had without",
    "backends/mlx/": "needs mlx, a Mac, or an mlx that fails: test_mlx_*.py have what can be had without",
    "backends/cpu/engine.py:Engine.__init__: cpu backend out of": "the allocator would have to fail",
    "awq/documents.py:_parquet: {} damaged": "needs pyarrow: test_calibration_text.py where that is installed",
    "apps/doctor/settings.py:_model:": "is caught where it is raised, and becomes a finding: test_doctor.py",
}


@pytest.fixture(scope="module")
def provoked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Key of each site that PROVOKE reaches -> the line a user sees."""
    if sys.platform != "linux":
        pytest.skip("the words of the system and what it refuses are Linux's")
    found: dict[str, str] = {}
    for number, call in enumerate(PROVOKE):
        made: list[tuple[str, str]] = []
        with pytest.MonkeyPatch.context() as patch, noting(lambda s, m, made=made: made.append((s.key, m))):
            try:
                call(tmp_path_factory.mktemp("provoke"), patch)
            except TinychatError:
                assert made, f"PROVOKE[{number}] makes an error in no place of ours"
            else:
                pytest.fail(f"PROVOKE[{number}] raises nothing")
        found |= dict(made)
    return found


def test_every_place_that_makes_an_error_is_provoked(provoked: dict[str, str]) -> None:
    noted: dict[str, str] = json.loads(NOTES.read_text(encoding="utf-8"))
    left = {s.key for s in sites()} - set(provoked) - set(noted)
    left = {key for key in left if not key.startswith(tuple(NOT_HERE))}
    how = "provoke it in a test and run `pytest -p raise_sites` on that, or in PROVOKE"
    assert not left, f"{how}:\n" + "\n".join(sorted(left))


def test_every_test_that_is_named_exists() -> None:
    noted: dict[str, str] = json.loads(NOTES.read_text(encoding="utf-8"))
    for test in sorted(set(noted.values())):
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert set(name.split("::")) <= names, (
            f"{test} is gone: run `pytest -p raise_sites` on what replaced it"
        )


def test_nothing_is_excused_that_does_not_exist() -> None:
    keys = [s.key for s in sites()]
    assert all(any(key.startswith(excuse) for key in keys) for excuse in NOT_HERE)


def test_every_class_of_error_is_provoked(provoked: dict[str, str]) -> None:
    noted: dict[str, str] = json.loads(NOTES.read_text(encoding="utf-8"))
    seen = {s.error for s in sites() if s.key in provoked or s.key in noted}
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, TinychatError)}
    assert seen >= classes - {"TinychatError"}
    assert all(getattr(errors, name).__doc__ for name in classes)


# the form ----------------------------------------------------------------------------------------------
# An instruction, a command, an option, or what is possible instead.
TO_DO = re.compile(
    r"`[^`]+`|--[a-z]|\b(?:" + "|".join(sorted(errors.IMPERATIVES)) + r")\b|(?<!\w)/[a-z]+|\bknown are\b|\bread (?:is|are)\b"
    r"|\bmust\b|\bneeds?(?:ed)?\b|\bsupported are\b|\bthere are\b|\bnothing to\b|\?|\blist (?:them|names)\b",
    re.IGNORECASE,
)  # fmt: skip


def shown(site: Site) -> str:
    """A site's message as a user sees it, with X for what is filled in."""
    kind = getattr(errors, site.error)
    return in_words(kind(site.text.replace("{}", "X")))


@pytest.mark.parametrize("site", [s for s in sites() if s.text.strip("{} :()—")], ids=lambda s: s.key)
def test_a_message_is_one_line_and_ends_with_what_to_do(site: Site) -> None:
    """Fixed words alone: what is filled in may say it too, so a message of nothing else is looked at below."""
    line = shown(site)
    assert "\n" not in site.text and "Traceback" not in line and not line.endswith(" ")
    assert TO_DO.search(line) or site.text.rstrip(")").endswith((": {}", " — {}")), line


def test_messages_as_they_come_are_one_line_with_what_to_do(provoked: dict[str, str]) -> None:
    for key, line in provoked.items():
        assert "\n" not in line and "Traceback" not in line and TO_DO.search(line), f"{key}\n  {line}"
        assert not re.search(r"(?:Error|Exception)\(|object at 0x|^\[Errno", line), line


def test_what_helps_is_added_once() -> None:
    assert in_words(errors.FormatError("w: bad")).endswith(errors.FormatError.remedy)
    for text in ("w: bad — download it again", "w: bad: download it", "w: run `x`", "w: use --head"):
        assert in_words(errors.FormatError(text)) == text
    assert in_words(errors.UsageError("a\nb  c")) == "a b c" and in_words(OSError("x")) == "x"


def test_the_command_line_prints_that_line_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tinychat_mlx.apps.cli import main

    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    assert main(["run", "-m", str(tmp_path), "hi"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and TO_DO.search(lines[0])
