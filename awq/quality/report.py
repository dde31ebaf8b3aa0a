"""Write the report of a conversion: Markdown, JSON, and plots of size, quality loss and layer errors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinychat_mlx.awq.convert import Result
from tinychat_mlx.awq.layer import SiteReport
from tinychat_mlx.awq.output.finish import calibration_text, edge_bits, shown_name
from tinychat_mlx.awq.quality import plot
from tinychat_mlx.awq.quality.evaluate import Quality
from tinychat_mlx.awq.quality.quality_loss import QualityLoss
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import replacing
from tinychat_mlx.weights.shards import write_json

MEAN = "the mean over calibration tokens that the searches did not use"
SITES = (
    "Squared error of the outputs of the linears that read one input, relative to the outputs, on tokens that the "
    "searches did not use. alpha is the exponent of the scales. share is the part of the correction towards the float "
    "model's outputs that was applied:"
)


def write_report(
    folder: Path, source: Checkpoint, result: Result, seconds: float, cost: QualityLoss | None
) -> None:
    """Write report.md, report.json and the plots into `folder`. `cost` is None if only the format changed."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"source": _sizes(source), "result": _sizes(Checkpoint.open(result.folder))}
    said = {"settings": about(result), "seconds": seconds}
    said |= {"source_bytes": source.nbytes, "result_bytes": result.nbytes, "sizes": sizes}
    said["check"] = result.verdict and result.verdict.as_dict()
    said["rejected"] = [{"method": one.method, "layer": one.layer} for one in result.rejected]
    if result.moved is not None:
        said["moved_steps"] = result.moved
    layers = [asdict(layer) for layer in result.layers]
    write_json(folder / "report.json", said | {"quality": cost and cost.as_dict(), "layers": layers})
    plots = {
        "sizes": plot.stacks({k: {p: b / 1e6 for p, b in v.items()} for k, v in sizes.items()}, "Size", "MB")
    }
    if cost is not None:
        plots["quality"] = plot.panels(quality_bars(cost), "Quality loss: distance to the dense model")
    if off := distances(result):
        title = "Distance to the float model's activations behind each layer"
        plots["layers"] = plot.layers(off, title, "layer", "|difference| / |activations|")
    for name, svg in plots.items():
        _write(folder / f"{name}.svg", svg)
    _write(folder / "report.md", _markdown(source, result, seconds, cost))


def about(result: Result) -> dict[str, Any]:
    """Return the settings that had an effect. A change of format keeps the existing codes."""
    settings = result.settings
    if result.moved is None:
        return asdict(settings)
    kept = Checkpoint.open(result.folder).quantization
    return {
        "format": settings.format,
        "w_bit": kept.w_bit,
        "group_size": kept.group_size,
        "method": "codes kept",
    }


def moved_text(moved: float) -> str:
    """Describe how exactly a change of format kept the weights."""
    if moved == 0:
        return "codes, scales and zero points are unchanged"
    return f"codes are unchanged; the stored scales and zero points change a weight by at most {moved:.4f} of a step"


def site_name(layer: int, site: SiteReport) -> str:
    """Return the name of a site for one line of text."""
    return "head" if site.key == "head" else f"layer {layer} {site.key}"


def quality_bars(cost: QualityLoss) -> dict[str, plot.Bars]:
    """Return three distance measures; smaller is better. An unknown error is 0."""
    found = {name: q.as_dict() for name, q in cost.of.items()}

    def of(key: str, factor: float = 1.0, offset: float = 0.0) -> plot.Bars:
        return {
            n: (offset + factor * q[key], abs(factor) * q.get(f"{key}_se", 0.0)) for n, q in found.items()
        }

    return {
        "KL mean, nats": of("kl_mean"),
        "KL 99th percentile, nats": of("kl_p99"),
        "another token first, %": of("top1", -100, 100),
    }


