"""Arguments of the commands that route prompts: `generate`, `adapt` and `route`; light, every start imports it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from peft_svf.cli.argument_types import DTYPES, DefaultsFormatter, mixture, positive, share, temperature


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_generate(commands: Commands) -> None:
    """`peft-svf generate`."""
    parser = commands.add_parser(
        "generate", help="answer prompts, each by the expert it needs", formatter_class=DefaultsFormatter
    )
    add_prompts(parser, "a row may name its `expert`")
    add_bank(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--expert", metavar="NAME", help='expert of every prompt; "others" is the base model')
    who.add_argument("--mix", type=mixture, metavar="NAME=WEIGHT,...", help="mixture, like math=0.7,code=0.3")
    add_dispatcher(parser)
    add = parser.add_argument
    add("--batch-size", "--batch_size", type=positive, default=8, help="prompts answered at once")
    add("--max-new-tokens", "--max_new_tokens", type=positive, help="tokens of an answer, at most (256 or what fits)")
    add("--temperature", type=temperature, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--show-scores", "--show_scores", action="store_true", help="print the probability of every label")
    add("--json", action="store_true", help="print a JSON object for each prompt instead")
    parser.set_defaults(run=run_generate)


def add_adapt(commands: Commands) -> None:
    """`peft-svf adapt`."""
    parser = commands.add_parser(
        "adapt",
        help="search the mixture of experts for a task, by a few examples",
        formatter_class=DefaultsFormatter,
    )
    add_bank(parser)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="name of a task (an unknown one lists all)")
    what.add_argument("--examples", type=Path, metavar="FILE", help="a table with the columns prompt and answer")
    add("-n", "--prompts", type=positive, help="examples to search on (10; with --light 3)")
    add("--data-files", "--data_files", nargs="+", metavar="FILE", help="files of --task: a folder, or SPLIT=FILE")
    add("--split", choices=("train", "validation", "test"), default="train", help="where examples of --task come from")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where to save the expert that was found")
    add("--state", type=Path, metavar="FOLDER", help="keep the search here, to go on from (a folder beside --output)")
    add("--light", action="store_true", help="few examples and few iterations")
    add("--optimizer", choices=("cem", "cma-es"), default="cem", help="cross-entropy method, or CMA-ES (needs cmaes)")
    add("--per-layer", "--per_layer", action="store_true", help="weights of each layer instead of one for all layers")
    add("--free", action="store_true", help="weights need not sum to 1")
    add(
        "--cross-validate",
        "--cross_validate",
        action="store_true",
        help="choose among global or per-layer, normalized or free weights by cross-validation on the examples",
    )
    add("--population", type=positive, help="mixtures tried in one iteration")
    add("--iterations", type=positive, help="iterations, at most")
    add("--test-prompts", "--test_prompts", type=positive, metavar="N", help="compare on this many unseen prompts")
    add("--plot", type=Path, metavar="FILE", help="picture of the weights that were found, e.g. weights.png")
    add("--seed", type=int, default=0, help="seed of the search and of drawing the examples")
    add("--batch-size", "--batch_size", type=positive, default=256, help="answers at once; halved if they do not fit")
    add("--max-new-tokens", "--max_new_tokens", type=positive, help="the task's, if not given")
    parser.set_defaults(run=run_adapt)


def add_route(commands: Commands) -> None:
    """`peft-svf route`."""
    parser = commands.add_parser(
        "route", help="which expert each prompt would get, and how sure that is", formatter_class=DefaultsFormatter
    )
    add_prompts(parser, "a row may have its `label`")
    add_bank(parser)
    add_dispatcher(parser)
    add = parser.add_argument
    add("--batch-size", "--batch_size", type=positive, default=32, help="prompts scored at once")
    add("--unsure", type=positive, default=5, metavar="K", help="how many of the least certain prompts to print")
    add("--plot", type=Path, metavar="FILE", help="picture of the confusion matrix, e.g. confusion.png (needs labels)")
    add("--output", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.set_defaults(run=run_route)


def add_prompts(parser: argparse.ArgumentParser, column: str) -> None:
    """Where the prompts come from."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="without any, standard input is one prompt")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help=f"prompts: .txt (one a line), .jsonl or .csv with `prompt`; {column}"
    )


def add_bank(parser: argparse.ArgumentParser) -> None:
    """The bank or base model, and how it is loaded."""
    add = parser.add_argument
    add("--model", metavar="BANK|BASE", help="a bank or a base model: a folder or an id on the Hub (the playground's)")
    add(  # not nargs="+", which would take the prompts too
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]EXPERT",
        help="expert to add: a folder or an id on the Hub (may be repeated)",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the base model")
    add("--revision", help="revision of the bank or base model on the Hub")
    add("--device-map", "--device_map", help="spread the model over devices, e.g. auto")
    add("--use-cpu", "--use_cpu", action="store_true", help="do not use an accelerator")


def add_dispatcher(parser: argparse.ArgumentParser) -> None:
    """What chooses the experts."""
    add = parser.add_argument
    add(
        "--dispatcher",
        choices=("prompt", "classifier"),
        help="ask the base model, or the classification expert (classifier if the bank has one)",
    )
    add("--classifier", metavar="EXPERT", help="classification expert, if the bank has none: a folder or an id")
    add("--margin", type=share, default=0.0, help="lead over the second label without which the base model answers")
    add("--calibrate", action="store_true", help="divide out what the labels get without any request")


def run_generate(arguments: argparse.Namespace) -> None:
    """Import and run the generation."""
    from peft_svf.cli import generate

    generate.run_generate(arguments)


def run_adapt(arguments: argparse.Namespace) -> None:
    """Import and run the few-shot search."""
    from peft_svf.cli import adapt

    adapt.run_adapt(arguments)


def run_route(arguments: argparse.Namespace) -> None:
    """Import and run the dispatcher on its own."""
    from peft_svf.cli import route

    route.run_route(arguments)
