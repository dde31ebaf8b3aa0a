"""Mutation testing: make one small mistake in the product, run the tests that cover it, expect a failure.

    python tests/mutants.py [--only NAME …] [--jobs N] [--timeout S] [--json FILE]
    python tests/mutants.py --check      only find every snippet in the source and every test file

Mutations run in copies of this checkout, in a temporary folder; files of the checkout itself are only read. The
native library is built in the copy, so `cmake` and a C++ compiler are required.

Exit code: 0 every mutation was killed, or survived as before (`survived_before`: known gaps of the tests); 1 another
one survived; 2 one could not be judged (a snippet is missing or ambiguous, the tests fail or are all skipped without
the mutation, a timeout, a build or collection error).

When code or tests are renamed: edit the snippet, or add the new spelling to `change`; name test files by their base
name, whatever folder they are in. Which test killed which mutation first is recorded in tests/data/mutants.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("tinychat_mlx", "apps", "awq", "backends")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".metal"}
NATIVE = {".h", ".cpp"}
CMAKE_SOURCE = "backends/cpu"


class Unjudged(Exception):
    """A mutation that could not be judged, and why."""


class Place(NamedTuple):
    """The file that a mutation changes, relative to the checkout, and its text before and after."""

    file: str
    before: str
    after: str


class Verdict(NamedTuple):
    outcome: str  # killed | survived | error
    by: str  # the first failing test, or the reason of an error
    seconds: float


def tracked() -> list[str]:
    """Every file of the checkout that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


def sources(names: list[str]) -> dict[str, str]:
    """The product's source files: name -> text."""
    mine = (n for n in names if n.split("/")[0] in PRODUCT and Path(n).suffix in SUFFIXES)
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in mine}


def find(mutation: Mutation, texts: dict[str, str]) -> Place:
    """Locate the one place that a mutation changes. Raises Unjudged."""
    hits = [
        (f, old, new) for old, new in mutation.change for f, t in texts.items() for _ in range(t.count(old))
    ]
    if len(hits) != 1:
        where = ", ".join(sorted({f for f, _, _ in hits}))
        raise Unjudged(
            f"its snippet is in {where} {len(hits)} times" if hits else "its snippet is in no product file"
        )
    file, old, new = hits[0]
    return Place(file, texts[file], texts[file].replace(old, new))


def test_files(mutation: Mutation, names: list[str]) -> list[str]:
    """Paths of a mutation's test files, found by base name. Raises Unjudged."""
    found = []
    for wanted in mutation.tests:
        paths = [n for n in names if n.startswith("tests/") and Path(n).name == wanted]
        if len(paths) != 1:
            raise Unjudged(f"{len(paths)} files named {wanted} under tests/: {', '.join(paths)}")
        found += paths
    return found


