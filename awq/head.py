"""Quantise the head to 4 bits as one more site after the last layer, if it is a separate tensor.

The final norm produces the head's input and, with awq, absorbs 1/s. Softcap and logit scale follow and see
the same numbers. awq+ applies error feedback without scales (see layer.py). Both use the float model's rows:
a head that also corrects the quantised layers lost more on held-out text.

A head tied to the embedding cannot be scaled, because its columns are also the token embeddings. It is
rounded like every embedding. At 8 bits rounding costs 0.00001 nats, so no search is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.calibration.recorder import steps
from tinychat_mlx.awq.calibration.rows import Split
from tinychat_mlx.awq.layer import (
    Attempt,
    Factored,
    Form,
    Held,
    Moments,
    SiteReport,
    clipped,
    fed_codes,
    feed_site,
    publish_site,
)
from tinychat_mlx.awq.output.tensors import joined_rows
from tinychat_mlx.awq.search.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.sites import LayerWeights, Site
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Loader, Source
from tinychat_mlx.weights.formats.mlx import float_entry, mlx_entries
from tinychat_mlx.weights.safetensors import Entry
from tinychat_mlx.weights.weight import F32, Dense, to_float32

SITE = Site("head", ("head",), "final_norm")
ROWS = 8192  # rows of the head in float32 at once; the scales are chosen with as many evenly spread rows


def is_site(config: ModelConfig, source: Source, settings: Settings) -> bool:
    """Return whether the head is quantised as a site instead of rounded."""
    return settings.method != "rtn" and settings.head_bits == 4 and source.has(config.spec.name("head"))


def head_form(settings: Settings) -> Form:
    return Form(settings.head_bits, settings.group_size)


def head_inputs(
    config: ModelConfig, source: Source, backend: Backend, x: F32, split: Split, form: Form, method: str
) -> tuple[Moments, Held]:
    """Return moments and held-out rows of the head's input, from the float model's last activations x (T, C)."""
    norm, k = Loader(config, source, backend).final_norm(), config.hidden_size
    moments: Moments = FullMoments.empty(k) if method == "awq+" else BlockMoments.empty(k, form.group_size)

    def read(rows: slice) -> F32:
        return backend.to_host(backend.norm(backend.put(x[rows]), norm))

    for rows in steps(split.fit, 1):
        moments.add(read(rows))
    held = read(slice(split.fit, split.seen))
    return moments, Held(held, held)


@dataclass(frozen=True)
class Head:
    """The head during quantisation. Choices made on a sample of its rows apply to all rows."""

    weights: LayerWeights  # the sampled rows, with the final norm as it will be stored
    matrix: Dense
    found: Factored | BlockMoments  # of the head's input
    form: Form
    chosen: Attempt
    report: SiteReport

    @classmethod
    def chosen_by(cls, config: ModelConfig, source: Source, moments: Moments, held: Held, form: Form) -> Head:
        """Search scales as for other sites, on up to ROWS rows."""
        matrix = source.weight(config.spec.name("head"), (config.vocab_size, config.hidden_size))
        assert isinstance(matrix, Dense)
        rows = to_float32(matrix.w[:: -(-len(matrix.w) // ROWS)])
        names = [f"{config.spec.name('final_norm')}.{end}" for end in ("weight", "bias")]
        vectors = {name: np.array(source.vector(name), np.float32) for name in names if source.has(name)}
        weights = LayerWeights(config, config.num_hidden_layers, {"head": rows}, {}, vectors)
        if isinstance(moments, FullMoments):
            ones = np.ones(config.hidden_size, np.float32)
            made = Factored.of(moments, form)
            chosen, report = feed_site(weights, SITE, moments, made, held, form, ones, 0.0)
            return cls(chosen.weights, matrix, made, form, chosen, report)
        chosen, report = publish_site(weights, SITE, moments, held, form)
        return cls(chosen.weights, matrix, moments, form, chosen, report)

    def stripes(self) -> Iterator[Quantized]:
        """Yield the codes of all rows, ROWS at a time. Rows are quantised independently."""
        code = self._coder()
        for at in range(0, len(self.matrix.w), ROWS):
            yield code(to_float32(self.matrix.w[at : at + ROWS]))

    def _coder(self) -> Callable[[F32], Quantized]:
        """Return a function from rows (N, K) to their codes."""
        form, s, found = self.form, self.chosen.s, self.found
        if self.report.fell_back:
            return lambda w: round_to_nearest(w, form.w_bit, form.group_size)
        if isinstance(found, Factored):
            return lambda w: fed_codes(np.ascontiguousarray(w.T[found.order]), found, form)

        def searched(w: F32) -> Quantized:
            scaled = replace(self.weights, linears={"head": w * s})
            return clipped(scaled, SITE, found, s, form)["head"]

        return searched

    def entries(self, watch: Callable[[int, int], None]) -> list[Entry]:
        """Return the head and the final norm as stored. Calls watch(done, total) after each stripe."""
        total = -(-len(self.matrix.w) // ROWS)

        def watched() -> Iterator[Quantized]:
            for done, stripe in enumerate(self.stripes(), 1):
                watch(done, total)
                yield stripe

        tensors = mlx_entries(joined_rows(self.matrix, watched()))
        return tensors + [float_entry(name, v, "F16") for name, v in self.weights.vectors.items()]
