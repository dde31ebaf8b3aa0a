"""The messages that users see, compared with tests/data/messages.txt.

A change of wording appears in the diff.

    WRITE_MESSAGES=1 pytest tests/base/test_messages.py    writes the file again

Each message comes from the command line ("exit 2: …") or from the public API ("UsageError: …"). Paths are
shortened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkout import DATA, ROOT

from tinychat_mlx.base.errors import TinychatError

GOLDEN = DATA / "messages.txt"
DENSE = DATA / "demo-fp16"
Patch = pytest.MonkeyPatch
Case = Callable[[Path, Patch], object]


# the cases ---------------------------------------------------------------------------------------------
def run(*arguments: str) -> Case:
    """Run `tinychat ARGUMENTS`, with {tmp} for an empty folder -> "exit CODE: message"."""

    def case(tmp: Path, patch: Patch) -> str:
        from tinychat_mlx.apps.cli import main

        printed: list[str] = []
        patch.setattr("sys.stdin", None)
        patch.setattr("click.echo", lambda text="", **_: printed.append(str(text)))
        code = main([a.replace("{tmp}", str(tmp)) for a in arguments])
        assert code and printed, arguments
        return f"exit {code}: {printed[-1].removeprefix('error: ')}"

    return case


def written(files: dict[str, str | bytes], case: Case) -> Case:
    """Run the case after writing these files into {tmp}."""

    def prepared(tmp: Path, patch: Patch) -> object:
        for name, data in files.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return case(tmp, patch)

    return prepared


def config(*remove: str, **values: Any) -> str:
    """Return a small Llama's config.json with these values."""
    from tinychat_mlx.apps.bench.shapes import SHAPES

    return json.dumps({k: v for k, v in (SHAPES["tiny"] | values).items() if k not in remove})


def model(**files: str | bytes) -> Case:
    """Run `tinychat run` with a model folder of these files; _ stands for a dot."""
    named = {f"m/{name.replace('__', '.')}": data for name, data in files.items()}
    return written(named, run("run", "--backend", "reference", "-m", "{tmp}/m", "hi"))


def configured(**values: Any) -> Case:
    """Run `tinychat run` with these values in config.json, and weights without a tensor."""
    return model(config__json=config(**values), model__safetensors=b"\x08" + bytes(7) + b"{}      ")


def demo(*arguments: str, change: Callable[[Path], object]) -> Case:
    """Run `tinychat ARGUMENTS` with a changed copy of the fp16 demo model in {tmp}/m."""

    def case(tmp: Path, patch: Patch) -> object:
        change(Path(shutil.copytree(DENSE, tmp / "m")))
        return run(*arguments)(tmp, patch)

    return case


def env(name: str, value: str, case: Case) -> Case:
    def prepared(tmp: Path, patch: Patch) -> object:
        patch.setenv(name, value.replace("{tmp}", str(tmp)))
        return case(tmp, patch)

    return prepared


def little(what: str, case: Case) -> Case:
    """Run the case on a machine with one byte free of this resource."""

    def prepared(tmp: Path, patch: Patch) -> object:
        patch.setattr(f"tinychat_mlx.base.limits.{what}", lambda *_, **__: 1)
        return case(tmp, patch)

    return prepared


def command(module: str, name: str, *arguments: str, messages: tuple[str, ...] = ()) -> Case:
    """Run a slash command in a chat with these messages, alternating between user and assistant."""

    def case(tmp: Path, patch: Patch) -> object:
        from tinychat_mlx.apps.chat.session import Session

        roles = ("user", "assistant")
        said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        view = SimpleNamespace(terminal=SimpleNamespace(live=False), note=print, say=print)
        chat = SimpleNamespace(
            session=Session(messages=said), data=tmp, load=None, view=view, settings=SimpleNamespace()
        )
        commands = __import__(f"tinychat_mlx.apps.chat.commands.{module}", fromlist=[name])
        return getattr(commands, name)(chat, *(a.replace("{tmp}", str(tmp)) for a in arguments))

    return case


def hub(name: str, status: int = 0) -> Case:
    """Return the message for an error of huggingface_hub."""

    def case(tmp: Path, patch: Patch) -> object:
        from huggingface_hub import errors as theirs

        from tinychat_mlx.hub import Ref, http

        patch.setattr("huggingface_hub.get_token", lambda: None)
        kind = getattr(theirs, name)
        error = kind.__new__(kind)
        error.response = SimpleNamespace(status_code=status, headers={})
        raise http.explain(error, Ref("org/model"))

    return case


def api(call: Callable[[], object]) -> Case:
    return lambda tmp, patch: call()


