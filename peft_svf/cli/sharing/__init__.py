"""Commands for experts that people share. A file is a command; what it needs is imported only when it runs."""

from __future__ import annotations

import argparse

from peft_svf.cli.sharing import bank, export, import_released, inspect, mix, pull, push, transfer


def add_sharing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of `peft-svf`."""
    for command in (push, pull, bank, mix, inspect, transfer, export, import_released):
        command.add_command(commands)
