"""A benchmark run: each subject in a separate process, repetitions in turn, with the machine's limits measured.

Subjects take turns within a round, so that a slow period of the machine (other programs, heat) affects all of them.
Ratios are computed per round. An additional first round is a warm-up and is not counted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinychat_mlx import __version__, memory_plan
from tinychat_mlx.apps.bench import gguf_file, shapes
from tinychat_mlx.apps.bench.stats import Sample
from tinychat_mlx.apps.bench.worker import Worker
from tinychat_mlx.apps.models.prepare import facts_of
from tinychat_mlx.base.errors import BackendError, UsageError
from tinychat_mlx.engine.engine import PREFILL_ROWS
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.open import create

Config = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The settings of a run: a model or a shape, a prompt of pp tokens, tg tokens decoded after `depth` others."""

    model: str | None
    shape: str | None
    backend: str  # never "auto"
    head: str = "int8"
    pp: int = 512
    tg: int = 128
    depth: int = 0
    threads: int | None = None
    exact: bool = False
    repeat: int = 5
    against: tuple[str, ...] = ()

    def config(self) -> Config:
        if self.shape is not None:
            return shapes.find(self.shape)
        from tinychat_mlx.apps.models.download import folder_of
        from tinychat_mlx.base.json_file import read_json

        assert self.model is not None
        return read_json(folder_of(self.model) / "config.json")


@dataclass
class Peer:
    """Another program's run for comparison."""

    name: str
    worker: Worker
    about: dict[str, Any]
    pp_s: list[float] = field(default_factory=list)
    tg_s: list[float] = field(default_factory=list)
    products: list[dict[str, float]] = field(default_factory=list)


def check(plan: Plan) -> None:
    """Raise an error for unknown names, missing peers or too little memory, before anything is loaded."""
    for peer in plan.against:
        program = parse_peer(peer, plan.head)[0]
        if program == "torch" and find_spec("torch") is None:
            raise BackendError("torch is not installed", where="--against torch", remedy="pip install torch")
        if program == "llama.cpp":
            for package in ("llama_cpp", "gguf"):
                if find_spec(package) is None:
                    raise gguf_file.missing(f"{package} is not installed")
    if plan.backend not in ("cpu", "reference"):
        return  # its library allocates memory itself; the backend raises in the measuring process
    backend = create(plan.backend, plan.exact, plan.threads)
    tokens = plan.depth + plan.pp + plan.tg
    if plan.shape is None:
        assert plan.model is not None
        if found := facts_of(plan.model, {}):
            memory_plan.context_for(found, backend, tokens, lambda text: None)
        return
    shape = shapes.find(plan.shape)
    from tinychat_mlx.apps.models.int4_plan import of_shape

    found = of_shape(plan.shape, parse_config(shape), bool(shape["tie_word_embeddings"]), plan.head)
    takes = memory_plan.cost(found, backend)
    memory_plan.refuse(plan.shape, takes, tokens, memory_plan.free_on(backend), backend.name)


def parse_peer(text: str, head: str) -> tuple[str, str, bool]:
    """ "llama.cpp[:Q4_0|Q4_K_M][:norepack]" or "torch" -> program, file type, whether to repack.

    The default type is comparable to tinychat's weights: Q4_0 for all int4, Q4_K_M for a finer head.
    """
    program, *rest = text.split(":")
    if program == "torch" and not rest:
        return program, "", True
    file_type, repack = "Q4_0" if head == "int4" else "Q4_K_M", True
    for word in rest:
        if word.upper() in gguf_file.TYPES:
            file_type = word.upper()
        elif word == "norepack":
            repack = False
        else:
            program = ""
    if program != "llama.cpp":
        raise UsageError(
            f"unknown peer {text!r}",
            where="--against",
            remedy="give torch or llama.cpp; llama.cpp takes a type and norepack, as in llama.cpp:Q4_K_M:norepack",
        )
    return program, file_type, repack


