"""Results for those who must run HDR-VDP-2 or MATLAB's own metrics: pictures and a script that scores them."""

import re
import shutil
from pathlib import Path

import numpy as np
from torch import Tensor

from safnet.images import write_radiance

SCRIPT = Path(__file__).parent / "templates" / "evaluate.m"


class MatlabExport:
    """A folder with truth/SCENE.hdr, METHOD/SCENE.hdr and evaluate.m, filled result by result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SCRIPT, folder / SCRIPT.name)

    def __call__(self, scene: str, method: str, radiance: Tensor, truth: Tensor) -> None:
        """Write radiance and truth (3, H, W) of a scene."""
        for name, picture in (("truth", truth), (method, radiance)):
            path = self.folder / file_name(name) / f"{file_name(scene)}.hdr"
            path.parent.mkdir(exist_ok=True)
            write_radiance(path, np.ascontiguousarray(picture.clamp(min=0).permute(1, 2, 0).numpy()))


def file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name)
