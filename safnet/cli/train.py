"""`safnet train`: an option for each of `safnet.training.settings.TrainSettings`."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from safnet.cli.terminal import one_line_errors
from safnet.training.settings import TrainSettings, read_configuration


def _read_settings(context: typer.Context, name: str | None) -> str | None:
    """Make a configuration file's values the defaults of the command's options."""
    if name is not None:
        with one_line_errors():
            context.default_map = read_configuration(name)
    return name


def _offer_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `config` and an option for each training setting."""
    hints = get_type_hints(TrainSettings, include_extras=True)
    annotations: dict[str, Any] = {
        "config": Annotated[
            str | None,
            typer.Option(callback=_read_settings, is_eager=True, help="YAML file, or name of a shipped configuration."),
        ]
    }
    defaults: dict[str, Any] = {"config": None}
    for field in fields(TrainSettings):
        kind, explained = get_args(hints[field.name])
        annotations[field.name] = Annotated[kind, typer.Option(help=explained.text, rich_help_panel=explained.group)]
        defaults[field.name] = inspect.Parameter.empty if field.default is MISSING else field.default
    command.__annotations__ = annotations
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=defaults[name])
        for name, kind in annotations.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


@_offer_settings
def train(config: str | None = None, **options: Any) -> None:
    """Train a model; a run that was stopped goes on with the same command.

    All options may also stand in a YAML file that --config names; those on the command line win.
    """
    with one_line_errors():
        try:
            from safnet.training.run import train as run
        except ImportError as error:
            raise ValueError(f"training needs more packages ({error}); pip install 'safnet-ops[train]'") from error
        settings = TrainSettings(**options)
        finished = run(settings)
    if finished.signal:
        typer.echo(f"stopped and saved at step {finished.steps}; the same command goes on", err=True)
        raise typer.Exit(128 + finished.signal)
    typer.echo(f"{finished.steps} steps: {settings.out / 'model.safetensors'}")
