"""Files of exposures, as cameras and editors write them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import OpenImageIO as oiio
from PIL import Image


def save_frame(path: Path, codes: npt.NDArray[np.uint8]) -> Path:
    """Write 8-bit RGB without a word on its colours."""
    Image.fromarray(codes).save(path)
    return path


def save_tagged(path: Path, pixels: npt.NDArray[Any], kind: str, **attributes: Any) -> Path:
    """Write pixels (H, W, C) with attributes of OpenImageIO's names, in which __ stands for a colon; bytes are of uint8."""
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], kind)
    for name, value in attributes.items():
        name = name.replace("__", ":")
        if isinstance(value, bytes):
            spec.attribute(name, oiio.TypeDesc(f"uint8[{len(value)}]"), np.frombuffer(value, np.uint8))
        elif isinstance(value, tuple):
            spec.attribute(
                name, oiio.TypeDesc(f"{'int' if isinstance(value[0], int) else 'float'}[{len(value)}]"), value
            )
        else:
            spec.attribute(name, value)
    out = oiio.ImageOutput.create(str(path))
    assert out is not None
    assert out.open(str(path), spec), out.geterror()
    assert out.write_image(np.ascontiguousarray(pixels)), out.geterror()
    assert out.close()
    return path
