"""Arguments of the console script; a command's own module is imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_svf import __version__
from peft_svf.experts import ExpertBankError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `peft-svf`; returns the exit status: 0, or 1 after a one-line error."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ExpertBankError, ValueError, OSError) as error:
        print(f"peft-svf {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parser of `peft-svf` and its commands; each sets `run`, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="peft-svf", description="Transformer² for the Hugging Face ecosystem.")
    parser.add_argument("--version", action="version", version=f"peft-svf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands)
    add_cache(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`peft-svf demo`."""
    demo = commands.add_parser(
        "demo",
        help="train three experts on the playground, evaluate them, answer mixed prompts (offline, CPU)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=positive, default=60, help="policy-gradient steps for each expert")
    demo.add_argument("--seed", type=int, default=0, help="seed of rollouts and of training prompts")
    demo.add_argument("--test-prompts", type=positive, default=300, help="held-out prompts for each family")
    demo.add_argument("--output", type=Path, default=Path("peft-svf-demo"), help="folder of the trained bank")
    demo.set_defaults(run=run_demo)


def add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`peft-svf cache list` and `peft-svf cache clear`."""
    cache = commands.add_parser("cache", help="list or clear the singular bases of base models that are kept on disk")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (("list", "what is kept, and how much it takes"), ("clear", "remove all of it")):
        actions.add_parser(action, help=purpose).set_defaults(run=run_cache)


def run_demo(arguments: argparse.Namespace) -> None:
    """Import and run the demo."""
    from peft_svf.cli import demo

    demo.run_demo(arguments.output, arguments.steps, arguments.seed, arguments.test_prompts)


def run_cache(arguments: argparse.Namespace) -> None:
    """Import and run `cache list` or `cache clear`."""
    from peft_svf.cli import cache

    {"list": cache.run_list, "clear": cache.run_clear}[arguments.action]()


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