def run(plan: Plan, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure -> the object that `bench --json` prints."""
    check(plan)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5:
        say(f"note: this machine is busy (load {busy:.1f}): figures will be too low")
    with ExitStack() as stack:
        ours = _start(stack, "ours", own_options(plan))
        about = ours.opened()
        threads = about["threads"] or plan.threads or os.cpu_count() or 1
        machine = _start(stack, "machine", {"backend": about["backend"], "threads": threads})
        machine.opened()
        say(f"{about['name']} on {about['backend']}: {about['device']} ({about['detail']})")
        peers = [_open_peer(text, plan, threads, stack, say) for text in plan.against]
        rounds = _Rounds(plan, ours, machine, peers, say)
        for number in range(-1, plan.repeat):
            rounds.one(number)
        result = _result(plan, about, threads, rounds)
        result["peers"] = [_peer_result(peer, result, rounds, plan) for peer in peers]
    return result | {
        "load_average": busy,
        "version": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def own_options(plan: Plan) -> dict[str, Any]:
    names = ("model", "shape", "backend", "head", "pp", "tg", "depth", "threads", "exact")
    return {name: getattr(plan, name) for name in names}


def _start(stack: ExitStack, kind: str, options: dict[str, Any]) -> Worker:
    return stack.enter_context(closing(Worker(kind, options)))


def _open_peer(text: str, plan: Plan, threads: int, stack: ExitStack, say: Say) -> Peer:
    program, file_type, repack = parse_peer(text, plan.head)
    config = plan.config()
    if program == "torch":
        say("torch: packing weights")
        options = {"linears": _linears(config), "layers": config["num_hidden_layers"], "threads": threads}
        worker = _start(stack, "torch", options)
        return Peer("torch", worker, worker.opened())
    say(f"llama.cpp: writing a {file_type} file of this shape")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tinychat-bench-"))
    path = Path(folder) / f"{file_type}.gguf"
    size = gguf_file.write(path, config, file_type)
    options = {name: getattr(plan, name) for name in ("pp", "tg", "depth")}
    options |= {"path": str(path), "threads": threads, "vocabulary": config["vocab_size"], "repack": repack}
    worker = _start(stack, "llama.cpp", options)
    about = worker.opened() | {"type": file_type, "weight_bytes": size}
    with suppress(PermissionError):  # it is mapped; systems that keep mapped files delete it with the folder
        path.unlink()
    name = f"llama.cpp {file_type}{'' if repack else ' norepack'}"
    return Peer(name, worker, about)


def _linears(config: Config) -> list[tuple[int, int]]:
    """Return (N, K) of one layer's products, joined as in tinychat: qkv, o, gate and up, down."""
    c = parse_config(config)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    up = 2 * inner if c.spec.gated else inner
    return [(q + 2 * kv, hidden), (hidden, q), (up, hidden), (hidden, inner)]


class _Rounds:
    """The repetitions and their measurements."""

    def __init__(self, plan: Plan, ours: Worker, machine: Worker, peers: list[Peer], say: Say) -> None:
        self.plan, self.ours, self.machine, self.peers, self.say = plan, ours, machine, peers, say
        self.rows = min(plan.pp, PREFILL_ROWS)
        self.rss = 0
        self.pp_s: list[float] = []
        self.tg_s: list[float] = []
        self.products: list[float] = []
        self.bandwidth: list[float] = []
        self.peak: list[float] = []

    def one(self, number: int) -> None:
        """Run round `number`; a negative one is a warm-up."""
        counted = number >= 0
        for values, name in ((self.bandwidth, "bandwidth"), (self.peak, "int8_peak")):
            value = self.machine.call(name)
            if counted and value is not None:
                values.append(value)
        turns = [partial(self._ours, counted), *(partial(self._peer, p, counted) for p in self.peers)]
        shift = max(number, 0) % len(turns)  # rotate the order
        for turn in turns[shift:] + turns[:shift]:
            turn()
        if counted:
            self.say(self._line(number))

    def _ours(self, counted: bool) -> None:
        pp, tg = self.ours.call("prefill"), self.ours.call("decode")
        self.rss = self.rss or self.ours.call("peak_rss")  # before any work that an answer does not need
        products = self.ours.call("products", rows=self.rows)
        if counted:
            self.pp_s.append(pp)
            self.tg_s.append(tg)
            if products is not None:
                self.products.append(products["ops_per_s"])

    def _peer(self, peer: Peer, counted: bool) -> None:
        if peer.name == "torch":
            one, many = peer.worker.call("int4", rows=1), peer.worker.call("int4", rows=self.rows)
            dense = peer.worker.call("bf16", rows=self.rows)
            if counted:
                rates = {"read": one["bytes_per_s"], "int4": many["ops_per_s"], "bf16": dense["ops_per_s"]}
                peer.products.append(rates)
            return
        pp, tg = peer.worker.call("prefill"), peer.worker.call("decode")
        if counted:
            peer.pp_s.append(pp)
            peer.tg_s.append(tg)

    def _line(self, number: int) -> str:
        words = [f"ours pp {self.plan.pp / self.pp_s[-1]:.1f} tg {self.plan.tg / self.tg_s[-1]:.1f}"]
        for peer in self.peers:
            if peer.tg_s:
                words.append(
                    f"{peer.name} pp {self.plan.pp / peer.pp_s[-1]:.1f} tg {self.plan.tg / peer.tg_s[-1]:.1f}: "
                    f"ratio {peer.pp_s[-1] / self.pp_s[-1]:.2f}, {peer.tg_s[-1] / self.tg_s[-1]:.2f}"
                )
        return f"round {number + 1} of {self.plan.repeat}: {'; '.join(words)} tok/s"


def _result(plan: Plan, about: dict[str, Any], threads: int, rounds: _Rounds) -> dict[str, Any]:
    pp = Sample.of([plan.pp / s for s in rounds.pp_s])
    tg = Sample.of([plan.tg / s for s in rounds.tg_s])
    spread = {"pp_tok_s": pp, "tg_tok_s": tg}
    result: dict[str, Any] = {"shape": about["name"], "backend": about["backend"], "threads": threads}
    result |= {"device": about["device"], "detail": about["detail"], "exact": plan.exact}
    result |= {"head": plan.head if plan.shape else None, "pp": plan.pp, "tg": plan.tg, "depth": plan.depth}
    read_bytes = rounds.ours.call("bytes_per_token")
    result |= {"pp_tok_s": pp.median, "tg_tok_s": tg.median, "bytes_per_token": read_bytes}
    result |= {"bandwidth_gb_s": None, "mbu": None}
    if rounds.bandwidth:
        spread["bandwidth_gb_s"] = read = Sample.of([b / 1e9 for b in rounds.bandwidth])
        result["bandwidth_gb_s"] = read.median
        mine = Sample.of([read_bytes * plan.tg / s / 1e9 for s in rounds.tg_s])
        spread["mbu"] = mine.over(read)  # per round, because the bandwidth may change between rounds
        result["mbu"] = spread["mbu"].median
    result |= {"prefill_gop_s": about["ops_per_token"] * pp.median / 1e9}
    result |= {"matmul_gop_s": None, "int8_peak_gop_s": None}
    for key, values in (("matmul_gop_s", rounds.products), ("int8_peak_gop_s", rounds.peak)):
        if values:
            spread[key] = Sample.of([v / 1e9 for v in values])
            result[key] = spread[key].median
    result |= {"load_s": about["load_s"], "rss_bytes": rounds.rss, "weight_bytes": about["weight_bytes"]}
    result["kv_bytes"] = about["kv_bytes"]
    return result | {"spread": {name: sample.as_dict() for name, sample in spread.items()}}


def _peer_result(peer: Peer, ours: dict[str, Any], rounds: _Rounds, plan: Plan) -> dict[str, Any]:
    """Return a peer's figures. Its ratios are tinychat / peer, above 1 if tinychat is faster."""
    result: dict[str, Any] = {"name": peer.name, "version": peer.about["version"]}
    if peer.name == "torch":
        rates = {k: Sample.of([p[k] / 1e9 for p in peer.products]) for k in peer.products[0]}
        result |= {"matvec_gb_s": rates["read"].median, "matmul_gop_s": rates["int4"].median}
        result["bf16_gop_s"] = rates["bf16"].median
        size = ours["bytes_per_token"]
        read = Sample.of([size * plan.tg / s / 1e9 for s in rounds.tg_s])
        result["tg_ratio"] = read.over(
            rates["read"]
        ).as_dict()  # reads of a whole token against those of products only
        if rounds.products:
            mine = Sample.of([p / 1e9 for p in rounds.products])
            result["matmul_ratio"] = mine.over(rates["int4"]).as_dict()
            result["bf16_ratio"] = mine.over(rates["bf16"]).as_dict()
        return result
    pp, tg = (Sample.of([n / s for s in xs]) for n, xs in ((plan.pp, peer.pp_s), (plan.tg, peer.tg_s)))
    config = parse_config(plan.config())
    kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # per token, in float16
    result |= {"type": peer.about["type"], "pp_tok_s": pp.median, "tg_tok_s": tg.median}
    read_bytes = peer.about["weight_bytes"]["read"] + round(kv * (plan.depth + (plan.tg + 1) / 2))
    result |= {"bytes_per_token": read_bytes, "load_s": peer.about["load_s"]}
    result |= {"rss_bytes": peer.worker.call("peak_rss"), "weight_bytes": peer.about["weight_bytes"]["total"]}
    result["pp_ratio"] = Sample.of([plan.pp / s for s in rounds.pp_s]).over(pp).as_dict()
    result["tg_ratio"] = Sample.of([plan.tg / s for s in rounds.tg_s]).over(tg).as_dict()
    return result | {"spread": {"pp_tok_s": pp.as_dict(), "tg_tok_s": tg.as_dict()}}
