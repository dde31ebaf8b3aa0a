"""tinychat convert: quantise a model, or change the format of a quantised one."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx.apps.conversion_progress import Screen
from tinychat_mlx.apps.options import check_writable
from tinychat_mlx.apps.setting_table import BACKENDS
from tinychat_mlx.apps.terminal import wrapped
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.base.wording import lasting, size

if TYPE_CHECKING:
    from tinychat_mlx.awq.convert import Result
    from tinychat_mlx.awq.quality.quality_loss import QualityLoss
    from tinychat_mlx.awq.settings import Settings
    from tinychat_mlx.awq.time_estimate import Estimate
    from tinychat_mlx.contract import Backend
    from tinychat_mlx.weights.checkpoint import Checkpoint


# Options that affect only the quantisation and its report.
QUANTISING = ("method", "w_bit", "group_size", "head", "calib", "calib_tokens", "seed", "report_text")


@click.command()
@click.argument("source", metavar="SRC")
@click.option(
    "-o", "--output", "target", metavar="DST", type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--method", type=click.Choice(["rtn", "awq", "awq+"]), default="awq+", show_default=True,
              help="Plain rounding, the published AWQ, or AWQ with error feedback.")  # fmt: skip
@click.option(
    "--w-bit", type=click.Choice(["3", "4", "8"]), default="4", show_default=True, help="Bits per weight."
)
@click.option("--group-size", type=click.Choice(["auto", "32", "64", "128"]), default="auto", show_default=True,
              help="Inputs that share a scale (auto: the largest that fits every matrix).")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["mlx", "awq"]), default="mlx", show_default=True,
              help="MLX affine, or AutoAWQ GEMM (vLLM, SGLang, transformers).")  # fmt: skip
@click.option("--head", type=click.Choice(["int8", "int4", "fp16"]), default="int8", show_default=True,
              help="Embedding and head (AutoAWQ keeps them in fp16).")  # fmt: skip
@click.option("--calib", default="self", show_default=True, metavar="FILE|self|HUB_ID",
              help="Calibration text: .txt, .jsonl chats, a dataset's id, or the model's own.")  # fmt: skip
@click.option("--calib-tokens", type=click.IntRange(0), default=0, metavar="N",
              help="Calibration tokens (0: chosen by the model's size).")  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume an interrupted conversion: byte-identical result.")
@click.option("--force", is_flag=True, help="Overwrite an existing model; ignore the memory and disk check.")
@click.option("--dry-run", is_flag=True, help="Print time, memory and disk; write nothing.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
              help="Backend for the calibration.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.")
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Write a report: Markdown, JSON, plots."
)
@click.option("--report-text", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Text to measure on (default: calibration text that was not used).")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of the calibration text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def convert(source: str, target: Path | None, **options: Any) -> None:
    """Quantise SRC (a folder or a Hugging Face id) into the folder DST.

    A quantised SRC keeps its codes; only its format changes.
    """
    from tinychat_mlx.apps.models.download import folder_of
    from tinychat_mlx.awq.parallel import limited
    from tinychat_mlx.awq.settings import Settings
    from tinychat_mlx.model.config import parse_config
    from tinychat_mlx.weights.checkpoint import Checkpoint

    if target is None and not options["dry_run"]:
        raise click.UsageError("missing -o DST, the folder to write")
    if options["report_text"] is not None and options["report"] is None:
        raise click.UsageError("--report-text is for --report DIR")
    settings = Settings(
        method=options["method"], w_bit=int(options["w_bit"]), group_size=_group_size(options["group_size"]),
        format=options["form"], head=options["head"], calib=options["calib"], tokens=options["calib_tokens"],
        seed=options["seed"],
    )  # fmt: skip
    target = Path(os.path.abspath(target)) if target is not None else Path.cwd() / "converted"
    if not options["dry_run"]:
        _check_places(source, target, options)
    checkpoint = Checkpoint.open(folder_of(source))
    _refuse_unused(checkpoint)
    if checkpoint.quantization.format == "dense":
        settings = settings.resolved(parse_config(checkpoint.config))
    with limited(options["threads"]):
        if options["dry_run"]:
            _dry_run(checkpoint, target, settings, options)
        else:
            _convert(checkpoint, target, settings, options)


def _group_size(option: str) -> int:
    return 0 if option == "auto" else int(option)


def _check_places(source: str, target: Path, options: dict[str, Any]) -> None:
    """Check the output paths before any download. Raises UsageError."""
    from tinychat_mlx.awq.output_path import check_target

    if not options["resume"]:  # with --resume the finished folder may exist
        check_target(Path(source) if Path(source).is_dir() else None, target, options["force"])
    check_writable(target, "-o")
    if options["report"] is not None:
        check_writable(options["report"], "--report")


def _refuse_unused(source: Checkpoint) -> None:
    """Raise UsageError for options that a change of format ignores, and if nothing would change."""
    from click.core import ParameterSource

    if source.quantization.format == "dense":
        return
    ctx, what = click.get_current_context(), source.quantization.describe()
    given = {
        p.name: p.opts[-1]
        for p in ctx.command.params
        if ctx.get_parameter_source(p.name or "") == ParameterSource.COMMANDLINE
    }
    for name in given.keys() & set(QUANTISING):
        raise UsageError(
            f"this model is quantised already ({what}) and keeps its codes",
            where=source.folder,
            remedy=f"leave out {given[name]}, or give the original model",
        )
    if source.quantization.format == ctx.params["form"] and "form" not in given:
        raise UsageError(
            f"this model is {what} already",
            where=source.folder,
            remedy="use it as it is, convert its original model, or change its format with --format awq",
        )


def _backend(options: dict[str, Any], exact: bool) -> Backend:
    from tinychat_mlx.open import choose, create

    return create(choose(options["backend"])[0], exact, options["threads"])


def _convert(source: Checkpoint, target: Path, settings: Settings, options: dict[str, Any]) -> None:
    from tinychat_mlx.awq.calibration.tokens import calibration_ids
    from tinychat_mlx.awq.convert import convert as run

    _check_report(source, options)
    start, before = time.perf_counter(), _identity(target)
    screen = Screen(quiet=options["as_json"])
    try:
        with screen.shown():
            result = run(
                source, target, settings, lambda exact: _backend(options, exact), calibration_ids,
                screen.show, options["resume"], options["force"],
            )  # fmt: skip
    except KeyboardInterrupt:
        now = _identity(target)
        there = "missing" if now is None else "unchanged" if now == before else "finished"
        note = f"interrupted: {target} is {there}; repeat the command with --resume to continue"
        click.echo(wrapped(note, sys.stderr), err=True)
        raise
    seconds = time.perf_counter() - start
    cost = _report(source, result, options, seconds, screen) if options["report"] else None
    _say(source, result, seconds, cost, options["as_json"])


def _identity(folder: Path) -> int | None:
    """Return a value that differs between a folder and another with the same name."""
    return folder.stat().st_ino if folder.exists() else None


def _check_report(source: Checkpoint, options: dict[str, Any]) -> None:
    """Check the report's text before any work. Raises UsageError."""
    from tinychat_mlx.awq.quality.quality_loss import check_text

    if options["report_text"] is not None:
        check_text(source, options["report_text"])


