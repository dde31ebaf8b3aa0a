"""`tinychat models`, and a chat from a hub id in one step: facts are correct, nothing runs unasked."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import layouts
import numpy as np
import pytest
from checkout import DATA
from hub_client import Client
from stand_in_hub import Hub
from tiny_dense import save

from tinychat_mlx import hub as hubs
from tinychat_mlx import inspect, memory_plan
from tinychat_mlx.apps.bench.ours import layer_weights
from tinychat_mlx.apps.bench.shapes import SHAPES
from tinychat_mlx.apps.cli import main
from tinychat_mlx.apps.config_file import settings
from tinychat_mlx.apps.models import int4_plan, prepare
from tinychat_mlx.apps.models.recommended import recommended, with_fit
from tinychat_mlx.awq.output.tensors import rounded_rows
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base import limits, paths
from tinychat_mlx.base.errors import BackendError, ConfigError, UsageError
from tinychat_mlx.base.wording import size
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.open import DEMO, load
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats.mlx import mlx_entries
from tinychat_mlx.weights.safetensors import entry, write
from tinychat_mlx.weights.weight import Dense

COMMIT = "0123456789" * 4
DENSE = DATA / "demo-fp16"

pytestmark = pytest.mark.usefixtures("accepted")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    shutil.copytree(DEMO, tmp_path / "root" / "models" / "org" / "model")
    save(tmp_path / "root" / "models" / "org" / "dense")
    with Hub(tmp_path / "root") as hub:
        yield Client(hub, tmp_path / "home")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the dense model org/dense in its cache. The hub is not contacted."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TINYCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(paths, "conversions", lambda: tmp_path / "models")
    monkeypatch.setattr(prepare, "_left_dense", set())
    put(tmp_path / "hub", "org/dense", save)
    return tmp_path


def put(cache: Path, repo: str, write: Callable[[Path], Any], commit: str = COMMIT) -> Path:
    """Put a model into a cache in the layout of the hub's library."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir(exist_ok=True)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write(snapshot)
    for file in list(snapshot.iterdir()):
        blob = folder / "blobs" / f"{commit[:8]}-{file.name}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def options(**given: Any) -> dict[str, Any]:
    return {
        "model": "org/dense",
        "backend": "reference",
        "engine": "tinychat",
        "convert": "ask",
        "threads": 1,
    } | given


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulate a user at a terminal who presses these keys. Conversions are quick."""
    keys: list[str] = []
    monkeypatch.setattr(prepare, "detect", lambda: type("Terminal", (), {"interactive": True}))
    monkeypatch.setattr(prepare.click, "getchar", lambda: keys.pop(0))
    quick = prepare.int4_settings
    monkeypatch.setattr(prepare, "int4_settings", lambda found: _quick(quick(found)))
    return keys


def _quick(chosen: Settings | None) -> Settings | None:
    return replace(chosen, method="rtn") if chosen else None


# displayed facts ----------------------------------------------------------------------------------------
def test_facts_count_what_numpy_counts() -> None:
    """Parameters and bytes of every part, compared with the arrays."""
    found, checkpoint = inspect.local("demo", DEMO), Checkpoint.open(DEMO)
    config = parse_config(checkpoint.config)
    matrices = {m: checkpoint.weight(m) for m in checkpoint.modules}
    vectors = [n for n in checkpoint.names() if n in checkpoint and len(checkpoint.info(n)[1]) == 1]
    total = sum(w.to_float32().size for w in matrices.values()) + sum(
        checkpoint.vector(n).size for n in vectors
    )
    assert found.parameters == total and found.nbytes == checkpoint.nbytes
    parts = {p.name: p for p in found.parts}
    assert parts["embedding and head"].form == "int8 g128" and parts["layers"].form == "int4 g128"
    assert parts["embedding and head"].parameters == config.vocab_size * config.hidden_size
    assert sum(p.nbytes for p in found.parts) == checkpoint.nbytes
    model = load("demo", backend="reference", context=100)
    cache: Any = model.engine.decoder.new_cache(100)
    assert found.kv_bytes(4) * 100 == cache.k.nbytes + cache.v.nbytes
    assert found.context == config.max_position_embeddings and found.template and not found.trouble


@pytest.mark.parametrize("layout", sorted(layouts.WRITERS))
def test_facts_read_every_layout(tmp_path: Path, layout: str) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    folder = folders.quantised(tmp_path / layout, layout, 64)
    block = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | block))
    parts = {p.name: p for p in inspect.local(layout, folder).parts if p.form == "int4 g64"}
    assert parts["layers"].parameters == 64 * 128 and parts["layers"].tensors == 1


def test_a_model_on_the_hub_is_described_from_its_headers_alone(client: Client) -> None:
    far = client.run("models", "show", "org/model", "--json")
    assert far.returncode == 0, far.stderr
    assert client.hub.sent < 200_000 and not list(client.cache.glob("models--*/blobs/*"))
    client.run("models", "pull", "org/model")
    near = client.run("models", "show", "org/model", "--json")
    tables = [json.loads(done.stdout) for done in (far, near)]
    changing = ("folder", "fits", "licence")
    assert next({k: v for k, v in t.items() if k not in changing} for t in tables) == {
        k: v for k, v in tables[1].items() if k not in changing
    }
    assert {r["backend"] for r in tables[0]["fits"] if not r["trouble"]} >= {"cpu", "reference"}
    shown = client.run("models", "show", "org/model").stdout
    assert "int8 g128" in shown and "temperature 0.5" in shown and "(built in)" in shown


def mixed(folder: Path) -> Path:
    """The dense demo in 4 bits, except for v_proj in the first two layers and down_proj in all, which have 8."""
    source = Checkpoint.open(DENSE)
    config, tensors = parse_config(source.config), []
    wide: dict[str, Any] = {}
    for name in sorted(n for n in source.names() if n in source):
        module = name.removesuffix(".weight")
        if len(source.info(name)[1]) == 1:
            tensors.append(entry(name, source.vector(name).astype(np.float16)))
            continue
        eight = module.endswith(("down_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"))
        wide |= {module: {"bits": 8, "group_size": 64}} if eight else {}
        weight = source.weight(module)
        assert isinstance(weight, Dense)
        tensors += mlx_entries(rounded_rows(weight, 8 if eight else 4, 64))
    folder.mkdir()
    write(folder / "model.safetensors", tensors)
    block = {"bits": 4, "group_size": 64, **wide}
    (folder / "config.json").write_text(json.dumps(source.config | {"quantization": block}))
    assert config.num_hidden_layers == 6
    return folder


def test_projections_in_another_form_have_rows_of_their_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(mixed(tmp_path / "mixed"))
    assert main(["models", "show", folder, "--json", "--modules"]) == 0
    told = json.loads(capfd.readouterr().out)
    rows = {(p["name"], p["form"]): p["tensors"] for p in told["parts"] if p["name"].startswith("layers")}
    assert rows == {("layers", "int4 g64"): 30, ("layers: self_attn.v_proj", "int8 g64"): 2,
                    ("layers: self_attn.v_proj", "int4 g64"): 4, ("layers: mlp.down_proj", "int8 g64"): 6}  # fmt: skip
    forms = {m["name"]: m["form"] for m in told["modules"]}
    assert forms["model.layers.1.self_attn.v_proj"] == forms["model.layers.5.mlp.down_proj"] == "int8 g64"
    assert forms["model.layers.2.self_attn.v_proj"] == "int4 g64" and len(forms) == 43 + 13
    assert sum(m["nbytes"] for m in told["modules"]) == told["bytes"]
    assert main(["models", "show", folder, "--modules"]) == 0
    shown = capfd.readouterr().out
    assert "layers: mlp.down_proj" in shown and "model.layers.1.self_attn.v_proj" in shown
    assert main(["models", "show", folder]) == 0
    assert "model.layers.1" not in capfd.readouterr().out


def test_a_dense_model_is_shown_as_int4_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", str(DENSE), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    int4 = int4_plan.as_int4(inspect.local("dense", DENSE), Settings())
    assert told["as_int4"]["bytes"] == int4.nbytes < 0.4 * told["bytes"]
    weights = {r["backend"]: r["weights"] for r in told["as_int4"]["fits"]}
    assert weights["cpu"] == memory_plan.cost(int4, CpuBackend(threads=1)).weights
    assert main(["models", "show", str(DENSE)]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"^as int4 +3\.3 MB: `tinychat convert ", shown, re.MULTILINE) and "cpu as int4" in shown
    assert main(["models", "show", "demo", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["as_int4"] is None


@pytest.mark.parametrize("name", ["dense", "my model's", "."])
def test_the_command_that_is_shown_converts_as_it_is_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a shell, for a model that groups of 128 do not fit."""
    source = save(tmp_path / ("here" if name == "." else name))
    monkeypatch.chdir(source if name == "." else tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["models", "show", name if name == "." else f"./{name}"]) == 0
    shown = capfd.readouterr().out
    command = re.search(r"^as int4 .*: `(tinychat convert .*)`$", shown, re.MULTILINE)
    assert command, shown
    program, *args = shlex.split(command[1])
    assert program == "tinychat" and main([*args, "--method", "rtn"]) == 0
    made = inspect.local("made", tmp_path / f"{source.name}-int4")
    assert (
        re.search(rf"^as int4 +{size(made.nbytes)}:", shown, re.MULTILINE) and made.quantization == "int4 g64"
    )


