"""Mixture of experts on the device: routing, and products with weights selected by index.

With kernels, neither a decode step nor a prefill waits for the device. For few rows experts_up and
experts_down find the weights by expert number. Many rows are sorted by expert with torch, and gemm_experts
reads the bounds from the device. In plain torch the experts run one after another and need the routing on the
host: one wait per layer. Dense experts, and int4 experts of different forms, use the same path.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinychat_mlx.backends.cuda.kernels import ACTS, Kernels, can_glu, pointer
from tinychat_mlx.backends.cuda.weights import TiledHandle
from tinychat_mlx.contract import Mlp, Moe

ROWS = 128  # of one block of gemm_experts
MOST_SLOTS, MOST_EXPERTS = 32, 1024  # of experts_down, of route_rows


class Experts:
    """The result of `pack_experts`: each expert's MLP, the shared one last, and tables of weight addresses."""

    def __init__(self, mlps: Sequence[Mlp], device: torch.device) -> None:
        self.mlps = tuple(mlps)  # keeps the addressed memory alive
        self.alike = 0  # the number of leading experts with the same form
        while self.alike < len(mlps) and _form(mlps[self.alike]) == _form(mlps[0]) is not None:
            self.alike += 1
        alike = mlps[: self.alike]
        self.up = _addresses([m.gate_up for m in alike], device)
        self.down = _addresses([m.down for m in alike], device)

    def on_kernels(self, moe: Moe) -> bool:
        """Return whether the routed experts of this mixture have one form that the kernels support."""
        return moe.num_experts <= min(self.alike, MOST_EXPERTS) and moe.top_k <= MOST_SLOTS

    def shared(self, moe: Moe) -> Mlp | None:
        return self.mlps[moe.num_experts] if moe.router.shape[0] > moe.num_experts else None


def _form(mlp: Mlp) -> tuple[object, ...] | None:
    """Return what experts of one table must have in common, or None if no kernel supports them."""
    up, down = mlp.gate_up, mlp.down
    if not (isinstance(up, TiledHandle) and isinstance(down, TiledHandle) and can_glu(up)):
        return None
    return tuple(x for w in (up, down) for x in (w.shape, w.w_bit, w.group_size))


def _addresses(handles: Sequence[object], device: torch.device) -> torch.Tensor:
    """Return (E, 3) int64: the addresses of each weight's codes, scales and bias (0: no bias)."""
    rows = [
        [w.codes.data_ptr(), w.scales.data_ptr(), 0 if w.bias is None else w.bias.data_ptr()]
        for w in handles
        if isinstance(w, TiledHandle)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)


