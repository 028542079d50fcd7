"""`python -m safnet.cli` is `safnet`."""

from safnet.cli import app

if __name__ == "__main__":
    app(prog_name="safnet")
