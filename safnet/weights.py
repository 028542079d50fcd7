"""Model weights: the ones in the box, a user's own .safetensors, and the authors' .pth checkpoints."""

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from safnet.choices import Variant
from safnet.files import written_whole
from safnet.model import SAFNet

PRETRAINED = Path(__file__).parent / "pretrained"
SHOWN_KEYS = 5  # how many keys of a misfit an error message lists


class WeightsError(ValueError):
    """A weights file that is missing, unreadable, or not SAFNet's."""


def load_model(name: str | os.PathLike[str] = "safnet-s", device: str | torch.device = "cpu") -> SAFNet:
    """A SAFNet in eval mode, from a shipped model's name or a weights file.

    Args:
        name: "safnet" (full) or "safnet-s" (small), which are shipped, or the path of a .safetensors or .pth state dict. The
            authors' published .pth files fit unchanged; .pth files are read with weights_only, so they cannot run code.
        device: where the model shall be: one of torch's, or "auto" for a GPU if there is one, else the CPU.

    Raises:
        WeightsError: the file is missing, unreadable, or its keys or shapes are not a SAFNet's (the differences are listed).
        ValueError: the device cannot be used.
    """
    path = weights_path(name)
    state = read_state(path)
    model = SAFNet(_guess_variant(state))
    _check_fit(path, model.state_dict(), state)
    model.load_state_dict(state)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error


def weights_path(name: str | os.PathLike[str]) -> Path:
    """The file of a shipped model's name, or `name` itself where it is a weights file's. Raises WeightsError."""
    path = Path(name)
    if path.suffix in (".pth", ".safetensors"):
        return path
    shipped = PRETRAINED / f"{name}.safetensors"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))) or "none"
        raise WeightsError(
            f"model {str(name)!r} is neither shipped (there are: {names}) nor a .safetensors or .pth file"
        )
    return shipped


def save_model(model: SAFNet, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a model's weights as .safetensors, whole or not at all."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    write_tensors(Path(path), state, {"format": "pt", "variant": model.variant, **(metadata or {})})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file, whole or not at all."""
    with written_whole(path) as partial:
        # Not save_file: it goes through a temporary file that only its owner may read, whatever the umask says.
        partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def take_fitting(model: SAFNet, start: SAFNet) -> None:
    """Copy all tensors of `start` that fit by name and shape."""
    state = model.state_dict()
    fitting = {k: v for k, v in start.state_dict().items() if k in state and v.shape == state[k].shape}
    model.load_state_dict({**state, **fitting})


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or .pth, read without running code. Raises WeightsError, naming the file."""
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist")
    try:
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"weights file {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights file {str(path)!r} must hold a state dict of tensors, got {type(state).__name__}")
    return state


def _guess_variant(state: dict[str, Tensor]) -> Variant:
    return "small" if any(key.startswith("refinenet.conv7.") for key in state) else "full"


def _check_fit(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    differences = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & state.keys())
            if state[key].shape != expected[key].shape
        ],
    }
    if any(differences.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_shorten(keys)}" for what, keys in differences.items() if keys)
        raise WeightsError(f"weights file {str(path)!r} does not fit SAFNet: {listed}")


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN_KEYS]) + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
