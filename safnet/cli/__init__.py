"""The `safnet` command: a module for each of its commands parses and prints; the work is in functions that Python users have.

Nothing is imported here, nor at the head of the commands' modules, that needs torch or numpy: help must come at once.
"""

from typing import Annotated

import typer

import safnet
from safnet.cli import batch, evaluate, export, fit_refine, fuse, info, synthesize, train
from safnet.cli.terminal import BAD_INPUT, OneLineErrors
from safnet.memory import reuse_freed_memory

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

app.command(cls=fuse.FuseCommand)(fuse.fuse)
app.command(cls=fuse.FuseCommand)(batch.batch)
app.command()(evaluate.evaluate)
app.command()(synthesize.synthesize)
app.command()(train.train)
app.command("fit-refine")(fit_refine.fit_refine)
app.command()(export.export)
app.command()(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safnet {safnet.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SAFNet: three exposures of a moving scene become one HDR picture."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_INPUT)
    reuse_freed_memory()
