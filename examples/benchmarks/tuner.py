"""How fast and how small SVF is beside PEFT's other methods: `python tuner.py --output table.md`.

Ratios within one run, on Llama-shaped layers with random weights; one table for each shape and dtype, with a goal and
a verdict for each quantity. Compared are PEFT's LoRA (rank 16), IA3, VeRA and TinyLoRA, all on all linear layers, and
the two-sided form of the paper's released code (`released_code.py`). The default run takes about 20 minutes on two
CPU cores; `--quick` is a smoke run of under a minute whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from models import SHAPES
from quantities import QUANTITIES, SINGLE_QUANTITIES
from quantities.setting import Setting
from report import Report, Row, describe_environment
from timing import make_clock
from transformers.utils import logging


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_THREADS = 2
LAYERS_ON_CUDA = 8  # of llama-8b: seven adapted copies must fit into the memory of one device


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    shapes = ", ".join(SHAPES)
    parser.add_argument("--shapes", default="llama-1024,llama-2048", help=f"of {shapes} (default: %(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="(default: %(default)s)")
    parts = [*QUANTITIES, *SINGLE_QUANTITIES]
    parser.add_argument("--parts", default=",".join(parts), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each timing (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=CPU_THREADS, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a CPU that others use too; set --threads 1 as well"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small shape, one round: whether it runs at all")
    parser.add_argument("--output", type=Path, nargs="*", default=[], help="files to write, .md or .json")
    arguments = parser.parse_args()
    for name, known in (("shapes", SHAPES), ("dtype", DTYPES), ("parts", parts)):
        unknown = set(getattr(arguments, name).split(",")) - set(known)
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return arguments


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Every shape with every dtype."""
    shapes = ["llama-256"] if arguments.quick else arguments.shapes.split(",")
    rounds = 1 if arguments.quick else arguments.rounds
    clock = make_clock(arguments.device, arguments.processor_time)
    for name in shapes:
        shape = SHAPES[name]
        if name == "llama-8b" and arguments.device == "cuda":
            shape = shape.with_layers(LAYERS_ON_CUDA)
        for dtype in arguments.dtype.split(","):
            yield Setting(shape, DTYPES[dtype], arguments.device, rounds, arguments.seed, arguments.quick, clock)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """All selected quantities, first those of each setting, then those that are measured once."""
    parts = arguments.parts.split(",")
    for setting in settings(arguments):
        for part in parts:
            if part in QUANTITIES:
                yield from QUANTITIES[part](setting)
    for part in parts:
        if part in SINGLE_QUANTITIES:
            yield from SINGLE_QUANTITIES[part](setting)


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")  # other methods warn about their own settings
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    report = Report(describe_environment(arguments.device, arguments.processor_time))
    start = time.perf_counter()
    for row in measure(arguments):
        elapsed = time.perf_counter() - start
        print(f"[{elapsed:.0f} s] {row.setting} | {row.quantity} | {row.values['SVF']} | {row.verdict()}", flush=True)
        report.rows.append(row)
        for path in arguments.output:  # after every row, so that an interrupted run leaves what it has
            report.write(path)
    print("\n" + report.markdown())


if __name__ == "__main__":
    main()
