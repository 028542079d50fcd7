"""SAFNet: fuses three exposures of a moving scene into one HDR picture. See `SAFNet`, `load_model`, and `safnet --help`."""

from safnet.model import SAFNet
from safnet.weights import WeightsError, load_model, save_model

__all__ = ["SAFNet", "WeightsError", "load_model", "save_model"]