def _report(
    source: Checkpoint,
    result: Result,
    options: dict[str, Any],
    seconds: float,
    screen: Screen,
) -> QualityLoss | None:
    """Measure the finished model and write the report. A change of format is not measured."""
    from tinychat_mlx.awq.quality.quality_loss import cost
    from tinychat_mlx.awq.quality.report import write_report
    from tinychat_mlx.weights.checkpoint import Checkpoint

    measured = None
    if source.quantization.format == "dense":
        with screen.shown():
            small, text = Checkpoint.open(result.folder), options["report_text"]
            measured = cost(
                source,
                small,
                result.settings,
                lambda exact: _backend(options, exact),
                text,
                screen.show,
                result.ids,
            )
    folder = options["report"]
    write_report(folder, source, result, seconds, measured)
    click.echo(f"wrote {folder / 'report.md'}", err=True)
    return measured


def _say(source: Checkpoint, result: Result, seconds: float, cost: QualityLoss | None, as_json: bool) -> None:
    from dataclasses import asdict

    from tinychat_mlx.awq.quality.report import about, moved_text, site_name

    fallen = [site_name(i, s) for i, layer in enumerate(result.layers) for s in layer.sites if s.fell_back]
    if as_json:
        summary = {
            "folder": str(result.folder), "bytes": result.nbytes, "source_bytes": source.nbytes,
            "seconds": seconds, "settings": about(result), "plain_rounding": fallen,
            "layers": [asdict(layer) for layer in result.layers],
            "check": result.verdict.as_dict() if result.verdict else None,
            "rejected": [{"method": r.method, "layer": r.layer, "check": r.verdict.as_dict()} for r in result.rejected],
            "quality": cost.as_dict() if cost else None,
        }  # fmt: skip
        if result.moved is not None:
            summary["moved_steps"] = result.moved
        click.echo(json.dumps(summary))
        return
    share = result.nbytes / source.nbytes
    click.echo(
        f"{result.folder}: {result.nbytes / 1e6:.1f} MB, {share:.0%} of {source.nbytes / 1e6:.1f} MB, "
        f"in {seconds:.0f} s"
    )
    if result.moved is not None:
        click.echo(moved_text(result.moved))
    if result.verdict is not None:
        click.echo(result.verdict.text())
    if cost is not None:
        q = cost.of[result.settings.method]
        click.echo(
            f"perplexity {q.ppl:.3f} (dense {q.against_ppl:.3f}), KL {q.told('kl_mean', '.5f')}, "
            f"top-1 {q.top1:.2%}, on {q.tokens} tokens: {cost.text}"
        )
    for rejected in result.rejected:
        click.echo(f"{rejected.text()}; {result.settings.method} was used instead", err=True)
    if fallen:
        click.echo(f"plain rounding was used, because nothing was better: {', '.join(fallen)}", err=True)