def load(**options: Any) -> Any:
    from tinychat_mlx import load

    return load("demo", **({"backend": "reference"} | options))


def sampling(**values: Any) -> Any:
    from tinychat_mlx.engine.sampler import SamplingParams

    return SamplingParams().updated(**values)


def dataset(name: str) -> object:
    from tinychat_mlx.awq.calibration.dataset import fetch

    return fetch(name, 10)


def saved(path: Path) -> object:
    from tinychat_mlx.apps.chat.session import Session

    return Session.load(path)


def render(template: str, messages: list[dict[str, str]]) -> object:
    from tinychat_mlx.text.chat_template import ChatTemplate

    return ChatTemplate({"default": template}, "chat_template.jinja", {}).render(messages)


# damaged models ----------------------------------------------------------------------------------------
def put(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Write a file of the model's folder."""
    return lambda m: (m / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(name: str) -> Callable[[Path], object]:
    """Remove the second half of a file."""
    return lambda m: (m / name).write_bytes((m / name).read_bytes()[: (m / name).stat().st_size // 2])


def nan(m: Path) -> None:
    """Replace the first number of a weight with NaN."""
    from tinychat_mlx.weights.safetensors import TensorFile, entries, entry, write

    file = TensorFile(m / "model.safetensors")
    bad = file.read("model.norm.weight").copy()
    bad[0] = np.nan if bad.dtype != np.uint16 else 0x7FC0
    dtype = file.info("model.norm.weight")[0]
    rest = [e for e in entries(file) if e.name != "model.norm.weight"]
    write(m / "new", [*rest, entry("model.norm.weight", bad, dtype)])
    os.replace(m / "new", m / "model.safetensors")


HELP = "{tmp}/m", "-o", "{tmp}/out"
INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
)

CASES: dict[str, Case] = {
    # model names
    "run: no such folder": run("run", "-m", "{tmp}/none", "hi"),
    "run: a folder without config.json": run("run", "-m", "{tmp}", "hi"),
    "run: a file as a model": written({"x": ""}, run("run", "-m", "{tmp}/x", "hi")),
    "run: neither a path nor an id": run("run", "-m", "a b", "hi"),
    "run: offline": env("HF_HUB_OFFLINE", "1", run("run", "-m", "org/model", "hi")),
    # config.json
    "config.json: not JSON": model(config__json="{"),
    "config.json: a list": model(config__json="[]"),
    "config.json: unknown architecture": configured(model_type="mamba9"),
    "config.json: not a number": configured(hidden_size="many"),
    "config.json: heads": configured(num_attention_heads=4, num_key_value_heads=3),
    "config.json: activation": configured(hidden_act="mish9"),
    "config.json: rope": configured(rope_scaling={"rope_type": "spiral"}),
    "config.json: a quantisation that is not read": configured(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config.json: bloom": configured(model_type="bloom", n_head=4, n_layer=2, apply_residual_connection_post_layernorm=True),
    "config.json: mpt without alibi": configured(
        model_type="mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"alibi": False}),
    "config.json: mpt with qk_ln": configured(
        model_type="mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"alibi": True, "qk_ln": True}),
    "config.json: opt-350m": configured(model_type="opt", do_layer_norm_before=False, ffn_dim=64),
    "config.json: experts": configured(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=9, moe_intermediate_size=64),
    "config.json: dense layers": configured(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, mlp_only_layers="x"),
    "config.json: layers without rope": configured(model_type="smollm3", no_rope_layers=[1]),
    "config.json: a scalar": configured(model_type="gemma2", head_dim=64, query_pre_attn_scalar="many"),
    "config.json: rope frequencies": configured(rope_scaling={
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64}),
    "config.json: rope factors": configured(
        model_type="phi3", original_max_position_embeddings=64,
        rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    # weights
    "weights: none": model(config__json=config()),
    "weights: pickled": model(config__json=config(), pytorch_model__bin=b"x"),
    "weights: shards missing": model(config__json=config(), model__safetensors__index__json=INDEX),
    "weights: index without names": model(config__json=config(), model__safetensors__index__json="{}"),
    "weights: Git LFS pointer": model(
        config__json=config(), model__safetensors=b"version https://git-lfs.github.com/spec/v1\n"
    ),
    "weights: too short": model(config__json=config(), model__safetensors=b"abc"),
    "weights: not safetensors": model(config__json=config(), model__safetensors=b"\xff" * 64),
    "weights: cut": demo("run", "-m", "{tmp}/m", "hi", change=cut("model.safetensors")),
    # tokenizer and template
    "tokenizer: missing": demo("run", "-m", "{tmp}/m", "hi", change=lambda m: (m / "tokenizer.json").unlink()),
    "tokenizer: damaged": demo("run", "-m", "{tmp}/m", "hi", change=put("tokenizer.json", "{}")),
    "template: not valid": demo("run", "-m", "{tmp}/m", "hi", change=put("chat_template.jinja", "{% if %}")),
    "template: refuses": api(lambda: render("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "x"}])),
    "template: no message": api(lambda: render("{{ messages }}", [])),
    # running
    "run: context too large": run("run", "-m", "demo", "--context", "99999999", "hi"),
    "run: prompt too long": run("run", "-m", "demo", "--context", "64", "hi " * 400),
    "run: too little memory": little("available", run("run", "-m", str(DENSE), "--backend", "cpu", "--context", "256", "hi")),
    "run: instruction set": env("TINYCHAT_CPU_ISA", "sve9", run("run", "-m", "demo", "--backend", "cpu", "hi")),
    "run: no such system prompt": run("run", "-m", "demo", "--system", "@{tmp}/absent", "hi"),
    "run: system prompt not text": written({"x": b"\xff"}, run("run", "-m", "demo", "--system", "@{tmp}/x", "hi")),
    "chat: prefix cache": env("TINYCHAT_PREFIX_MB", "much", run("chat", "-m", "demo", "--backend", "reference")),
    "chat: no such chat": env("TINYCHAT_DATA", "{tmp}", run("chat", "-m", "demo", "--session", "nothing")),
    # the config file
    "config: unknown setting": env("TINYCHAT_CONFIG", "{tmp}/c", written({"c": "temprature = 1"}, run("config", "show"))),
    "config: wrong value": env("TINYCHAT_CONFIG", "{tmp}/c", written({"c": "temperature = 'hot'"}, run("config", "show"))),
    "config: not TOML": env("TINYCHAT_CONFIG", "{tmp}/c", written({"c": "= 1"}, run("config", "show"))),
    "config: no such preset": env("TINYCHAT_CONFIG", "{tmp}/c", written({"c": ""}, run("run", "--preset", "coder", "hi"))),
    "config: no file": env("TINYCHAT_CONFIG", "{tmp}/c", run("run", "--preset", "coder", "hi")),
    # convert
    "convert: target exists": run("convert", str(DENSE), "-o", "{tmp}"),
    "convert: target is not a model": written({"out/x": ""}, run("convert", str(DENSE), "-o", "{tmp}/out", "--force")),
    "convert: target in the source": demo("convert", "{tmp}/m", "-o", "{tmp}/m/out", change=lambda m: None),
    "convert: report is a file": written({"r": ""}, run("convert", str(DENSE), "-o", "{tmp}/out", "--report", "{tmp}/r/x")),
    "convert: quantised already": run("convert", "demo", "-o", "{tmp}/out"),
    "convert: option for a dense model": run("convert", "demo", "-o", "{tmp}/out", "--seed", "1"),
    "convert: AutoAWQ with 8 bits": run("convert", str(DENSE), "-o", "{tmp}/out", "--format", "awq", "--w-bit", "8"),
    "convert: NaN": demo("convert", *HELP, change=nan),
    "convert: too little memory": little("available", run("convert", str(DENSE), "-o", "{tmp}/out")),
    "convert: interrupted": written({".out.converting/x": ""}, run("convert", str(DENSE), "-o", "{tmp}/out")),
    "calib: no such file": run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/none.txt"),
    "calib: too short": written({"c.txt": "few"}, run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/c.txt")),
    "calib: not JSON": written({"c.jsonl": "{"}, run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/c.jsonl")),
    "calib: unknown columns": written(
        {"c.jsonl": '{"colour": "red"}\n'}, run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/c.jsonl")
    ),
    "calib: unknown kind": written({"c.doc": "x"}, run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/c.doc")),
    "calib: columns that are not text": written(
        {"c.jsonl": '{"instruction": 1, "output": 2}\n'}, run("convert", str(DENSE), "-o", "{tmp}/out", "--calib", "{tmp}/c.jsonl")),
    "calib: a dataset, offline": env("HF_HUB_OFFLINE", "1", api(lambda: dataset("org/data"))),
    "calib: not a dataset": api(lambda: dataset("no id at all")),
    # models
    "pull: not an id": run("models", "pull", "no id"),
    "remove: demo": run("models", "rm", "demo"),
    "remove: neither id nor conversion": run("models", "rm", "some thing"),
    "remove: not installed": env("HF_HUB_CACHE", "{tmp}", run("models", "rm", "org/none", "--yes")),
    "hub: gated": hub("GatedRepoError", 403),
    "hub: no such model": hub("RepositoryNotFoundError", 404),
    "hub: no such revision": hub("RevisionNotFoundError", 404),
    "hub: no such file": hub("EntryNotFoundError", 404),
    "hub: no access": hub("HfHubHTTPError", 403),
    "hub: token": hub("HfHubHTTPError", 401),
    "hub: rate limit": hub("HfHubHTTPError", 429),
    "hub: internal error": hub("HfHubHTTPError", 503),
    # bench and doctor
    "bench: model and shape": run("bench", "--model", "demo", "--shape", "tiny"),
    "bench: unknown shape": run("bench", "--shape", "lama-3.2-1b"),
    "bench: unknown peer": run("bench", "--shape", "tiny", "--backend", "reference", "--against", "vllm"),
    "doctor: report exists": written({"r.md": ""}, run("doctor", "--report", "{tmp}/r.md")),
    # slash commands
    "/file: no such file": command("storage", "file", "{tmp}/none"),
    "/file: not text": written({"x": b"\xff\xfe"}, command("storage", "file", "{tmp}/x")),
    "/load: no name": command("storage", "load", ""),
    "/export: another format": command("storage", "export", "x.pdf", messages=("hi", "ho")),
    "/copy: no code": command("storage", "copy", "code", messages=("hi", "ho")),
    "/save: no messages": command("storage", "save", ""),
    "/search: no words": command("storage", "search", ""),
    "/export: no messages": command("storage", "export", ""),
    "/export: the file exists": written({"x.md": ""}, command("storage", "export", "{tmp}/x.md", messages=("hi", "ho"))),
    "/file: no path": command("storage", "file", ""),
    "/copy: no answer": command("storage", "copy", ""),
    "/compact: one exchange": command("compact", "compact", messages=("hi", "ho")),
    "/retry: no messages": command("compact", "last_question"),
    "/model: cannot change": command("tuning", "switch", "demo"),
    "/system: no such file": command("tuning", "system", "@{tmp}/absent"),
    "/set: no such policy": command("tuning", "set_", "on_full never"),
    "/load: a damaged chat": written({"s.jsonl": '{"what": 1}\n{}\n'}, lambda tmp, patch: saved(tmp / "s.jsonl")),
    "/backend: unknown": command("tuning", "backend", "gpu"),
    "/set: unknown": command("tuning", "set_", "colour red"),
    "/set: not a number": command("tuning", "set_", "temperature hot"),
    "/think: unknown": command("tuning", "think", "loudly"),
    # the library
    "load: unknown backend": api(lambda: load(backend="gpu")),
    "load: context": api(lambda: load(context=1)),
    "chat: on_full": api(lambda: list(load().chat([{"role": "user", "content": "hi"}], on_full="crash"))),
    "load: unknown engine": api(lambda: load(engine="other")),
    "load: threads": api(lambda: load(backend="cpu", threads=0)),
    "sampling: out of range": api(lambda: sampling(temperature=-1.0)),
    "sampling: unknown": api(lambda: sampling(heat=1.0)),
    "sampling: empty stop": api(lambda: sampling(stop=("",))),
}  # fmt: skip


def provoked(name: str, case: Case, tmp: Path) -> str:
    """Return the message of one case with its paths shortened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "10000")
        patch.setenv("TINYCHAT_CONFIG", str(tmp / "no-config"))
        try:
            line = case(tmp, patch)
        except TinychatError as error:
            line = f"{type(error).__name__}: {error}"
    assert isinstance(line, str), f"{name}: no message"
    for path, short in ((tmp, "TMP"), (Path(sys.executable).parent, "BIN"), (ROOT, "ROOT")):
        line = line.replace(str(path), short)
    line = re.sub(r"\d+(\.\d+)? (GB|MB|kB|B)\b", "N BYTES", line)
    return re.sub(r"set it to one of [\w, ]+,", "set it to one of ISA,", line)


@pytest.mark.skipif(sys.platform != "linux", reason="the paths and the system's messages are of Linux")
def test_messages_are_those_on_record(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = {name: provoked(name, case, tmp_path_factory.mktemp("m")) for name, case in CASES.items()}
    for name, line in found.items():
        assert re.fullmatch(r"(exit \d|\w+Error): .+ — .+", line), f"{name}: {line!r}"
        assert not re.search(r"Traceback|\w+(?:Error|Exception)\(|object at 0x|\[Errno", line), line
    text = "".join(f"{name}\n    {line}\n" for name, line in found.items())
    if os.environ.get("WRITE_MESSAGES"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), (
        "a message changed: if it is right, set WRITE_MESSAGES=1"
    )
