"""The build backend: setuptools', loaded from the project's own folder, so that setup.py finds `build_tools` in every build.

It forgets first what earlier builds left in the folder: setuptools would put that into a release, deleted files too.
"""

import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """setuptools' own, of the files that MANIFEST.in and pyproject.toml name now."""
    Path("safnet_ops.egg-info/SOURCES.txt").unlink(missing_ok=True)
    return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """setuptools' own, of the files of this build."""
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
