"""Record a decode step once and replay it without Python between its ops.

The first one-row call on a cache runs eagerly. Its token id, position and cache length are in a small buffer
that the ops point to. The ops and all memory they use are kept. Later calls write the three numbers and run
the whole list natively. They run the same ops on the same kernels, so the results are bit-identical.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.backends.cpu.memory import Scratch
from tinychat_mlx.backends.cpu.native_abi import CChoice, Op
from tinychat_mlx.backends.cpu.rope import CosSinTable
from tinychat_mlx.backends.cpu.thread_pool import OpList, ThreadPool
from tinychat_mlx.contract import Cache, Step, StepFn, Tensor


class RecordedStep:
    """One recorded step of one cache."""

    def __init__(self) -> None:
        self.ids = np.zeros(1, np.int32)
        self.positions = np.zeros(1, np.int32)
        self.length = np.zeros(1, np.int64)
        self.scratch = Scratch()
        self.ops: list[Op] = []
        self.keep: list[object] = []
        self.tables: list[CosSinTable] = []
        self._known: dict[int, weakref.ref[npt.NDArray[Any]]] = {}
        self._know(self.ids)
        self._know(self.positions)

    def _know(self, x: npt.NDArray[Any]) -> None:
        root = _root(x)
        self._known[id(root)] = weakref.ref(root)

    def add(self, op: Op, tensors: Sequence[Tensor], y: Tensor, keep: object) -> None:
        """Record an op that has just run.

        Results need not be kept: their memory belongs to `scratch`. One that is dropped while recording is
        reused by a later op, in the recording and in every replay. Raises AssertionError if the op reads a
        tensor that no recorded op wrote.
        """
        for x in tensors:
            known = self._known.get(id(_root(x)))
            assert known is not None and known() is _root(x), "the graph computed outside its backend"
        self._know(y)
        self.ops.append(op)
        self.keep.append(keep)

    def finish(self, y: Tensor) -> None:
        self.list, self.result = OpList(self.ops, self.keep), y


class Recordable(Protocol):
    """The attributes of CpuBackend that this module uses."""

    engine: ThreadPool
    tape: RecordedStep | None  # of the step being recorded
    choice: CChoice  # of the current step


def _root(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


class Captured:
    """A step function that is recorded per cache. The next call on the cache overwrites its result."""

    def __init__(self, fn: StepFn, backend: Recordable) -> None:
        self._fn, self._backend = fn, backend
        self._tapes: weakref.WeakKeyDictionary[Cache, RecordedStep] = weakref.WeakKeyDictionary()

    def __call__(self, ids: Tensor, step: Step) -> Tensor:
        if len(step.segments) != 1 or step.rows != 1 or self._backend.tape is not None:
            return self._fn(ids, step)
        cache = step.segments[0].cache
        tape = self._tapes.get(cache)
        new = tape is None
        if tape is None:
            tape = RecordedStep()
        tape.ids[0], tape.positions[0], tape.length[0] = ids[0], step.positions[0], cache.length
        if new:
            self._record(tape, cache, step)
            self._tapes[cache] = tape
            return tape.result
        for table in tape.tables:
            table.reach(int(step.positions[0]) + 1)
        self._backend.choice.set(step.choice)
        self._backend.engine.run(tape.list)
        return tape.result

    def _record(self, tape: RecordedStep, cache: Cache, step: Step) -> None:
        self._backend.tape = tape
        try:
            tape.finish(self._fn(tape.ids, replace(step, positions=tape.positions)))
        finally:
            self._backend.tape = None
