"""Test configuration: paths of the package and of the shared tools, and a random generator that is the same in every run."""

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(HERE.parent.parent), str(HERE)) if path not in sys.path]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
