"""The report of a conversion: Markdown, JSON, and plots of what each layer lost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tinychat_mlx.awq.convert import Result
from tinychat_mlx.awq.finish import calibration_text
from tinychat_mlx.awq.layer import SiteReport
from tinychat_mlx.awq.plot import bars
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.shards import write_json
from tinychat_mlx.tensorfile import replacing

Series = dict[str, list[float]]


def write_report(
    folder: Path, source: Checkpoint, result: Result, settings: Settings, seconds: float
) -> None:
    """Write report.md, report.json and a plot for each site into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = [[asdict(site) for site in layer] for layer in result.layers]
    sizes = {"source_bytes": source.nbytes, "result_bytes": result.nbytes}
    write_json(
        folder / "report.json",
        {"settings": asdict(settings), "seconds": seconds, **sizes, "layers": layers},
    )
    plots = {}
    for key, series in by_site(result.layers, settings.method).items():
        plots[key] = f"error-{key}.svg"
        _write(folder / plots[key], bars(series, f"{key}: output error by layer", "layer", "error / output"))
    _write(folder / "report.md", _markdown(source, result, settings, seconds, plots))


def methods(site: SiteReport, method: str) -> dict[str, float]:
    """Error of each method that was tried at a site."""
    return {"rtn": site.rtn, **site.others, method: site.error}


def by_site(layers: tuple[tuple[SiteReport, ...], ...], method: str) -> dict[str, Series]:
    """-> site -> method -> error of each layer."""
    out: dict[str, Series] = {}
    for layer in layers:
        for site in layer:
            for name, error in methods(site, method).items():
                out.setdefault(site.key, {}).setdefault(name, []).append(error)
    return out


def _markdown(
    source: Checkpoint, result: Result, settings: Settings, seconds: float, plots: dict[str, str]
) -> str:
    ratio, edges = source.nbytes / max(result.nbytes, 1), f"embedding and head {settings.head_bits} bits"
    lines = [
        f"# {source.folder.resolve().name}: {settings.w_bit} bits, groups of {settings.group_size}, {settings.method}",
        "",
        f"- size: {source.nbytes / 1e6:.1f} MB → {result.nbytes / 1e6:.1f} MB ({ratio:.2f} : 1), {edges}",
        f"- calibration: {calibration_text(settings)}",
        f"- time: {seconds:.0f} s",
        "",
        "Mean squared error of the linears' outputs over their mean square, on the calibration text:",
        "",
    ]
    names = list(methods(result.layers[0][0], settings.method)) if result.layers else []
    if names:
        lines += [f"| layer | input | {' | '.join(names)} | alpha |", "|" + "---|" * (len(names) + 3)]
    for i, layer in enumerate(result.layers):
        for site in layer:
            errors = " | ".join(f"{e:.2e}" for e in methods(site, settings.method).values())
            plain = " (plain rounding kept: the error did not fall)" if site.fell_back else ""
            lines.append(f"| {i} | {site.key}{plain} | {errors} | {site.alpha:.2f} |")
    lines += ["", *(f"![{key}]({name})" for key, name in plots.items())]
    command = f"tinychat eval -m {result.folder} --against {source.folder} --text FILE"
    lines += ["", f"Perplexity, KL and top-1 agreement on a text of your own: `{command}`", ""]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
