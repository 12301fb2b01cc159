"""Arguments of the console script; a command's own module is imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_svf import __version__


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Parser of `peft-svf` and its commands."""
    parser = argparse.ArgumentParser(prog="peft-svf", description="Transformer² for the Hugging Face ecosystem.")
    parser.add_argument("--version", action="version", version=f"peft-svf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train three experts on the playground, evaluate them, answer mixed prompts (offline, CPU)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=positive, default=60, help="policy-gradient steps for each expert")
    demo.add_argument("--seed", type=int, default=0, help="seed of rollouts and of training prompts")
    demo.add_argument("--test-prompts", type=positive, default=300, help="held-out prompts for each family")
    demo.add_argument("--output", type=Path, default=Path("peft-svf-demo"), help="folder of the trained bank")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `peft-svf`; returns the exit status: 0, or 1 after a one-line error."""
    arguments = build_parser().parse_args(argv)
    from peft_svf.cli.demo import run_demo
    from peft_svf.experts import ExpertBankError

    try:
        run_demo(arguments.output, arguments.steps, arguments.seed, arguments.test_prompts)
    except (ExpertBankError, ValueError, OSError) as error:
        print(f"peft-svf {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0