class Sandbox:
    """A copy of the checkout with an interpreter that imports the product from it.

    The copy always has the same path, `work`, and every mutation gets it fresh from `clean`. The interpreter is a
    virtual environment whose only contents are two paths: the copy, and the packages of the interpreter that runs
    this program. A path in a .pth file does not run the .pth files of that folder, so the finder of an editable
    install stays out; child processes started with `sys.executable` see the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.clean = folder, folder / "work", folder / "clean"
        self.cache, self.clean_cache, self.build = folder / "cache", folder / "clean-cache", folder / "build"
        self.process: subprocess.Popen[bytes] | None = None
        self.mutated: set[str] = set()  # native sources whose object files were built with a mutation
        self.python = self._interpreter()

    def fill(self, names: list[str]) -> None:
        """Copy the checkout and build its native library. Raises Unjudged."""
        for name in names:
            (self.clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.clean / name)
        self.clean_cache.mkdir()
        self.reset()
        self.compile()
        for library in (self.work / "tinychat_mlx").glob("tinychat_cpu.*"):
            shutil.copy2(library, self.clean / "tinychat_mlx")

    def fill_from(self, other: Sandbox) -> None:
        """Copy another sandbox's files, library and caches."""
        shutil.copytree(other.clean, self.clean)
        shutil.copytree(other.clean_cache, self.clean_cache)

    def _interpreter(self) -> Path:
        place = self.folder / "venv"
        venv.create(place, symlinks=os.name != "nt", with_pip=False)
        packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        site = next(place.rglob("site-packages"))
        (site / "mutants.pth").write_text("\n".join([str(self.work), *packages]) + "\n", encoding="utf-8")
        return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def reset(self) -> None:
        """Restore the unmutated copy and the caches of the unmutated tests."""
        for now, before in ((self.work, self.clean), (self.cache, self.clean_cache)):
            shutil.rmtree(now, ignore_errors=True)
            shutil.copytree(before, now)

    def keep(self) -> None:
        """Keep the caches of the unmutated tests, which make later runs faster."""
        for now, before in ((self.work, self.clean), (self.cache, self.clean_cache)):
            shutil.rmtree(before)
            now.rename(before)

    def compile(self, changed: str = "") -> None:
        """Build the native library of `work`. Raises Unjudged."""
        for name in self.mutated:
            os.utime(self.work / name)
        self.mutated = {changed} - {""}
        if not (self.build / "CMakeCache.txt").exists():
            self._run("cmake", "-S", str(self.work / CMAKE_SOURCE), "-B", str(self.build))
        self._run("cmake", "--build", str(self.build), "--parallel", "2")

    def _run(self, *command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Unjudged(
                f"{command[0]} is not installed, and the native library is built with it"
            ) from None
        if done.returncode:
            raise Unjudged(f"{shlex.join(command)} fails: {last_lines(done.stdout + done.stderr)}")

    def environment(self) -> dict[str, str]:
        """Return an environment with caches inside this copy, so that a mutation's results are not reused."""
        drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
        env = {k: v for k, v in os.environ.items() if k not in drop}
        return env | {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(self.cache)}

    def pytest(self, arguments: list[str], timeout: float) -> tuple[int, str]:
        """Run tests in `work` -> exit code, output. Raises Unjudged on a timeout."""
        scratch = self.folder / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        command = [str(self.python), "-m", "pytest", "-rpfE", "--tb=short", "--color=no"]
        command += ["-o", f"cache_dir={self.cache / 'pytest'}", *arguments]
        with tempfile.TemporaryFile() as out:
            self.process = process = subprocess.Popen(
                command, cwd=self.work, env=self.environment() | {"TMPDIR": str(scratch)}, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=os.name == "posix",
            )  # fmt: skip
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise Unjudged(f"no verdict after {timeout:g} s") from None
            finally:
                self.stop()
            out.seek(0)
            return code, out.read().decode(errors="replace")

    def stop(self) -> None:
        """Stop the tests that run here and the processes that they started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
            self.process.wait()


def base_name(path: str) -> str:
    return path.rpartition("/")[2]


def last_lines(text: str, count: int = 12) -> str:
    return "\n    " + "\n    ".join(text.strip().splitlines()[-count:])


def outcomes(output: str, *kinds: str) -> list[str]:
    """The tests that pytest's summary lists as PASSED, FAILED or ERROR, in order."""
    lines = re.finditer(r"^(PASSED|FAILED|ERROR) (\S+?(?:::.+?)?)(?: - .*)?$", output, re.MULTILINE)
    return [line[2] for line in lines if line[1] in kinds]


def judge(box: Sandbox, place: Place, files: list[str], keyword: str, timeout: float) -> tuple[str, str]:
    """Run the tests with a mutation -> outcome, the test that killed it. Raises Unjudged."""
    box.reset()
    (box.work / place.file).write_text(place.after, encoding="utf-8")
    if Path(place.file).suffix in NATIVE:
        box.compile(place.file)
    code, output = box.pytest(["-x", *files, "-k", keyword], timeout)
    if code == 1 and (failed := outcomes(output, "FAILED", "ERROR")):
        return "killed", failed[0]
    if code == 0 and outcomes(output, "PASSED"):
        return "survived", ""
    if code in (0, 5):
        raise Unjudged(f"no test of {' '.join(files)} that matches {keyword!r} runs here")
    raise Unjudged(f"pytest ends with exit code {code}: {last_lines(output)}")


class Group(NamedTuple):
    """Mutations that the same selection of tests judges."""

    files: list[str]
    keyword: str
    members: list[tuple[Mutation, Place]]

    @property
    def native(self) -> bool:
        return any(Path(place.file).suffix in NATIVE for _, place in self.members)


class Runner:
    """Judges mutations: those of one selection of tests in sequence, selections in parallel."""

    def __init__(self, chosen: list[Mutation], timeout: float) -> None:
        self.timeout, self.names = timeout, tracked()
        self.verdicts: dict[str, Verdict] = {}
        self.lock, self.ending = threading.Lock(), threading.Event()
        texts, groups = sources(self.names), dict[tuple[str, ...], Group]()
        for mutation in chosen:
            try:
                place, files = find(mutation, texts), test_files(mutation, self.names)
            except Unjudged as reason:
                self.report(mutation.name, Verdict("error", str(reason), 0.0))
                continue
            group = groups.setdefault((*files, mutation.keyword), Group(files, mutation.keyword, []))
            group.members.append((mutation, place))
        self.groups = sorted(groups.values(), key=lambda group: not group.native)

    def report(self, name: str, verdict: Verdict) -> None:
        with self.lock:
            self.verdicts[name] = verdict
            by = f"  {verdict.by}" if verdict.by else ""
            print(f"{verdict.outcome:<9}{verdict.seconds:7.1f} s  {name}{by}", flush=True)

    def run(self, jobs: int) -> None:
        with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
            boxes = [Sandbox(Path(folder, str(i))) for i in range(jobs)]
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    boxes[0].fill(self.names)
                    self._baseline(boxes[0])
                    for box in boxes[1:]:
                        box.fill_from(boxes[0])
                    for worker in [pool.submit(self._work, box, box is boxes[0]) for box in boxes]:
                        worker.result()
                except BaseException:  # an interrupt, or a defect in a worker: start nothing more
                    self.ending.set()
                    for box in boxes:
                        box.stop()
                    raise

    def _baseline(self, box: Sandbox) -> None:
        """Run all selections without a mutation. Selections that fail cannot judge a mutation."""
        started, files = time.monotonic(), sorted({file for group in self.groups for file in group.files})
        selections = (f"({' or '.join(map(base_name, g.files))}) and ({g.keyword})" for g in self.groups)
        box.reset()
        code, output = box.pytest([*files, "-k", " or ".join(f"({s})" for s in selections)], 4 * self.timeout)
        box.keep()
        print(f"baseline {time.monotonic() - started:7.1f} s  {output.strip().splitlines()[-1]}", flush=True)
        bad = outcomes(output, "FAILED", "ERROR")
        if code not in (0, 1) or code == 1 and not bad:
            raise SystemExit(f"without a mutation pytest ends with exit code {code}: {last_lines(output)}")
        for group in [g for g in self.groups if any(test.split("::")[0] in g.files for test in bad)]:
            box.reset()  # a failure may belong to another selection of the same files
            code, output = box.pytest([*group.files, "-k", group.keyword], self.timeout)
            if code:
                self.groups.remove(group)
                reason = f"fails without the mutation: {', '.join(outcomes(output, 'FAILED', 'ERROR'))}"
                for mutation, _ in group.members:
                    self.report(mutation.name, Verdict("error", reason, 0.0))

    def _next(self, builds: bool) -> Group | None:
        """Assign native mutations to the copy with their object files, so that only changes are rebuilt."""
        with self.lock:
            at = next((i for i, group in enumerate(self.groups) if builds or not group.native), None)
            return None if at is None else self.groups.pop(at)

    def _work(self, box: Sandbox, builds: bool) -> None:
        while group := self._next(builds):
            for mutation, place in group.members:
                if self.ending.is_set():
                    return
                started = time.monotonic()
                try:
                    outcome, by = judge(box, place, group.files, group.keyword, self.timeout)
                except Unjudged as e:
                    outcome, by = "error", str(e)
                self.report(mutation.name, Verdict(outcome, by, time.monotonic() - started))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies that run at the same time")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds per run of the tests"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts to a file")
    parser.add_argument("--check", action="store_true", help="only look for the snippets and the test files")
    options = parser.parse_args()
    known = {m.name: m for m in MUTATIONS}
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    # handled like Ctrl-C, so that no process is left running
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runner = Runner([known[name] for name in options.only or known], options.timeout)
    if not options.check:
        try:
            runner.run(max(1, options.jobs))
        except Unjudged as reason:
            raise SystemExit(f"error: {reason}") from None
    elif not runner.verdicts:
        print(f"all of {len(known)} snippets and their tests are found")
    found = Counter(verdict.outcome for verdict in runner.verdicts.values())
    known_gaps = {m.name for m in MUTATIONS if m.survived_before}
    survivors = {n for n, v in runner.verdicts.items() if v.outcome == "survived"}
    if not options.check:
        print(f"{found['killed']} killed, {len(survivors)} survived ({len(survivors & known_gaps)} as before), "
              f"{found['error']} not judged")  # fmt: skip
    if options.json:
        rows = {name: runner.verdicts[name]._asdict() for name in known if name in runner.verdicts}
        for name, row in rows.items():
            row["area"], row["seconds"] = known[name].area, round(row["seconds"], 1)
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 2 if found["error"] else 1 if survivors - known_gaps else 0


if __name__ == "__main__":
    sys.exit(main())
