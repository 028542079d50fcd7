"""Hypothesis without time limits, as machines differ; and with the same examples every time where CI is set."""

import os

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
