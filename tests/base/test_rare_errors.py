"""Errors that need a broken library, device or disk, each provoked with a stand-in.

The messages of all other errors come from the command line in test_messages.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

from tinychat_mlx import hub, mlx_lm_engine, open
from tinychat_mlx.apps.bench import gguf_file, llamacpp, mac, torchlinear
from tinychat_mlx.apps.bench.shapes import SHAPES
from tinychat_mlx.apps.chat import attach
from tinychat_mlx.apps.models.remove import remove
from tinychat_mlx.awq.calibration import dataset, selftext
from tinychat_mlx.awq.quality import versus
from tinychat_mlx.awq.settings import Settings, open_dense
from tinychat_mlx.backends.cpu import native_abi as native
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base import backend_names, json_file
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.model import rope
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Loader
from tinychat_mlx.weights import safetensors
from tinychat_mlx.weights.formats.stored import Stored
from tinychat_mlx.weights.safetensors import TensorFile
from tinychat_mlx.weights.weight import Dense, Packed

Patch = pytest.MonkeyPatch
Case = Callable[[Path, Patch], object]


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def absent(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")


def broken(*_: Any, **__: Any) -> Any:
    raise OSError(5, "Input/output error", "x")


def answers(what: str, answer: Any, call: Callable[[], object]) -> Case:
    """Make the call while the hub answers like this."""

    def case(tmp: Path, patch: Patch) -> object:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(f"huggingface_hub.HfApi.{what}", answer)
        return call()

    return case


def refuses(name: str) -> Callable[..., Any]:
    """Return a method of the hub's client that raises an error of huggingface_hub."""

    def answer(*_: Any, **__: Any) -> Any:
        from huggingface_hub import errors

        kind = getattr(errors, name)
        raise kind.__new__(kind)

    return answer


def weights(tmp: Path) -> TensorFile:
    safetensors.write(tmp / "w.safetensors", [safetensors.entry("a", np.ones(4, np.float32))], {})
    return TensorFile(tmp / "w.safetensors")


def other_library(tmp: Path, patch: Patch) -> object:
    patch.setattr(native, "_SIZES", {native.LINEAR: native.MapOp})
    return native.open_library.__wrapped__()


def damaged_library(tmp: Path, patch: Patch) -> object:
    patch.setattr(native, "find_library", lambda: written(tmp / "tinychat_cpu.so", b"no library"))
    return native.open_library.__wrapped__()


def unlike_experts(tmp: Path, patch: Patch) -> object:
    """Gate in float16, up in float32."""
    shape = parse_config(SHAPES["tiny"] | {
        "model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 64,
    })  # fmt: skip
    forms = {"gate": np.float16, "up": np.float32}
    of = lambda name, _: Dense(name, np.zeros((64, 256), forms["gate" if "gate" in name else "up"]))
    return list(Loader(shape, SimpleNamespace(weight=of), ReferenceBackend()).experts(0))


def llama(patch: Patch, **given: int) -> Any:
    """Return our llama.cpp driver with a library that returns these values; everything else works."""
    found = {"model": 1, "context": 1, "decode": 0} | given
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
    if "decode" not in given:
        llamacpp.Subject.__init__(made, path="x", pp=1, tg=1, depth=0, threads=1, repack=True, vocabulary=9)
    made.lib, made.context = Library(), 1
    return made


def mlx_part(name: str) -> Any:
    return import_module(f"tinychat_mlx.backends.mlx.{name}")


def one_gpu(tmp: Path, patch: Patch) -> object:
    """A torch with CUDA on a machine with one device, with the eighth requested."""
    patch.setattr("torch.version.cuda", "12.6")
    patch.setattr("torch.cuda.init", lambda: None)
    patch.setattr("torch.cuda.device_count", lambda: 1)
    patch.setenv("TINYCHAT_CUDA_DEVICE", "7")
    return import_module("tinychat_mlx.backends.cuda.device").find()


def cache_type(tmp: Path, patch: Patch) -> object:
    patch.setenv("TINYCHAT_CUDA_DEVICE", "cpu")
    patch.setenv("TINYCHAT_CUDA_KV", "fp4")
    return open.create("cuda", False, None)


def sizes(inner: int, **settings: Any) -> Case:
    source = SimpleNamespace(config=SHAPES["tiny"] | {"intermediate_size": inner}, folder="x")
    return lambda tmp, patch: open_dense(source, Settings(**settings))  # type: ignore[arg-type]


NO_COMMIT = lambda *a, **k: SimpleNamespace(sha="nonsense", siblings=[], tags=[])
ONE_FILE = lambda *a, **k: SimpleNamespace(
    sha="0" * 40, siblings=[SimpleNamespace(rfilename="a.bin", size=1)]
)
REF = hub.Ref("org/model")

