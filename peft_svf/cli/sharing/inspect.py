"""`peft-svf inspect`: what an expert is and does, in numbers and pictures, without its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_svf.cli.argument_types import DefaultsFormatter


KINDS = ("levers", "components", "spectra", "mixture", "learning-curve")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="what an expert is and which singular values it moves, as a table and as a picture",
        description="Facts, a table of the levers, and on request pictures. The base model is not needed; with it, "
        "--model, the table also says how much each weight changes.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("expert", metavar="EXPERT", help="an expert or a bank: a folder, an id on the Hub, or playground")
    add("--subfolder", metavar="NAME", help="only this expert of a bank")
    add("--revision", help="branch, tag or commit, for an id on the Hub")
    add("--compare", nargs="+", default=[], metavar="EXPERT", help="experts of the same base model to compare with")
    add("--model", metavar="FOLDER", help="the base model, for the size of the change of each weight and for spectra")
    add("--plot", type=Path, metavar="FILE", help="draw a picture, e.g. levers.png; the ending says in which format")
    add("--kind", choices=KINDS, default="levers", help="what to draw; spectra need --model")
    add("--json", action="store_true", help="print a JSON object instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the experts, draw, and print."""
    from peft_svf.cli.sharing import inspect_report

    inspect_report.run_inspect(arguments)
