"""A model's memory is the same figure everywhere, and a model that does not fit is refused before loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import pytest
from checkout import DATA
from folders import quantised

from tinychat_mlx import inspect, memory_plan
from tinychat_mlx.apps.cli import main
from tinychat_mlx.apps.models import int4_plan
from tinychat_mlx.awq import resources, sizes
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.cpu.pack import pack
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base import limits
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.open import DEMO
from tinychat_mlx.weights.checkpoint import Checkpoint

DENSE = DATA / "demo-fp16"
NOTHING: Any = None


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's weights with a configured context of 64K tokens: 201 MB of keys and values."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("fit") / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)


def free(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    patch.setattr(limits, "memory_free", lambda mapped=0: round(nbytes / limits.SYSTEM_SHARE) + 1)


def test_the_usual_context_shrinks_aloud_where_it_does_not_fit(
    long: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    takes = memory_plan.cost(inspect.local("long", long), CpuBackend(threads=1))
    run = ["run", "-m", str(long), "--backend", "cpu", "--threads", "1", "--max-tokens", "1", "--json", "hi"]
    free(monkeypatch, takes.peak(8192))
    assert main(run) == 0
    out, err = capfd.readouterr()
    assert err == "" and "context_max" in out and json.loads(out)["context_max"] == 8192
    free(monkeypatch, takes.peak(5000))
    assert main(run) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["context_max"] == 5000
    assert "using a context of 5,000 tokens: 8,192 needs" in err and "MB of memory, " in err


def test_a_context_that_was_asked_for_is_refused_with_one_that_fits(
    long: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    takes = memory_plan.cost(inspect.local("long", long), CpuBackend(threads=1))
    run = [
        "run",
        "-m",
        str(long),
        "--backend",
        "cpu",
        "--threads",
        "1",
        "--max-tokens",
        "1",
        "hi",
        "--context",
    ]
    free(monkeypatch, takes.peak(5000))
    assert main([*run, "6000"]) == 1
    err = capfd.readouterr().err
    assert "with a context of 6,000 tokens" in err and "use --context 4922" in err
    assert main([*run, "5000"]) == 0
    free(monkeypatch, takes.peak(100))
    assert main(run[:-1]) == 1  # too few for a conversation, so not even that is offered
    err = capfd.readouterr().err
    assert "--context" not in err and "close other programs" in err
    assert main([*run, "90"]) == 0  # an explicit small value is accepted


def test_the_chosen_backend_is_what_counts(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 MB in the cpu backend take more than twice as much in float32."""
    found, said = inspect.local("long", long), []
    cpu, reference = CpuBackend(threads=1), ReferenceBackend()
    free(monkeypatch, memory_plan.cost(found, cpu).peak(8192))
    assert memory_plan.context_for(found, cpu, None, said.append) is None and not said
    with pytest.raises(BackendError, match=r"on the reference backend with a context of 8,192 tokens"):
        memory_plan.context_for(found, reference, 8192, said.append)
    assert memory_plan.context_for(found, CpuBackend(threads=1, kv="fp32"), None, said.append) < 8192  # type: ignore[operator]
    assert len(said) == 1


