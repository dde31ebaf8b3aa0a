"""A subject of the benchmark in a separate process, so that its memory and load time are its own.

    python -m tinychat_mlx.apps.bench.worker ours '{"shape": "tiny", …}'

The protocol is JSON lines: {"call": "decode", …} in, {"ok": …} or {"error": [class, message]} out. The first output
line reports how opening went. Output of libraries goes to stderr, so that it cannot corrupt the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tinychat_mlx.base import errors, limits

KINDS = {  # kind -> module with `Subject`
    "ours": "ours",
    "machine": "machine",
    "llama.cpp": "llamacpp",
    "torch": "torchlinear",
}


class Worker:
    """The parent's end. Calls are answered in order. An idle worker waits without using the CPU."""

    def __init__(self, kind: str, options: dict[str, Any], env: dict[str, str] | None = None) -> None:
        """Start the process; `opened` waits until it is ready. Workers run in parallel only if called so."""
        self.kind = kind
        root = Path(errors.__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path} | (env or {}),
        )

    def opened(self) -> Any:
        """Return the subject's description. Raises the error of its start."""
        return self._answer()

    def call(self, name: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; reading reports the reason
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            killed = code == -9
            why = "it was killed, probably for lack of memory" if killed else f"exit code {code}, see above"
            do = "choose a smaller model or shape" if killed else "report its output"
            raise errors.BackendError(f"the {self.kind} process ended: {why}", where="bench", remedy=do)
        answer = json.loads(line)
        if "error" in answer:
            kind, what, where, remedy = answer["error"]
            raise getattr(errors, kind, errors.BackendError)(what, where=where, remedy=remedy)
        return answer["ok"]

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def serve(kind: str, options: dict[str, Any]) -> None:
    """Open the subject and answer calls until stdin ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(key: str, value: object) -> None:
        out.write(json.dumps({key: value}) + "\n")
        out.flush()

    try:
        module = importlib.import_module(f"tinychat_mlx.apps.bench.{KINDS[kind]}")
        subject = module.Subject(**options)
        say("ok", subject.about())
        for line in sys.stdin:
            request = json.loads(line)
            name = request.pop("call")
            say("ok", limits.memory_peak() if name == "peak_rss" else getattr(subject, name)(**request))
    except errors.TinychatError as e:
        say("error", [type(e).__name__, e.what, e.where, e.remedy])
    except MemoryError:
        say(
            "error",
            ["BackendError", f"out of memory in the {kind} process", "bench", "choose a smaller shape"],
        )
    except Exception as e:  # noqa: BLE001  # the parent reports it
        what = f"the {kind} process failed: {type(e).__name__}: {e}"
        say("error", ["BackendError", what, "bench", "report this as a defect"])


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
