"""Record one decode step as a CUDA graph and replay it with one launch per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from tinychat_mlx.contract import Cache, Step, StepFn


@dataclass(eq=False)
class Recorded:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor


class Replay:
    """A step function of one row and one segment.

    Each cache has a separate graph, which contains its addresses.

    The first call with a cache runs eagerly and compiles missing kernels. The second call records. The logits
    are the graph's memory: the next call with the same cache overwrites them.
    """

    def __init__(self, fn: StepFn, recordable: Callable[[], bool]) -> None:
        """recordable: called after the first call; returns whether the step read no host state that changes."""
        self.fn, self.recordable = fn, recordable
        self.seen: WeakKeyDictionary[Cache, Recorded | None] = WeakKeyDictionary()
        self.replays = 0

    def __call__(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        cache = step.segments[0].cache
        if cache not in self.seen or not self.recordable():
            self.seen[cache] = None
            logits: torch.Tensor = self.fn(ids, step)
            return logits
        recorded = self.seen[cache]
        if recorded is None:
            recorded = self.seen[cache] = self.record(ids, step)
        recorded.ids.copy_(ids)
        recorded.positions.copy_(step.positions)
        recorded.graph.replay()
        self.replays += 1
        return recorded.logits

    def record(self, ids: torch.Tensor, step: Step) -> Recorded:
        """Record the step.

        Every kernel reads the position from device memory, so one graph serves all lengths.
        """
        own_ids, own_positions = ids.clone(), step.positions.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            logits = self.fn(own_ids, Step(step.segments, own_positions))
        return Recorded(graph, own_ids, own_positions, logits)
