"""Arguments of the console script; a command's own module is imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_svf import __version__
from peft_svf.cli.argument_types import DefaultsFormatter, positive
from peft_svf.cli.routing_arguments import add_adapt, add_generate, add_route
from peft_svf.cli.sharing import add_sharing
from peft_svf.experts import ExpertError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `peft-svf`; returns the exit status: 0, or 1 after a one-line error."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_train = words[:1] == ["train"]  # which has a parser of its own, for hundreds of options
    arguments = build_parser().parse_args(words[:1] if is_train else words)
    arguments.words = words[1:]
    try:
        arguments.run(arguments)
    except (ExpertError, ValueError, OSError) as error:
        print(f"peft-svf {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parser of `peft-svf` and its commands; each sets `run`, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="peft-svf", description="Transformer² for the Hugging Face ecosystem.")
    parser.add_argument("--version", action="version", version=f"peft-svf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_evaluate(commands)
    add_generate(commands)
    add_adapt(commands)
    add_route(commands)
    add_sharing(commands)
    add_demo(commands)
    add_cache(commands)
    return parser


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`peft-svf train`, whose options are those of [`~peft_svf.cli.train_arguments.TrainParser`]."""
    train = commands.add_parser(
        "train", help="train an expert for a task and compare it with the base model", add_help=False
    )
    train.set_defaults(run=run_train)


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`peft-svf evaluate`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="success of a base model and of experts on a task",
        formatter_class=DefaultsFormatter,
    )
    add = evaluate.add_argument
    add("--model", required=True, help="base model: a folder or an id on the Hub")
    add("--adapter", nargs="+", default=[], metavar="FOLDER", help="experts, each a folder or an id on the Hub")
    add("--task", required=True, help="name of a task (an unknown one lists all), or a table with its prompts")
    add("--split", choices=("train", "validation", "test"), default="test", help="rows to evaluate on")
    add("-n", "--prompts", type=positive, help="number of prompts, drawn with --seed; all if not given")
    add("--data-files", "--data_files", nargs="+", metavar="FILE", help="a folder, files, or SPLIT=FILE")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--samples", type=positive, default=1, help="answers for each prompt; several need a temperature")
    add("--seed", type=int, default=0, help="seed of drawing prompts and of sampling")
    add("--batch-size", "--batch_size", type=positive, default=32, help="answers generated at once")
    add("--max-new-tokens", "--max_new_tokens", type=positive, help="the task's, if not given")
    add("--chat-template-kwargs", "--chat_template_kwargs", metavar="JSON", help='like {"enable_thinking": false}')
    add("--show", type=positive, metavar="K", help="print the answers to the first K prompts, with the verdicts")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--load-in-4bit", "--load_in_4bit", action="store_true", help="quantize the base model to 4 bits")
    add("--load-in-8bit", "--load_in_8bit", action="store_true", help="quantize the base model to 8 bits")
    add("--revision", help="revision of the base model on the Hub")
    add("--trust-remote-code", "--trust_remote_code", action="store_true", help="run code of the checkpoint")
    add("--use-cpu", "--use_cpu", action="store_true", help="do not use an accelerator")
    evaluate.set_defaults(run=run_evaluate)


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


def run_train(arguments: argparse.Namespace) -> None:
    """Import and run the training."""
    from peft_svf.cli import train

    train.run_train(arguments.words)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Import and run the evaluation."""
    from peft_svf.cli import evaluate

    evaluate.run_evaluate(arguments)


def run_demo(arguments: argparse.Namespace) -> None:
    """Import and run the demo."""
    from peft_svf.cli import demo

    demo.run_demo(arguments.output, arguments.steps, arguments.seed, arguments.test_prompts)


def run_cache(arguments: argparse.Namespace) -> None:
    """Import and run `cache list` or `cache clear`."""
    from peft_svf.cli import cache

    {"list": cache.run_list, "clear": cache.run_clear}[arguments.action]()
