"""`safnet info`."""

import typer


def info() -> None:
    """Tell versions, which kernels are installed and run, and why others are missing."""
    import safnet
    from safnet.model import describe_convolutions
    from safnet_ops.info import report

    typer.echo(f"safnet-ops {safnet.__version__}\n{report()}\n\n{describe_convolutions()}")
