"""Builds the extension modules of safnet_ops with ninja, printing every decision; metadata is in pyproject.toml."""

from setuptools import Extension, setup

from build_tools.build_extensions import BuildExtensions, CompileCommands

modules = [Extension("safnet_ops._C", []), Extension("safnet_ops._C_cuda", [])]
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtensions, "compile_commands": CompileCommands})
