"""What commands share on the terminal: one line for an error, notes, a progress bar, memory."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

BAD_INPUT = 2  # exit code
OUT_OF_MEMORY = 1

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


class OneLineErrors(TyperGroup):
    """A group of commands whose errors on options and arguments are one line on stderr too."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **settings: Any) -> Any:  # type: ignore[override]
        try:
            code = super().main(args, standalone_mode=False, **settings)
        except typer.Abort:
            typer.echo("aborted", err=True)
            code = 1
        except Exception as error:
            # The parser's errors have no public class in all releases of typer.
            if not hasattr(error, "format_message"):
                raise
            print_error(_describe(error, sys.argv[1:] if args is None else args))
            code = BAD_INPUT
        if standalone_mode:
            sys.exit(code)
        return code


def _describe(error: Any, arguments: Sequence[str]) -> str:
    """The parser's message, and what was given for the option that it is about, where the message leaves that out."""
    message = " ".join(error.format_message().split()).rstrip(".")
    parameter = getattr(error, "param", None)
    for number, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if parameter is not None and name in parameter.opts:
            value = value if given else " ".join(arguments[number + 1 : number + 1 + parameter.nargs])
            return message if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) else f"{message}, got {value!r}"
    return message


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the command with one line on stderr and exit code 2, and so does want of memory, with 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        print_error(str(error))
        raise typer.Exit(BAD_INPUT) from error
    except (MemoryError, RuntimeError) as error:
        from safnet.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        message = str(error) if isinstance(error, MemoryError) else ""
        print_error(message or "out of memory; try a smaller --tile, --precision bfloat16 or --model safnet-s")
        raise typer.Exit(OUT_OF_MEMORY) from error


def print_error(message: str) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)


@contextmanager
def notes(category: type[Warning]) -> Iterator[None]:
    """Warnings of a category are shown as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", category)
        show = warnings.showwarning

        def note(message: Warning | str, kind: type[Warning], *place: Any) -> None:
            if issubclass(kind, category):
                typer.echo(f"note: {message}", err=True)
            else:
                show(message, kind, *place)

        warnings.showwarning = note  # type: ignore[assignment]
        yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yields a function that moves a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def peak_memory() -> str:
    """The process's so far, for people."""
    import torch

    parts = []
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB")
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU")
    return " + ".join(parts) or "unknown"