def test_a_model_about_to_go_makes_room(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cpu = inspect.local("long", long), CpuBackend(threads=1)
    free(monkeypatch, memory_plan.cost(found, cpu).peak(600) - (100 << 20))
    assert not memory_plan.fits(found, cpu, None) and memory_plan.fits(found, cpu, None, freed=100 << 20)
    with pytest.raises(BackendError):
        memory_plan.context_for(found, cpu, None, print)
    assert memory_plan.context_for(found, cpu, None, lambda text: None, freed=100 << 20) == 600


@pytest.mark.parametrize("layout", sorted(layouts.WRITERS))
def test_every_layout_takes_what_packing_takes(tmp_path: Path, layout: str) -> None:
    """Compared with the bytes that the cpu backend allocates; AWQ's products of scale and zero need float32."""
    config = json.loads((DEMO / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    folder = quantised(tmp_path / layout, layout, 64)
    block = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | block))
    cpu, checkpoint = CpuBackend(threads=1), Checkpoint.open(folder)
    (part,) = (p for p in inspect.local(layout, folder).parts if p.form == "int4 g64")
    weights = [checkpoint.weight(module) for module in checkpoint.modules]
    packed = sum(pack(w, cpu._arena, cpu.engine.run_one, False).data.size for w in weights)
    assert memory_plan._held(part, cpu) == pytest.approx(packed, rel=0.02)


def test_what_convert_writes_is_foreseen(tmp_path: Path) -> None:
    """For a dense model: the files' bytes, the form of each part, and the backends' memory."""
    dense, settings = inspect.local("dense", DENSE), Settings(method="rtn")
    convert(Checkpoint.open(DENSE), tmp_path / "int4", settings, NOTHING, NOTHING)
    foreseen, made = int4_plan.as_int4(dense, settings), inspect.local("int4", tmp_path / "int4")
    assert foreseen.nbytes == made.nbytes
    rows = lambda f: sorted((p.name, p.form, p.parameters, p.nbytes) for p in f.parts)
    assert rows(foreseen) == rows(made)
    config = parse_config(Checkpoint.open(DENSE).config)
    written = resources.result_bytes(config, Checkpoint.open(DENSE), settings.resolved(config))
    assert written == pytest.approx(made.nbytes, rel=0.01)
    for backend in (CpuBackend(threads=1), ReferenceBackend()):
        assert memory_plan.cost(foreseen, backend).weights == memory_plan.cost(made, backend).weights


def test_a_shape_takes_what_the_model_of_that_shape_takes() -> None:
    found = inspect.local("demo", DEMO)
    assert found.config is not None
    shape = int4_plan.of_shape("demo", found.config, True, "int8")
    cpu = CpuBackend(threads=1)
    vectors = next(p for p in found.parts if p.name == "norms and biases")
    assert (
        memory_plan.cost(shape, cpu).weights == memory_plan.cost(found, cpu).weights - 4 * vectors.parameters
    )


def test_measuring_two_models_looks_at_memory_too(
    long: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 20_000_000)
    text = str(DATA / "demo_heldout_text.jsonl")
    assert main(["eval", "-m", str(long), "--text", text, "--max-tokens", "64"]) == 1
    assert "20.0 MB is free" in capfd.readouterr().err


# conversions -------------------------------------------------------------------------------------------
def test_a_conversion_without_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(Checkpoint.open(DENSE).config)
    wanted = resources.needs(config, Checkpoint.open(DENSE), Settings(method="rtn").resolved(config))
    command = ["convert", str(DENSE), "-o", str(tmp_path / "out"), "--method", "rtn", "--threads", "1"]
    free(monkeypatch, wanted.peak_bytes - 1_000_000)
    assert main(command) == 1
    err = capfd.readouterr().err
    assert "the conversion needs" in err and "--force" in err and not list(tmp_path.iterdir())
    assert main([*command, "--dry-run"]) == 0
    assert "lacks   the conversion needs" in capfd.readouterr().out
    assert main([*command, "--dry-run", "--json"]) == 0
    assert "the conversion needs" in json.loads(capfd.readouterr().out)["lacks"]
    assert main([*command, "--force"]) == 0 and (tmp_path / "out" / "config.json").exists()
    free(monkeypatch, wanted.peak_bytes + 1_000_000)
    shutil.rmtree(tmp_path / "out")
    assert main(command) == 0


def test_a_conversion_without_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = lambda path: type("Usage", (), {"free": 1_000_000, "total": 2_000_000})
    monkeypatch.setattr("shutil.disk_usage", usage)
    command = ["convert", str(DENSE), "-o", str(tmp_path / "out"), "--method", "rtn", "--threads", "1"]
    assert main(command) == 1
    err = capfd.readouterr().err
    assert "more on the disk of" in err and "1.0 MB free" in err and not list(tmp_path.iterdir())
    small = ["convert", str(DEMO), "-o", str(tmp_path / "gemm"), "--format", "awq"]
    assert main(small) == 1
    assert "1.0 MB free" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_of_text_is_named_where_writing_it_takes_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--calib self` the peak is the whole model at 8 bits, if the model has many layers."""
    source = Checkpoint.open(DENSE)
    config = parse_config(source.config)
    deep = replace(config, num_hidden_layers=4000, window=config.window * 1000)
    monkeypatch.setattr(sizes, "kinds", lambda config: {0: config.num_hidden_layers})
    assert "--calib FILE" in resources.smaller(deep, source, Settings(group_size=128))
    assert not resources.smaller(deep, source, Settings(group_size=128, calib="text.txt"))
    assert not resources.smaller(deep, source, Settings(group_size=128, method="rtn"))


def test_what_is_int4_already_is_not_converted_to_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "demo", "-o", str(tmp_path / "x")]) == 2
    err = capfd.readouterr().err
    assert "this model is int4 g128 already" in err and "--format awq" in err and not list(tmp_path.iterdir())
