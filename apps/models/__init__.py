"""`tinychat models`: list, download, show and remove models.

    tinychat models list [--recommended]      tinychat models show MODEL
    tinychat models pull ORG/NAME[@REVISION]  tinychat models rm MODEL

Models are stored in the Hugging Face cache, shared with other programs. Results go to stdout, notes to stderr.
"""

from __future__ import annotations

import click

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")


@click.group()
def models() -> None:
    """List, download, show and remove models."""


@models.command("list")
@click.option("--recommended", is_flag=True, help="Recommended models that fit this machine.")
@click.option("--all", "everything", is_flag=True, help="With --recommended: also models that do not fit.")
@as_json
def list_(recommended: bool, everything: bool, as_json: bool) -> None:
    """List the installed models."""
    if recommended:
        from tinychat_mlx.apps.models.recommended import show_recommended

        return show_recommended(everything, as_json)
    from tinychat_mlx.apps.models.installed import show_installed

    show_installed(as_json)


@models.command(short_help="Download a model from the hub, or update it.")
@click.argument("name", metavar="ORG/NAME[@REVISION]")
@click.option("--verify", is_flag=True, help="Also check the hashes of files already downloaded.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the folder.")
def pull(name: str, verify: bool, quiet: bool) -> None:
    """Download a model from the hub, or update it; print its folder.

    Only the files that a model needs are downloaded, and no code. An interrupted download is resumed.
    """
    from tinychat_mlx.apps.models.pull import pull as run

    click.echo(run(name, verify, quiet))


@models.command(short_help="Show a model's details, and whether it fits this machine.")
@click.argument("name", metavar="MODEL")
@click.option("--modules", is_flag=True, help="Also list every module with its form.")
@as_json
def show(name: str, modules: bool, as_json: bool) -> None:
    """Show a model's details and whether it fits. For a model on the hub, only headers are read."""
    from tinychat_mlx.apps.models.show import show as run

    run(name, as_json, modules)


@models.command(short_help="Remove a model, or a conversion.")
@click.argument("name", metavar="MODEL[@REVISION]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
def rm(name: str, yes: bool) -> None:
    """Remove a model from the cache, or a conversion that `tinychat chat` made."""
    from tinychat_mlx.apps.models.remove import remove

    remove(name, yes)