def test_what_is_not_downloaded_is_to_download(client: Client) -> None:
    far = client.run("models", "show", "org/dense").stdout
    assert " to download" in far and " on disk" not in far and "`tinychat chat -m org/dense` offers" in far
    client.run("models", "pull", "org/dense")
    near = client.run("models", "show", "org/dense").stdout
    assert " on disk" in near and " to download" not in near


QUICK = """
from dataclasses import replace
from tinychat_mlx.apps.models import prepare as opening
best = opening.int4_settings
opening.int4_settings = lambda found: replace(best(found), method="rtn")
"""


def test_every_name_that_is_listed_can_be_chatted_with(client: Client) -> None:
    """This includes a conversion by its name, which is not a hub id."""
    run = ("--max-tokens", "1", "--temperature", "0", "w1")
    client.run("models", "pull", "org/model")
    made = client.run("run", "-m", "org/dense", "--convert", "always", *run, more=QUICK)
    assert made.returncode == 0, made.stderr
    listed = json.loads(client.run("models", "list", "--json").stdout)
    names = [r["name"] for r in listed]
    assert names == ["demo", "org--dense-int4", "org/dense", "org/model"] and all(r["runs"] for r in listed)
    for name in names:
        done = client.run("run", "-m", name, "-v", *run, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, (name, done.stderr)
        shown = client.run("models", "show", name, "--json", HF_HUB_OFFLINE="1")
        assert json.loads(shown.stdout)["runs"], (name, shown.stderr)
    assert client.run("models", "rm", "org--dense-int4", "--yes").returncode == 0
    assert "no such folder" in client.refused("run", "-m", "org--dense-int4", "w1")


def test_help_says_whole_sentences(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models", "--help"]) == 0
    rows = capfd.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(rows) == 4 and all(row.endswith(".") and not row.endswith("...") for row in rows)


def test_a_model_that_cannot_run_says_why_and_is_not_fetched(client: Client) -> None:
    config = client.hub.root / "models" / "org" / "dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba2"}))
    shown = client.run("models", "show", "org/dense").stdout
    assert "runs here" in shown and "mamba2" in shown
    line = client.refused("run", "-m", "org/dense", "hi")
    assert "org/dense: this model cannot run here" in line and "mamba2" in line
    assert not any(path.endswith("tokenizer.json") for _, path, _ in client.hub.log)


