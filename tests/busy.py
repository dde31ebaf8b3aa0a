"""Compare idle runs with runs next to busy programs. Idle and busy runs alternate; prints the medians.

    python tests/busy.py MODEL [--loops 2] [--rounds 3] [--convert FOLDER [--calib FILE]]

During a busy run, endless loops run next to it. --convert also measures wall and CPU time of a conversion
(not on Windows).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TINYCHAT = [sys.executable, "-m", "tinychat_mlx"]


@contextmanager
def loops(number: int) -> Iterator[None]:
    """Run endless loops in separate processes."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def speed(model: str) -> dict[str, float]:
    command = [*TINYCHAT, "bench", "-m", model, "--backend", "cpu", "--pp", "128", "--tg", "64", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"prefill tok/s": result["pp_tok_s"], "decode tok/s": result["tg_tok_s"]}


def conversion(folder: str, calib: str) -> dict[str, float]:
    import resource

    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    with tempfile.TemporaryDirectory() as out:
        command = [*TINYCHAT, "convert", folder, "-o", str(Path(out, "made")), "--backend", "cpu"]
        command += ["--method", "awq", "--calib", calib]
        start, before = time.perf_counter(), processor()
        subprocess.run(command, capture_output=True, check=True)
        return {"convert wall s": time.perf_counter() - start, "convert processor s": processor() - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--convert", metavar="FOLDER")
    parser.add_argument("--calib", default="self", metavar="FILE")
    args = parser.parse_args()
    rounds: dict[int, list[dict[str, float]]] = {0: [], args.loops: []}
    for _ in range(args.rounds):
        for number, found in rounds.items():
            with loops(number):
                found.append(
                    speed(args.model) | (conversion(args.convert, args.calib) if args.convert else {})
                )
    for name in rounds[0][0]:
        idle, busy = (statistics.median(one[name] for one in found) for found in rounds.values())
        print(f"{name:20} idle {idle:9.1f}   busy {busy:9.1f}   busy / idle {busy / idle:.2f}")


if __name__ == "__main__":
    main()
