"""`tinychat models`: what is here, what is on the hub, what fits; fetch it, look at it, remove it.

    tinychat models list [--recommended]      tinychat models show MODEL
    tinychat models pull ORG/NAME[@REVISION]  tinychat models rm MODEL

Models lie in the Hugging Face cache, which other programs share. stdout is what was asked for, stderr the rest.
"""

from __future__ import annotations

import click

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")


@click.group()
def models() -> None:
    """List, fetch, show and remove models."""


@models.command("list")
@click.option("--recommended", is_flag=True, help="Models worth having, and which of them fit this machine.")
@click.option("--all", "everything", is_flag=True, help="With --recommended: also what does not fit.")
@as_json
def list_(recommended: bool, everything: bool, as_json: bool) -> None:
    """List the models that are here."""
    if recommended:
        from tinychat_mlx.apps.models.recommended import show_recommended

        return show_recommended(everything, as_json)
    from tinychat_mlx.apps.models.shelf import show_shelf

    show_shelf(as_json)


@models.command(short_help="Fetch a model from the hub, or update it.")
@click.argument("name", metavar="ORG/NAME[@REVISION]")
@click.option("--verify", is_flag=True, help="Also read what is here already, and check its hashes.")
@click.option("-q", "--quiet", is_flag=True, help="Print the folder alone.")
def pull(name: str, verify: bool, quiet: bool) -> None:
    """Fetch a model from the hub, or bring it up to date; print its folder.

    Only what a model needs is fetched, and no code. An interrupted pull goes on where it stopped.
    """
    from tinychat_mlx.apps.models.pull import pull as run

    click.echo(run(name, verify, quiet))


@models.command(short_help="Say what a model is, and whether it fits this machine.")
@click.argument("name", metavar="MODEL")
@click.option("--modules", is_flag=True, help="Also every module with its form.")
@as_json
def show(name: str, modules: bool, as_json: bool) -> None:
    """Say what a model is and whether it fits; of one on the hub only headers are read."""
    from tinychat_mlx.apps.models.show import show as run

    run(name, as_json, modules)


@models.command(short_help="Remove a model, or a conversion.")
@click.argument("name", metavar="MODEL[@REVISION]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Remove a model from the cache, or a conversion that `tinychat chat` made."""
    from tinychat_mlx.apps.models.remove import remove

    remove(name, yes)