def distances(result: Result) -> dict[str, list[float]]:
    """Return method -> distance to the float model after each layer.

    Empty if no tokens ran through the layers.
    """
    layers = [layer for layer in result.layers if layer.rounded]
    found = {"rtn": [x.rounded for x in layers], result.settings.method: [x.off for x in layers]}
    return found if layers else {}


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bytes on disk per part of the model."""
    spec = parse_config(checkpoint.config).spec
    rim = {role: spec.name(role) for role in ("embed", "head") if checkpoint.has(spec.name(role))}
    named = {role: checkpoint.weight(name).nbytes for role, name in rim.items()}
    words = {"embed": "embedding" if "head" in rim else "embedding and head", "head": "head"}
    return {"layers": checkpoint.nbytes - sum(named.values())} | {words[r]: b for r, b in named.items()}


def _markdown(source: Checkpoint, result: Result, seconds: float, cost: QualityLoss | None) -> str:
    ratio, said = source.nbytes / max(result.nbytes, 1), about(result)
    edges = f"embedding and head {edge_bits(Checkpoint.open(result.folder))} bits"
    lines = [
        f"# {shown_name(source)}: {said['w_bit']} bits, groups of {said['group_size']}, {said['method']}",
        "",
        f"- size: {source.nbytes / 1e6:.1f} MB → {result.nbytes / 1e6:.1f} MB ({ratio:.2f} : 1), {edges}",
        *([f"- calibration: {calibration_text(result.settings)}"] if result.moved is None else []),
        f"- time: {seconds:.0f} s",
        *([f"- check: {result.verdict.text()}"] if result.verdict else []),
        *(f"- {one.text()}; {result.settings.method} was used instead" for one in result.rejected),
        "",
        "![sizes](sizes.svg)",
        "",
        *([moved_text(result.moved).capitalize() + ".", ""] if result.moved is not None else []),
        *(_quality_lines(cost) if cost is not None else []),
        *_layer_lines(result),
    ]
    return "\n".join(lines)


def _quality_lines(cost: QualityLoss) -> list[str]:
    first = next(iter(cost.of.values()))
    measured = (
        f"On {first.tokens} tokens in windows of {first.window} that the calibration did not use "
        f"({cost.text}), against the dense model; ± one standard error:"
    )
    how = (
        "KL is the deciding measure. It compares all probabilities of the two models on the same tokens. Perplexity "
        "depends only on the token that came next. Two perplexities that differ by less than their standard errors are "
        "not distinguishable, and a smaller one does not mean that the model improved."
    )
    return [
        "## The whole model",
        "",
        measured,
        "",
        "| | perplexity | KL mean, nats | KL 99 %, nats | top-1 agreement |",
        "|---|---|---|---|---|",
        f"| dense | {first.told('against_ppl', '.4f')} | | | |",
        *(f"| {name} | {quality_row(q)} |" for name, q in cost.of.items()),
        "",
        how,
        "",
        "![quality](quality.svg)",
        "",
    ]


def quality_row(q: Quality) -> str:
    """Return the cells of a Markdown table row, without the outer bars."""
    return " | ".join(
        q.told(key, form)
        for key, form in {"ppl": ".4f", "kl_mean": ".5f", "kl_p99": ".4f", "top1": ".2%"}.items()
    )


def _layer_lines(result: Result) -> list[str]:
    if not distances(result):  # plain rounding does not measure outputs
        return []
    return [
        "## Layer by layer",
        "",
        f"Distance of the activations after each layer to the float model's, relative to their norm: {MEAN}.",
        "",
        "![layers](layers.svg)",
        "",
        SITES,
        "",
        "| layer | input | rtn | error | alpha | share |",
        "|---|---|---|---|---|---|",
        *(_site_line(i, site) for i, layer in enumerate(result.layers) for site in layer.sites),
        "",
    ]


def _site_line(layer: int, site: SiteReport) -> str:
    said = ["plain rounding kept"] if site.fell_back else []
    notes = "; ".join([*said, *([site.note] if site.note else [])])
    key, place = (f"{site.key} ({notes})" if notes else site.key), "head" if site.key == "head" else layer
    return f"| {place} | {key} | {site.rtn:.2e} | {site.error:.2e} | {site.alpha:.2f} | {site.share:.2f} |"


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
