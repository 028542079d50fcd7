"""The version of the distribution safnet-ops, which pyproject.toml and both packages read here."""

__version__ = "0.1.0"
