"""Compute a model's logits on a text with one decoder layer in memory at a time.

Two models in memory, one of them dense, would take more memory than the conversion. Here the rows of the text
pass through layer after layer. Only the last rows (T, C), the final norm and the head stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tinychat_mlx.awq.calibration.recorder import Windows, alone, embedded_rows, steps
from tinychat_mlx.awq.output.tensors import rounded_rows
from tinychat_mlx.awq.quality.evaluate import ROWS, Scores
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Graph, Loader, Source
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight

LOGITS = 1 << 22  # logits of one model in memory at once; several arrays of 34 MB in float64


class Rounded:
    """A source of dense weights, rounded plainly to the form of `like`: the result of rtn without writing it."""

    def __init__(self, source: Source, like: Source) -> None:
        self.source, self.like = source, like

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        weight, form = self.source.weight(module, shape), self.like.weight(module, shape)
        if isinstance(weight, Dense) and isinstance(form, Packed):
            return rounded_rows(weight, form.w_bit, form.group_size)
        return weight

    def vector(self, name: str) -> F32:
        return self.source.vector(name)


def streamed(
    config: ModelConfig,
    source: Source,
    backend: Backend,
    ids: Sequence[int],
    window: int,
    watch: Callable[[], None] = lambda: None,
) -> Scores:
    """Run a text through all layers. Returns its logits, for `evaluate` with the same text and window.

    `watch` is called after each layer.
    """
    graph, loader = Graph(config, backend), Loader(config, source, backend)
    return scores_of(graph, loader, last_rows(graph, loader, ids, window, watch))


def scores_of(graph: Graph, loader: Loader, x: F32) -> Scores:
    """Return the logits of a text from the output x (T, C) of the last layer."""
    config, backend = graph.config, graph.backend
    role = "head" if loader.source.has(config.spec.name("head")) else "embed"
    norm, head = (
        loader.final_norm(),
        backend.pack(loader.weight(role, None, config.vocab_size, config.hidden_size)),
    )
    rows = max(1, min(ROWS, LOGITS // config.vocab_size))

    def of(piece: Sequence[int], start: int) -> Iterator[F32]:
        for at in range(start, start + len(piece), rows):
            part = backend.put(x[at : min(at + rows, start + len(piece))])
            yield backend.to_host(graph.logits(part, norm, head))

    return of


def last_rows(
    graph: Graph, loader: Loader, ids: Sequence[int], window: int, watch: Callable[[], None]
) -> F32:
    """Return the output of the last layer (T, C). Every window of the text starts at position 0."""
    config, backend = graph.config, graph.backend
    x = embedded_rows(config, loader.source, backend, np.asarray(ids, np.int32), window)
    windows = Windows(config, backend, window)
    for number in range(config.num_hidden_layers):
        layer = alone(loader.layer(number))
        for piece in steps(len(x), window):
            step = windows.step(piece.stop - piece.start)
            x[piece] = backend.to_host(graph.block(backend.put(x[piece]), layer, step))
        watch()
    return x
