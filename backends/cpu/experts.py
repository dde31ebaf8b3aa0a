"""Inputs of the native mixture-of-experts ops: tables of weights, and rows sorted by expert.

An op reads each row's experts from the output of the op before it, so a replayed step can choose other
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.memory import F32, address
from tinychat_mlx.backends.cpu.pack import CpuWeight
from tinychat_mlx.contract import Moe


class Places:
    """Memory for `rows` rows sorted by expert (RouteOp in kernels/op.h): first, row and share in one array."""

    def __init__(self, rows: int, moe: Moe, new: Callable[..., F32]) -> None:
        self.moe, self.rows, self.each = moe, rows, moe.top_k + moe.router.shape[0] - moe.num_experts
        starts, places = moe.router.shape[0] + 1, rows * self.each
        self.memory = new(starts + 2 * places)  # int32 and float32 both have four bytes
        self.first = address(self.memory)
        self.row = self.first + 4 * starts
        self.share = self.row + 4 * places

    def route(self, stride: int, logits: int) -> c.RouteOp:
        """Return the op that fills the places from logits (rows, E [+ 1]) at that address."""
        m = self.moe
        shared = m.router.shape[0] - m.num_experts
        op = c.RouteOp(c.ROUTE, self.rows, m.num_experts, m.top_k, m.normalise, shared, logits, stride)
        op.first, op.row, op.share = self.first, self.row, self.share
        return op


class Experts:
    """(gate_up, down) of each expert, the shared one last. `CpuBackend.pack_experts` returns it."""

    def __init__(self, act: str, pairs: Sequence[tuple[CpuWeight, CpuWeight]]) -> None:
        self.act, self.pairs = act, tuple(pairs)  # the headers point into the handles' memory
        self.up, self.down = ((c.CWeight * len(pairs))(*(p[i].header for p in pairs)) for i in (0, 1))
        self.inner = sorted(down.shape[1] for _, down in pairs)

    def inner_size(self, places: Places) -> int:
        """Return the maximum number of values in h, reached if each row uses the widest experts."""
        return places.rows * sum(self.inner[-places.each :])

    def op(self, places: Places, up: bool, exact: bool, x: int, y: int) -> c.ExpertsOp:
        """Return the op for one half of the MLPs, from address x to y (ExpertsOp in kernels/op.h)."""
        op = c.ExpertsOp(c.EXPERTS, places.rows, len(self.pairs), places.each, up, c.ACTS[self.act], exact)
        op.w, op.x, op.y = self.up if up else self.down, x, y
        op.first, op.row, op.share = places.first, places.row, places.share
        return op
