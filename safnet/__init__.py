"""SAFNet: fuses three exposures of a moving scene into one HDR picture.

`fuse_files` takes photographs, `fuse_exposures` tensors, `load_model` gives the network itself. `safnet --help` tells of the
command. Names are imported when they are first used, so that `import safnet` needs no other package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safnet.exposures import ExposureError
    from safnet.fuse import Result, fuse_exposures
    from safnet.images import ImageError
    from safnet.model import SAFNet
    from safnet.pipeline import FusionWarning, fuse_files
    from safnet.weights import WeightsError, load_model, save_model

    __version__: str

__all__ = [
    "ExposureError",
    "FusionWarning",
    "ImageError",
    "Result",
    "SAFNet",
    "WeightsError",
    "__version__",
    "fuse_exposures",
    "fuse_files",
    "load_model",
    "save_model",
]

_MODULES = {
    "ExposureError": "exposures",
    "FusionWarning": "pipeline",
    "ImageError": "images",
    "Result": "fuse",
    "SAFNet": "model",
    "WeightsError": "weights",
    "fuse_exposures": "fuse",
    "fuse_files": "pipeline",
    "load_model": "weights",
    "save_model": "weights",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(import_module(f"safnet.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'safnet' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """`safnet_ops.__version__`, read from its file: the package itself would import torch."""
    from pathlib import Path
    from runpy import run_path

    return run_path(str(Path(__file__).parents[1] / "safnet_ops/version.py"))["__version__"]
