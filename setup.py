"""Builds the extension modules of safnet_ops with ninja, printing every decision; metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))  # absent in an isolated build
from build_tools.build_extensions import BuildExtensions, CompileCommands

modules = [Extension("safnet_ops._C", []), Extension("safnet_ops._C_cuda", [])]
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtensions, "compile_commands": CompileCommands})
