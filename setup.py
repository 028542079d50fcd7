"""Builds the kernels of safnet_ops with ninja, printing every decision; metadata is in pyproject.toml."""

from setuptools import Extension, setup

from build_tools.build_extensions import BuildExtensions, CompileCommands

setup(
    ext_modules=[Extension("safnet_ops._C", [])],
    cmdclass={"build_ext": BuildExtensions, "compile_commands": CompileCommands},
)
