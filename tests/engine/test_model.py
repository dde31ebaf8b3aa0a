"""A loaded model through the library API: chats that reuse computed tokens, full contexts, invalid names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinychat_mlx
from tinychat_mlx.base.errors import ContextFullError, ModelNotFoundError, TinychatError, UsageError
from tinychat_mlx.loaded_model import without_oldest
from tinychat_mlx.open import DEMO

WHO = {"role": "user", "content": "who are you?"}


@pytest.fixture(scope="module")
def demo() -> tinychat_mlx.Model:
    return tinychat_mlx.load("demo", backend="cpu", threads=2)


def said(model: tinychat_mlx.Model, messages: list[dict[str, Any]], **kw: Any) -> tuple[str, Any, list[Any]]:
    events = list(model.chat(messages, **{"temperature": 0, "max_tokens": 60, **kw}))
    return "".join(e.text for e in events), events[-1].stats, events


def test_the_demo_introduces_itself(demo: tinychat_mlx.Model) -> None:
    text, stats, _ = said(demo, [WHO])
    assert "TinyChat" in text and stats.finish_reason == "stop"
    assert demo.quantization == "int4 g128" and demo.nbytes < 8_000_000


def test_a_second_turn_prefills_only_its_new_tokens(demo: tinychat_mlx.Model) -> None:
    answer, first, _ = said(demo, [WHO])
    turn = [
        WHO,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "tell me a story about a fox"},
    ]
    _, second, events = said(demo, turn)
    rendered = demo.tokenizer.encode(demo.tokenizer.render(turn), special=False)
    assert second.prompt_tokens == len(rendered)
    new = second.prompt_tokens - second.cached_tokens
    # the end of the last answer, the new turn and the opening of the answer: nothing before them
    added = len(rendered) - len(demo.tokenizer.encode(demo.tokenizer.render([WHO]), special=False))
    assert new == added - (first.completion_tokens - 1)
    assert [e.total for e in events if e.kind == "prefill"] == [new]


def test_reuse_does_not_change_the_answer(demo: tinychat_mlx.Model) -> None:
    answer, _, _ = said(demo, [WHO])
    turn = [WHO, {"role": "assistant", "content": answer}, {"role": "user", "content": "what is 12 + 30?"}]
    warm, stats, _ = said(demo, turn)
    said(demo, [{"role": "user", "content": "hi"}])
    cold, fresh, _ = said(demo, turn)
    assert stats.cached_tokens > fresh.cached_tokens and warm == cold


def test_time_to_first_token_does_not_grow_with_the_history(demo: tinychat_mlx.Model) -> None:
    """Counted, not timed: each turn of a long chat prefills about as many tokens as the first."""
    messages, computed = [], []
    for i in range(8):
        messages.append({"role": "user", "content": f"what is {i} + 3?"})
        answer, stats, _ = said(demo, messages)
        messages.append({"role": "assistant", "content": answer})
        computed.append(stats.prompt_tokens - stats.cached_tokens)
    assert max(computed[1:]) <= computed[0] + 4


def test_cancelling_keeps_what_was_said(demo: tinychat_mlx.Model) -> None:
    ask = [{"role": "user", "content": "tell me a story about a fox"}]
    events, text = demo.chat(ask, temperature=0), ""
    for event in events:
        text += event.text
        if len(text) > 40:
            break
    events.close()  # type: ignore[attr-defined]
    turn = [*ask, {"role": "assistant", "content": text}, {"role": "user", "content": "who are you?"}]
    _, stats, _ = said(demo, turn)
    assert stats.cached_tokens >= stats.prompt_tokens - 12
    assert "".join(e.text for e in demo.chat(ask, temperature=0)).startswith(text)


def test_a_full_context_is_an_error_or_a_counted_slide(demo: tinychat_mlx.Model) -> None:
    small = tinychat_mlx.load("demo", backend="cpu", context=160, threads=1)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer briefly."}]
    for i in range(12):
        messages += [
            {"role": "user", "content": f"what is {i} + 5?"},
            {"role": "assistant", "content": f"{i + 5}"},
        ]
    messages.append(WHO)
    with pytest.raises(ContextFullError, match="160"):
        small.chat(messages)
    _, stats, _ = said(small, messages, on_full="slide")
    assert stats.dropped_messages > 0 and stats.dropped_messages % 2 == 0
    with pytest.raises(ContextFullError, match="last message"):
        small.chat([{"role": "user", "content": "fox " * 400}], on_full="slide")
    with pytest.raises(UsageError, match="on_full"):
        small.chat([WHO], on_full="forget")


def test_sliding_keeps_the_system_message_and_whole_exchanges() -> None:
    s, u, a = ({"role": r, "content": r} for r in ("system", "user", "assistant"))
    assert without_oldest([s, u, a, u, a, u]) == ([s, u, a, u], 2)
    assert without_oldest([u, a, a, u]) == ([u], 3)
    with pytest.raises(ContextFullError):
        without_oldest([s, u])


def test_stop_strings_and_max_tokens(demo: tinychat_mlx.Model) -> None:
    whole, _, _ = said(demo, [WHO])
    cut, stats, _ = said(demo, [WHO], stop=("TinyChat",))
    assert cut == whole[: whole.index("TinyChat")] and stats.finish_reason == "stop"
    _, stats, _ = said(demo, [WHO], max_tokens=3)
    assert (stats.finish_reason, stats.completion_tokens) == ("length", 3)


def test_streamed_text_is_the_decoded_text(demo: tinychat_mlx.Model) -> None:
    _, _, events = said(demo, [WHO])
    assert "".join(e.text for e in events) == demo.tokenizer.decode(demo.engine.answer)


def test_int8_activations_hardly_change_the_demo(demo: tinychat_mlx.Model) -> None:
    exact = tinychat_mlx.load("demo", backend="cpu", exact=True)
    ids = demo.tokenizer.encode(demo.tokenizer.render([WHO]), special=False) * 4
    a, b = demo.logits(ids), exact.logits(ids)
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.9
    assert not np.array_equal(a, b), "exact mode must compute differently"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    return folder


def run(*args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tinychat_mlx", "run", "--backend", "cpu", *args, "hi"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("harm", ["cut", "rope", "tokenizer", "absent"])
def test_bad_input_is_one_clear_line(harm: str, broken: Path) -> None:
    if harm == "cut":
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif harm == "rope":
        config = json.loads((broken / "config.json").read_text())
        config["rope_scaling"] = {"rope_type": "cubist", "factor": 2.0}
        (broken / "config.json").write_text(json.dumps(config))
    elif harm == "tokenizer":
        (broken / "tokenizer.json").unlink()
    else:
        broken = broken / "nowhere"
    code, out, err = run("-m", str(broken))
    named = {"cut": "model.safetensors", "rope": "cubist", "tokenizer": "tokenizer.json", "absent": "nowhere"}
    assert code == 1 and out == "" and named[harm] in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize("name", ["./nothing", "no/such/model/here", "~/nothing", "nonsense", "../x/y"])
def test_a_name_that_leads_nowhere_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the hub is contacted."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("connected to the hub")

    monkeypatch.setattr("socket.socket.connect", asked)
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        tinychat_mlx.load(name)


def test_offline_a_hub_id_says_so_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"someone/model.*HF_HUB_OFFLINE"):
        tinychat_mlx.load("someone/model")


@pytest.mark.parametrize("bad", [{"context": 1}, {"context": 10**9}, {"backend": "abacus"}])
def test_load_names_the_argument_that_is_wrong(bad: dict[str, Any]) -> None:
    with pytest.raises(TinychatError, match=next(iter(bad))):
        tinychat_mlx.load("demo", **bad)


def test_a_folder_without_tokenizer_still_gives_logits(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    model = tinychat_mlx.load(broken, backend="cpu")
    assert model.logits([5, 6, 7]).shape == (3, model.config.vocab_size)
