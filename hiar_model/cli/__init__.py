"""The command `hiar`: one file for each group of commands, assembled in :mod:`.main`."""

from .main import COMMANDS, build_parser, main

__all__ = ["COMMANDS", "build_parser", "main"]