def test_a_kind_of_numbers_that_is_not_read_is_no_damage(client: Client) -> None:
    """An FP8 upload: config.json gives a helpful error, and its size is still known."""
    folder = client.hub.root / "models" / "org" / "dense"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    rows = {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}
    header = json.dumps({"model.embed_tokens.weight": rows}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    shown = client.run("models", "show", "org/dense")
    assert shown.returncode == 0 and re.search(r"runs here +no: .*fp8", shown.stdout, re.IGNORECASE), shown
    assert re.search(r"weights +\d+ B to download", shown.stdout)
    assert "cannot run here: config.json" in client.refused("run", "-m", "org/dense", "w1")
    (folder / "config.json").write_text(json.dumps(config))
    line = client.refused("models", "show", "org/dense")
    assert "has dtype 'F8_E4M3'; tinychat reads" in line and "use another repository" in line


def test_the_list_tells_whole_from_half_and_what_runs(client: Client) -> None:
    client.run("models", "pull", "org/model")
    half = client.cache / "models--org--half" / "blobs"
    half.mkdir(parents=True)
    (half / "x.incomplete").write_bytes(bytes(1000))
    rows = {r["name"]: r for r in json.loads(client.run("models", "list", "--json").stdout)}
    assert set(rows) == {"demo", "org/model", "org/half"}
    assert rows["org/model"]["runs"] and rows["org/model"]["quantization"] == "int4 g128"
    assert rows["org/model"]["bytes"] >= (DEMO / "model.safetensors").stat().st_size
    assert not rows["org/half"]["runs"] and "pull org/half" in rows["org/half"]["why"]
    assert "org/half" in client.run("models", "list").stdout


def test_memory_decides_what_fits_and_at_which_context(monkeypatch: pytest.MonkeyPatch) -> None:
    found, cpu = inspect.local("demo", DEMO), CpuBackend(threads=1)
    takes = memory_plan.cost(found, cpu)
    for free, tokens in ((600, 600), (4000, 4000), (1 << 30, found.context), (100, 0)):
        room = takes.weights + takes.program + takes.running + free * found.kv_bytes()
        monkeypatch.setattr(limits, "available", lambda mapped=0, room=room: room)
        assert memory_plan.room(found, cpu).context == tokens
        assert takes.context(room, found.context) == tokens
        assert memory_plan.fits(found, cpu, None) == (tokens > 0)
    plain = memory_plan.cost(found, ReferenceBackend())
    vectors = next(p.parameters for p in found.parts if p.name == "norms and biases")
    assert plain.weights == 4 * found.parameters and takes.per_token == found.kv_bytes()
    # `convert` writes 4 bits per weight in the layers here and 16 per group of 128; 8 and 32 outside them.
    parts = {p.name: p.parameters for p in found.parts}
    assert takes.weights == parts["layers"] * 4.125 / 8 + parts["embedding and head"] * 8.25 / 8 + 4 * vectors


def test_recommended_models_are_of_the_sizes_that_they_say() -> None:
    """Compared with the shapes of `bench`, which are from the models' config.json."""
    rows = {r["id"]: r for r in recommended()}
    known = {"Qwen/Qwen2.5-0.5B-Instruct-AWQ": "qwen2.5-0.5b", "mlx-community/Llama-3.2-1B-Instruct-4bit": "llama-3.2-1b",
             "Qwen/Qwen3-4B-AWQ": "qwen3-4b", "Qwen/Qwen2.5-7B-Instruct-AWQ": "qwen2.5-7b", "Qwen/Qwen3-8B-AWQ": "qwen3-8b",
             "mlx-community/Llama-3.2-3B-Instruct-4bit": "llama-3.2-3b", "Qwen/Qwen3-0.6B": "qwen3-0.6b"}  # fmt: skip
    for name, shape in known.items():
        config = parse_config(SHAPES[shape])
        tables = 1 if SHAPES[shape]["tie_word_embeddings"] else 2
        weights = layer_weights(config) + tables * config.vocab_size * config.hidden_size
        assert rows[name]["parameters"] == pytest.approx(weights, rel=0.006)  # three digits
        kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        assert rows[name]["kv_bytes_per_token"] == kv
        bits = 8 * rows[name]["memory_bytes"] / weights
        assert 4.1 < bits < 8.5
    for row in rows.values():
        assert hubs.parse(row["id"]) and row["licence"] and row["good_for"]


def test_recommendations_follow_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fitting = [
        sum(with_fit(m, int(gb * 1e9))["fits_context"] > 0 for m in recommended()) for gb in (0.1, 1, 4, 64)
    ]
    assert fitting[0] == 0 < fitting[1] < fitting[2] < fitting[3] == len(recommended())


# removal ------------------------------------------------------------------------------------------------
def test_rm_asks_and_removes_what_it_names_and_nothing_else(client: Client) -> None:
    for name in ("org/model", "org/dense"):
        client.run("models", "pull", name)
    asked = client.run("models", "rm", "org/model")
    assert asked.returncode == 2 and "add --yes" in asked.stderr and "MB" in asked.stderr
    assert client.run("models", "rm", "org/model", "--yes").returncode == 0
    assert [p.name for p in client.cache.glob("models--*")] == ["models--org--dense"]
    assert "not installed" in client.refused("models", "rm", "org/model", "--yes")


@pytest.mark.parametrize("name", ["..", "../hub", "/etc", "a--b/../..", "demo", ".", "", "a\\b", "nodashes"])
def test_rm_cannot_leave_the_cache(home: Path, name: str) -> None:
    from tinychat_mlx.apps.models.remove import remove

    before = sorted(home.rglob("*"))
    with pytest.raises(UsageError):
        remove(name, yes=True)
    assert sorted(home.rglob("*")) == before


def test_rm_does_not_follow_a_link(home: Path) -> None:
    from tinychat_mlx.apps.models.remove import remove

    elsewhere = home / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("x")
    (home / "hub" / "models--org--linked").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a link"):
        remove("org/linked", yes=True)
    (home / "hub" / "models--org--dense" / "out").symlink_to(elsewhere)
    remove("org/dense", yes=True)
    assert (elsewhere / "file").exists() and not (home / "hub" / "models--org--dense").exists()


def test_rm_of_a_revision_keeps_the_others(home: Path) -> None:
    from tinychat_mlx.apps.models.remove import remove

    other = put(home / "hub", "org/dense", save, "abcdef" + COMMIT[6:])
    remove(f"org/dense@{COMMIT}", yes=True)
    assert other.is_dir() and hubs.is_whole(other) and not (other.parent / COMMIT).exists()


# from an id to a chat -----------------------------------------------------------------------------------
def test_an_int4_model_is_fetched_and_answers_in_one_step(client: Client) -> None:
    done = client.run("run", "-m", "org/model", "hi", "--max-tokens", "3", "--temperature", "0", "-v")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "org/model on cpu" in done.stderr and "int4 g128" in done.stderr
    assert "convert" not in done.stderr


def test_without_a_terminal_a_dense_model_runs_as_it_is_and_says_how_to_convert(client: Client) -> None:
    done = client.run("run", "-m", "org/dense", "w1 w2", "--max-tokens", "3")
    assert done.returncode == 0 and "--convert always" in done.stderr
    quiet = client.run("run", "-m", "org/dense", "w1 w2", "--max-tokens", "3", "--convert", "never")
    assert quiet.returncode == 0 and "--convert" not in quiet.stderr


def test_yes_converts_once_and_the_result_answers_to_the_same_id(home: Path, answers: list[str]) -> None:
    said: list[str] = []
    answers.append("y")
    folder = Path(prepare.settle(options(), said.append))
    assert folder == home / "models" / "org--dense-int4"
    text = " ".join(said)
    assert "instead of" in text and "of memory" in text and "of disk" in text and str(folder) in text
    found = inspect.local("x", folder)
    assert found.quantization == "int4 g64" and not found.dense
    assert prepare.settle(options(), said.append) == str(folder)  # no key is left to press
    assert (
        prepare.settle(options(model="org/dense@main"), said.append) == "org/dense@main"
    )  # the upload itself


def test_no_runs_it_as_it_is_and_does_not_ask_twice(home: Path, answers: list[str]) -> None:
    answers += ["x", "n"]  # a key without a meaning is ignored
    assert prepare.settle(options(), lambda text: None) == "org/dense"
    assert prepare.settle(options(), lambda text: None) == "org/dense"
    assert not (home / "models").exists() and not answers


def test_always_is_kept_in_the_config_file(home: Path, answers: list[str]) -> None:
    (home / "config.toml").write_text('temperature = 0.5\n[presets.a]\nmodel = "demo"\n')
    answers.append("a")
    prepare.settle(options(), lambda text: None)
    assert settings() == {"convert": "always", "temperature": 0.5}
    put(home / "hub", "org/second", save)
    assert prepare.settle(options(model="org/second", convert="always"), lambda text: None).endswith(
        "second-int4"
    )


def test_enter_means_yes_and_ctrl_d_nothing(home: Path, answers: list[str]) -> None:
    answers.append("\x04")
    with pytest.raises(KeyboardInterrupt):
        prepare.settle(options(), lambda text: None)
    assert not (home / "models").exists()
    answers.append("\r")
    assert prepare.settle(options(), lambda text: None).endswith("org--dense-int4")


def test_an_interrupted_conversion_goes_on(
    home: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinychat_mlx.awq.work_folder import LayerFiles

    written: list[Path] = []
    save_layer = LayerFiles.shard

    def shard(self: LayerFiles, layer: int) -> Path:
        written.append(save_layer(self, layer))
        if len(written) == 6:  # in the middle of the layers, once
            raise KeyboardInterrupt
        return written[-1]

    monkeypatch.setattr(LayerFiles, "shard", shard)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepare.settle(options(convert="always"), said.append)
    assert "stopped" in said[-1] and not (home / "models" / "org--dense-int4").exists()
    left = home / "models" / ".org--dense-int4.converting"
    assert list(left.glob("layer-*"))
    assert prepare.settle(options(convert="always"), said.append).endswith("org--dense-int4")
    assert (
        not left.exists()
        and inspect.local("x", home / "models" / "org--dense-int4").quantization == "int4 g64"
    )


def test_what_does_not_fit_is_refused_with_the_way_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_free", lambda mapped=0: 1000)
    with pytest.raises(BackendError, match=r"too little.*--convert always"):
        prepare.settle(options(), lambda text: None)


def test_a_conversion_that_has_no_room_is_not_offered(
    home: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(limits, "memory_free", lambda mapped=0: 20 << 20)
    assert prepare.settle(options(), said.append) == "org/dense"
    assert "the conversion needs 1" in said[-1] and "using the original" in said[-1]


def test_a_mixture_of_experts_is_offered_as_well(home: Path) -> None:
    found = inspect.local("org/dense", home / "hub" / "models--org--dense" / "snapshots" / COMMIT)
    assert prepare.int4_settings(found) is not None
    config = json.loads((Path(str(found.folder)) / "config.json").read_text())
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    settings = prepare.int4_settings(replace(found, config=parse_config(config | experts)))
    assert settings is not None and settings.method == "awq+"


def test_folders_and_the_demo_are_left_alone(home: Path, tmp_path: Path) -> None:
    for name in ("demo", str(save(tmp_path / "mine")), "no such id"):
        assert prepare.settle(options(model=name), pytest.fail) == name


def test_nonsense_in_generation_config_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ConfigError, match="temperature"):
        inspect.local("m", folder).sampling()
