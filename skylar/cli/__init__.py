"""The command `skylar`: `main` takes its words and returns its exit code."""

from skylar.cli.commands import main

__all__ = ["main"]