def _dry_run(source: Checkpoint, target: Path, settings: Settings, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    from tinychat_mlx.awq.resources import shortage
    from tinychat_mlx.awq.time_estimate import estimate

    found = estimate(source, settings, lambda exact: _backend(options, exact))
    lacks = shortage(found, target)
    if options["as_json"]:
        form = {"w_bit": settings.w_bit, "group_size": settings.group_size} if settings.group_size else {}
        click.echo(json.dumps(asdict(found) | form | {"lacks": lacks or None}))
        return
    if settings.group_size:  # a quantised source has none: it keeps its codes
        click.echo(f"form    {settings.form_text}")
    click.echo(
        f"time    about {lasting(found.seconds)} on this machine\n"
        f"memory  about {_bytes(found.peak_bytes)} at its peak{_memory_parts(found)}\n"
        f"disk    {_bytes(found.disk_bytes)} while it runs, {_bytes(found.result_bytes)} in the end"
    )
    if lacks:
        click.echo(f"lacks   {lacks}")


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else size(n)


def _memory_parts(found: Estimate) -> str:
    """Format the parts of the peak memory."""
    parts = []
    if found.own_text_bytes:
        parts.append(f"{_bytes(found.own_text_bytes)} while the whole model, at 8 bits, writes its own text")
    if found.layer_bytes:
        one = f"one decoder layer of float weights ({_bytes(found.layer_bytes)}), its activations and codes"
        parts.append(f"{_bytes(found.layers_bytes)} with {one}")
    return f": {'; '.join(parts)}" if parts else ""
