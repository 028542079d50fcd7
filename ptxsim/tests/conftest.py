"""Test configuration: paths of the package and of the shared tools, and a random generator that is the same in every run."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
