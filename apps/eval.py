"""tinychat eval: the perplexity of a model on a text, and its difference from another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx.apps.setting_table import BACKENDS
from tinychat_mlx.base.errors import UsageError

if TYPE_CHECKING:
    from tinychat_mlx.awq.quality.evaluate import Quality
    from tinychat_mlx.loaded_model import Model


@click.command("eval")
@click.option("-m", "--model", default="demo", show_default=True, metavar="MODEL", help="Model to measure.")
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .txt, or .jsonl chats."
)
@click.option(
    "--against", metavar="MODEL", help="The dense model to compare with: adds KL and top-1 agreement."
)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, metavar="N",
              help="Tokens per window; perplexities of different windows are not comparable.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Measure the first N tokens only.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Device backend."
)
@click.option("--exact", is_flag=True, help="Activations in full precision, not int8.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(model: str, text: Path, against: str | None, **options: Any) -> None:
    """Measure the quality loss of quantisation."""
    from tinychat_mlx.apps.models.download import folder_of
    from tinychat_mlx.awq.calibration.recorder import window_of
    from tinychat_mlx.awq.calibration.tokens import encoded
    from tinychat_mlx.awq.quality.evaluate import evaluate as measure
    from tinychat_mlx.awq.quality.evaluate import scores

    def opened(name: str, exact: bool) -> Model:
        import tinychat_mlx
        from tinychat_mlx import memory_plan
        from tinychat_mlx.inspect import local

        found = local(name, folder_of(name))  # shows a progress bar if it must be downloaded
        here = {"backend": options["backend"], "exact": exact, "threads": options["threads"]}
        memory_plan.context_for(
            found, memory_plan.chosen(here), min(options["window"], found.context), lambda text: None
        )
        return tinychat_mlx.load(name, **here)

    first = opened(model, options["exact"])
    other = opened(against, True) if against else None
    if other is not None and other.config.vocab_size != first.config.vocab_size:
        raise UsageError(
            f"the vocabularies differ: {model} has {first.config.vocab_size} tokens, {against} {other.config.vocab_size}",
            where="--against",
            remedy="give two models of one vocabulary",
        )
    window = window_of(first.config, options["window"])
    ids = encoded(str(text), first.tokenizer)[: options["max_tokens"]]
    quality = measure(
        ids,
        scores(first.engine.decoder, first.backend.to_host),
        scores(other.engine.decoder, other.backend.to_host) if other else None,
        window,
    )
    if options["as_json"]:
        click.echo(json.dumps({"model": model, "against": against, "text": str(text)} | quality.as_dict()))
    else:
        click.echo(_lines(quality))


def _lines(q: Quality) -> str:
    lines = [f"perplexity  {q.told('ppl', '.4f')}   ({q.tokens} tokens in windows of {q.window})"]
    if q.kl_mean is not None:
        lines += [
            f"other       {q.told('against_ppl', '.4f')}   (its perplexity)",
            f"KL mean     {q.told('kl_mean', '.5f')} nats",
            f"KL 99 %     {q.told('kl_p99', '.5f')} nats",
            f"top-1       {q.told('top1', '.2%')} agree",
        ]
    if "±" not in lines[0]:
        lines.append("(no standard error: it needs at least two windows)")
    return "\n".join(lines)
