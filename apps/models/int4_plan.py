"""Facts about a model after a conversion to int4, computed from its shapes."""

from __future__ import annotations

from dataclasses import replace

from tinychat_mlx.awq.settings import Settings, quantised_shapes
from tinychat_mlx.inspect import ModelInfo
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.parts import Part, sketch


def as_int4(found: ModelInfo, settings: Settings) -> ModelInfo:
    """Return the facts of the model that `tinychat convert` would write for a dense model."""
    assert found.config is not None
    settings = settings.resolved(found.config)
    body = sum(n * k for _, n, k in quantised_shapes(found.config))
    inner = f"int{settings.w_bit} g{settings.group_size}"
    rim = "fp16" if settings.head_bits == 16 else f"int{settings.head_bits} g{settings.group_size}"
    parts = []
    for part in found.parts:
        rest = part.parameters
        if part.name.startswith("layers"):
            parts.append(_stated(part, inner, min(body, rest)))
            body, rest = body - min(body, rest), rest - min(body, rest)
        form = rim if "embedding" in part.name or part.name == "head" else "fp16"
        parts += [_stated(part, form, rest)] if rest else []
    nbytes = sum(p.nbytes for p in parts)
    return replace(found, parts=tuple(parts), modules=(), nbytes=nbytes)


def of_shape(name: str, config: ModelConfig, tied: bool, head: str) -> ModelInfo:
    """Return the facts of a model of these sizes, as if converted. tied: embedding and head are one tensor."""
    body, rim = sum(n * k for _, n, k in quantised_shapes(config)), config.vocab_size * config.hidden_size
    outer = ["embedding and head"] if tied else ["embedding", "head"]
    parts = tuple(Part(part, "fp16", 1, n, 2 * n, sketch("fp16")) for part, n in
                  [("layers", body), *((o, rim) for o in outer)])  # fmt: skip
    whole = ModelInfo(name, None, config.spec.model_type, parts, (), 0, config, {}, False, "")
    return as_int4(whole, Settings(head=head))


def _stated(part: Part, form: str, parameters: int) -> Part:
    """Return this number of a part's weights in another form, as tinychat writes it."""
    sample = None if part.sample is None else sketch(form, zeros=True)
    bits = 16.0 if form == "fp16" else int(form[3]) + 32 / int(form.partition(" g")[2])
    return replace(part, form=form, parameters=parameters, nbytes=round(parameters * bits / 8), sample=sample)
