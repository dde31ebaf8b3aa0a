"""The head, where it is a tensor of its own and gets 4 bits: one site more, behind the last layer.

The final norm makes its input and, with awq, absorbs 1/s; softcap and logit scale come after it and see the
same numbers. awq+ feeds errors back and scales nothing (see layer.py). Both look at the float model's rows: a
head made to make good for the quantised layers as well lost more on held-out text.

A head tied to the embedding cannot be scaled, for its columns are also what the tokens become: it is rounded,
as every embedding is. At 8 bits rounding costs 0.00001 nats, so there nothing is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tinychat_mlx.awq.layer import (
    Attempt,
    Form,
    Moments,
    SiteReport,
    clipped,
    factored,
    fed_codes,
    quantize_site,
)
from tinychat_mlx.awq.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.record import steps
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sites import LayerWeights, Site
from tinychat_mlx.awq.tensors import joined_rows
from tinychat_mlx.backend import Backend
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.decoder import Loader, Source
from tinychat_mlx.formats.mlx import float_entry, mlx_entries
from tinychat_mlx.tensorfile import Entry
from tinychat_mlx.weight import F32, Dense, to_float32

SITE = Site("head", ("head",), "final_norm")
ROWS = 8192  # of the head in float32 at once; the scales are chosen by as many, spread evenly over all


def is_site(config: ModelConfig, source: Source, settings: Settings) -> bool:
    """Whether the head is more than rounded."""
    return settings.method != "rtn" and settings.head_bits == 4 and source.has(config.spec.name("head"))


def head_form(settings: Settings) -> Form:
    return Form(settings.head_bits, settings.group_size)


def head_moments(
    config: ModelConfig, source: Source, backend: Backend, x: F32, form: Form, method: str
) -> Moments:
    """What leaves the last layer of the float model, x (T, C) -> moments of what the head reads."""
    norm, k = Loader(config, source, backend).final_norm(), config.hidden_size
    moments: Moments = FullMoments.empty(k) if method == "awq+" else BlockMoments.empty(k, form.group_size)
    for rows in steps(len(x), 1):
        moments.add(backend.to_host(backend.norm(backend.put(x[rows]), norm)))
    return moments


@dataclass(frozen=True)
class Head:
    """The head on its way into codes: what was chosen by some of its rows holds for all."""

    weights: LayerWeights  # of those rows, with the final norm as it will be stored
    matrix: Dense
    moments: Moments
    form: Form
    chosen: Attempt
    report: SiteReport

    @classmethod
    def chosen_by(
        cls, config: ModelConfig, source: Source, moments: Moments, form: Form, compare: bool
    ) -> Head:
        """Search scales as for any other site, by up to ROWS rows."""
        matrix = source.weight(config.spec.name("head"), (config.vocab_size, config.hidden_size))
        assert isinstance(matrix, Dense)
        rows = to_float32(matrix.w[:: -(-len(matrix.w) // ROWS)])
        names = [f"{config.spec.name('final_norm')}.{end}" for end in ("weight", "bias")]
        vectors = {name: np.array(source.vector(name), np.float32) for name in names if source.has(name)}
        weights = LayerWeights(config, config.num_hidden_layers, {"head": rows}, {}, vectors)
        chosen, report = quantize_site(weights, SITE, moments, form, compare)
        return cls(chosen.weights, matrix, moments, form, chosen, report)

    def stripes(self) -> Iterator[Quantized]:
        """All rows as codes, ROWS at a time: rows of a weight do not meet."""
        code = self._coder()
        for at in range(0, len(self.matrix.w), ROWS):
            yield code(to_float32(self.matrix.w[at : at + ROWS]))

    def _coder(self) -> Callable[[F32], Quantized]:
        """-> rows (N, K) -> their codes."""
        form, s, moments = self.form, self.chosen.s, self.moments
        if self.report.fell_back:
            return lambda w: round_to_nearest(w, form.w_bit, form.group_size)
        if isinstance(moments, FullMoments):
            order, h, f = factored(moments, form)  # once for all stripes
            return lambda w: fed_codes(np.ascontiguousarray(w.T[order]), order, f, h, form)

        def searched(w: F32) -> Quantized:
            scaled = replace(self.weights, linears={"head": w * s})
            return clipped(scaled, SITE, moments, s, form)["head"]

        return searched

    def entries(self, watch: Callable[[int, int], None]) -> list[Entry]:
        """The head and the final norm, as they are stored. watch(done, total): after each stripe."""
        total = -(-len(self.matrix.w) // ROWS)

        def watched() -> Iterator[Quantized]:
            for done, stripe in enumerate(self.stripes(), 1):
                watch(done, total)
                yield stripe

        tensors = mlx_entries(joined_rows(self.matrix, watched()))
        return tensors + [float_entry(name, v, "F16") for name, v in self.weights.vectors.items()]
