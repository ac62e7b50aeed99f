"""Build entry point. The package is pure Python today; the optional CUDA extension (csrc/) will be built from here."""

from setuptools import setup

setup()