CASES: dict[str, Case] = {
    "attached file too large": lambda tmp, patch: (
        patch.setattr(attach, "MOST_BYTES", 2), attach.read(str(written(tmp / "x", "abc")))),
    "attached file unreadable": lambda tmp, patch: (
        patch.setattr(Path, "is_file", broken), attach.read(str(tmp / "x"))),
    "model folder cannot be removed": lambda tmp, patch: (
        patch.setenv("HF_HUB_CACHE", str(tmp)), (tmp / "models--org--model").mkdir(),
        patch.setattr("shutil.rmtree", broken), remove("org/model", True)),
    "no such revision installed": lambda tmp, patch: (
        patch.setenv("HF_HUB_CACHE", str(tmp)), remove("org/none@v1", True)),
    "hub without a commit": answers("model_info", NO_COMMIT, lambda: hub.look(REF)),
    "dataset gated": answers("dataset_info", refuses("GatedRepoError"), lambda: dataset.fetch("org/data", 10)),
    "dataset absent": answers("dataset_info", refuses("RepositoryNotFoundError"), lambda: dataset.fetch("org/data", 10)),
    "dataset without text": answers("dataset_info", ONE_FILE, lambda: dataset.fetch("org/data", 10)),
    "dataset without this file": answers("dataset_info", ONE_FILE, lambda: dataset.fetch("org/data:none.txt", 10)),
    "library of a backend absent": lambda tmp, patch: (
        patch.setitem(backend_names.BACKENDS, "cpu", ("no_such_module", "X")), open.create("cpu", False, None)),
    "mlx-lm config not JSON": lambda tmp, patch: json_file.read_optional(written(tmp / "x.json", "{")),
    "mlx-lm config a list": lambda tmp, patch: json_file.read_optional(written(tmp / "x.json", "[]")),
    "no rope_theta": lambda tmp, patch: rope.rope_table({}, 64, None),
    "tensor absent": lambda tmp, patch: weights(tmp).info("b"),
    "weights are a folder": lambda tmp, patch: TensorFile(tmp),
    "weights cannot be mapped": lambda tmp, patch: (
        weights(tmp), patch.setattr("mmap.mmap", broken), TensorFile(tmp / "w.safetensors")),
    "weights cannot be written": lambda tmp, patch: (patch.setattr("os.replace", broken), weights(tmp)),
    "vector of another shape": lambda tmp, patch: Loader.vector(
        SimpleNamespace(source=SimpleNamespace(vector=lambda name: np.zeros(2))), "norm", 3),  # type: ignore[arg-type]
    "experts of two forms": unlike_experts,
    "groups of 48": lambda tmp, patch: Stored(SimpleNamespace(where=str), "a").packed(*[None] * 3, 4, 48),  # type: ignore
    "logits not finite": lambda tmp, patch: selftext.sampled(
        np.full((1, 4), np.nan, np.float32), np.random.default_rng(0)),
    "inputs not a multiple of the group": sizes(100, group_size=32),
    "comparison without mlx-lm": lambda tmp, patch: (
        patch.setattr(versus, "import_module", absent), versus.mlx_lm_awq(tmp, tmp, None, 1, Settings())),  # type: ignore
    "comparison of too little text": lambda tmp, patch: versus.compare(
        SimpleNamespace(window=64, text=lambda *a: (np.zeros(9), 0, 1)), Settings()),  # type: ignore[arg-type]
    "native library absent": lambda tmp, patch: (
        patch.setattr(native.tinychat_mlx, "__path__", [str(tmp)]), native.find_library()),
    "native library damaged": damaged_library,
    "native library of another version": other_library,
    "native memory": lambda tmp, patch: CpuBackend(threads=1).engine._check(2),
    "gguf absent": lambda tmp, patch: gguf_file.library("no_such_program"),
    "gguf of another family": lambda tmp, patch: (
        patch.setattr(gguf_file, "library", print), gguf_file.write(tmp / "x", {"model_type": "x"}, "Q4_0")),
    "llama.cpp: model": lambda tmp, patch: llama(patch, model=0),
    "llama.cpp: context": lambda tmp, patch: llama(patch, context=0),
    "llama.cpp: decode": lambda tmp, patch: llama(patch, decode=1)._feed(0, 1),
    "bench --kernels without mlx": lambda tmp, patch: (
        patch.setitem(sys.modules, "tinychat_mlx.backends.mlx", None), mac.kernels(None, print)),  # type: ignore
    "torch absent": lambda tmp, patch: (
        patch.setattr(torchlinear, "import_module", absent), torchlinear.Subject(linears=[], layers=1, threads=1)),
    "torch without int4": lambda tmp, patch: torchlinear.Subject._int4(
        SimpleNamespace(torch=SimpleNamespace(ops=SimpleNamespace(aten=None), __version__="0")), 1, 1),  # type: ignore
    "torch: no such GPU": one_gpu,
    "torch: cache type": cache_type,
    "mlx absent": lambda tmp, patch: (
        patch.setitem(sys.modules, "mlx.core", None), run_path(str(ROOT / "backends" / "mlx" / "device.py"))),
    "mlx: unknown kernel": lambda tmp, patch: mlx_part("kernel_selection").choice("magic", True, "M1"),
    "mlx: config is a list": lambda tmp, patch: mlx_lm_engine.read_config(written(tmp / "config.json", "[]").parent),
    "mlx: weights of 7 bits": lambda tmp, patch: mlx_part("weights").arrays_of(
        [Packed("w", np.zeros((1, 14), np.uint32), np.ones((1, 1)), np.ones((1, 1)), 7, 64)], None, False),
    "mlx: vocabulary": lambda tmp, patch: (
        patch.setattr(mlx_part("mlx_lm_decoder"), "load_model", print),
        mlx_part("mlx_lm_decoder").MlxLmDecoder(tmp, {"vocab_size": "many"})),
    "mlx: mlx-lm absent": lambda tmp, patch: (
        patch.setitem(sys.modules, "mlx_lm", None), mlx_part("mlx_lm_decoder").load_model(tmp)),
    "mlx: mlx-lm too old": lambda tmp, patch: (
        patch.setattr("mlx_lm.__version__", "0.9"), mlx_part("mlx_lm_decoder").load_model(tmp)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_an_error_with_a_remedy(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    library = {"mlx": "mlx", "torch": "torch"}.get(name.partition(":")[0])
    if library and find_spec(library) is None:
        pytest.skip(f"{library}, one of the test extras, is not installed")
    with pytest.raises(TinychatError) as caught:
        CASES[name](tmp_path, monkeypatch)
    error = caught.value
    assert error.what and error.remedy and "\n" not in str(error) and "[Errno" not in error.what