def route(logits: torch.Tensor, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract's `route` in torch: logits (T, E [+ 1]) -> (T, k) int32, (T, k [+ 1]) float32."""
    p, order = torch.sort(
        torch.softmax(logits[:, : moe.num_experts].float(), -1), descending=True, stable=True
    )
    share = p[:, : moe.top_k]
    if moe.normalise:
        share = share / share.sum(-1, keepdim=True)
    shared = torch.sigmoid(logits[:, moe.num_experts :].float())
    return order[:, : moe.top_k].int(), torch.cat((share, shared), -1)


def apart(
    h: torch.Tensor, logits: torch.Tensor, moe: Moe, mlp: Callable[[torch.Tensor, Mlp], torch.Tensor]
) -> torch.Tensor:
    """Return the weighted sum of each row's experts (T, C) float32 for h (T, C), one expert after another."""
    experts: Experts = moe.experts
    choice, share = route(logits, moe)
    y = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    host = choice.cpu()  # waits for the device; the host needs the rows of each expert
    for e in sorted(set(host.flatten().tolist())):
        t, slot = (i.to(h.device) for i in torch.nonzero(host == e, as_tuple=True))
        y[t] += share[t, slot, None] * mlp(h[t], experts.mlps[e])
    shared = experts.shared(moe)
    return y if shared is None else y + share[:, moe.top_k :] * mlp(h, shared)


# on kernels -----------------------------------------------------------------------------------------


def _int(*values: int) -> list[ctypes.c_int]:
    return [ctypes.c_int(v) for v in values]


def route_rows(on: Kernels, logits: torch.Tensor, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `route` in one launch. logits: float32, rows contiguous."""
    rows, width = logits.shape
    k, shares = moe.top_k, moe.top_k + width - moe.num_experts
    choice, share = on.new((rows, k), torch.int32), on.new((rows, shares), torch.float32)
    sizes = _int(moe.num_experts, k, shares, logits.stride(0), moe.normalise)
    arguments = [pointer(logits), pointer(choice), pointer(share), *sizes]
    on.launcher.launch("rows", {}, "route_rows", [rows], 32, arguments)
    return choice, share


@dataclass(frozen=True)
class Mixture:
    """Processes some rows with their experts on kernels. other (T, C) float32: the shared expert's results."""

    on: Kernels
    moe: Moe
    choice: torch.Tensor
    share: torch.Tensor
    other: torch.Tensor | None
    residual: torch.Tensor | None

    def _launch(
        self, program: str, w: TiledHandle, kernel: str, grid: Sequence[int], *arguments: object
    ) -> None:
        defines = {"BITS": w.w_bit, "GROUP": w.group_size}
        self.on.launcher.launch(program, defines, kernel, grid, 256, arguments)

    def few(self, h: torch.Tensor) -> torch.Tensor:
        """h (T ≤ 8, C) half -> (T, C) float32. Reads each row's experts once, in two launches."""
        experts: Experts = self.moe.experts
        up, down = experts.mlps[0].gate_up, experts.mlps[0].down
        assert isinstance(up, TiledHandle) and isinstance(down, TiledHandle)
        (rows, slots), (n, f) = self.choice.shape, down.shape
        inner = self.on.new((rows, slots, f), torch.float16)
        self._launch(
            "experts", up, "experts_up", [f // 16, rows * slots],
            pointer(experts.up), pointer(self.choice), pointer(h), pointer(inner),
            *_int(f, n, slots, ACTS[self.moe.act]),
        )  # fmt: skip
        y = self.on.new((rows, n), torch.float32)
        self._launch(
            "experts", down, "experts_down", [down.codes.shape[0], rows],
            pointer(experts.down), pointer(self.choice), pointer(self.share), pointer(inner), pointer(self.other),
            pointer(self.residual), pointer(y), *_int(n, f, slots, self.share.shape[1]),
        )  # fmt: skip
        return y

    def many(self, h: torch.Tensor) -> torch.Tensor:
        """h (T, C) half -> (T, C) float32.

        Rows are sorted by expert, so each expert's weights are read for all its rows.
        """
        experts: Experts = self.moe.experts
        slots, act = self.choice.shape[1], self.moe.act
        flat = self.choice.flatten()
        ordered, order = torch.sort(flat, stable=True)
        first = torch.searchsorted(
            ordered, torch.arange(self.moe.num_experts + 1, dtype=torch.int32, device=h.device)
        )
        pieces = torch.zeros_like(first)
        pieces[1:] = (-(-first.diff() // ROWS)).cumsum(0)
        bounds = first.int(), pieces.int()
        inner = self.on.glu(self._grouped(h, (order // slots).int(), "gate_up", experts.up, bounds), act)
        z = self._grouped(inner, None, "down", experts.down, bounds)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=h.device)
        return self._combine(z, place.int())

    def _grouped(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        part: str,
        table: torch.Tensor,
        bounds: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Multiply rows of x, sorted by expert, with their experts' weights -> (P, N) half."""
        w = getattr(self.moe.experts.mlps[0], part)
        (n, k), experts, places = w.shape, self.moe.num_experts, self.choice.numel()
        y = self.on.new((places, n), torch.float16)
        most = places // ROWS + min(experts, places)  # an expert's last piece need not be full
        self._launch(
            "gemm", w, "gemm_experts", [-(-n // 128), most],
            pointer(table), *(pointer(b) for b in bounds), pointer(rows), pointer(x), pointer(y), *_int(n, k, experts),
        )  # fmt: skip
        return y

    def _combine(self, z: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        rows, n = self.choice.shape[0], z.shape[1]
        y = self.on.new((rows, n), torch.float32)
        arguments = [
            pointer(z), pointer(place), pointer(self.share), pointer(self.other), pointer(self.residual), pointer(y),
            *_int(n, self.choice.shape[1], self.share.shape[1]),
        ]  # fmt: skip
        self.on.launcher.launch("rows", {}, "combine_rows", [-(-n // 256), rows], 256, arguments)
        return y
