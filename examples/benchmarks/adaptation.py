"""What self-adaptation costs and reaches: `python adaptation.py --output report.md`.

    first-pass   routing beside answering, and beside generating the label as the paper does
    mixed-batch  a batch under eight experts, beside one expert and beside one expert after another
    cem          a generation of few-shot search, beside one set of recomposed weights for each candidate
    routing      accuracy of the dispatchers A (prompt) and B (classification expert), with confusion matrices
    unseen       tasks that no expert was trained for: base model, single experts, and the dispatchers A, B and C

The first three are ratios within one run, with goals. The last two are measured on the playground: experts of several
seeds are trained first, in ten minutes, and kept in `--work`, so that a rerun goes on where it stopped. Parts may run
side by side as processes of their own. `--quick` is a smoke run whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from report import describe_environment
from timing import make_clock


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation import quiet
from adapting import PARTS
from adapting.setting import Setting


WORK = Path.home() / ".cache" / "peft-svf" / "adaptation-benchmark"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each timing (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trained banks and searches (default: %(default)s)")
    parser.add_argument("--test-prompts", type=int, default=300, help="of every task (default: %(default)s)")
    parser.add_argument(
        "--cross-validation", action="store_true", help="choose the form of the few-shot weights on the examples: slow"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a CPU that others use too; set --threads 1 as well"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the trained experts (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet()
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        arguments.quick,
        1 if arguments.quick else arguments.rounds,
        1 if arguments.quick else arguments.seeds,
        12 if arguments.quick else arguments.test_prompts,
        arguments.cross_validation,
        arguments.work,
        make_clock("cpu", arguments.processor_time),
        describe_environment("cpu", arguments.processor_time),
    )
    pieces: list[str] = []
    for part in arguments.parts:
        for piece in PARTS[part](setting):
            print(f"\n{piece}", flush=True)
            pieces.append(piece)
            if arguments.output:  # after every piece, so that an interrupted run leaves what it has
                arguments.output.write_text("\n".join(pieces), encoding="utf-8")


if __name__ == "__main__":
    main()
