"""Train the experts of the embedded bank: `python train_experts.py --base base --output bank`.

The recipe is the demo's (`peft-svf demo`). Writes a whole bank: base model, experts and their cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from corpus import ROUTING_INSTRUCTION

from peft_svf.cli.demo import evaluate_family, print_results, train_experts
from peft_svf.cli.demo_cards import write_cards
from peft_svf.cli.playground_experts import assemble_bank
from peft_svf.experts import ExpertEntry


EXPERTS = {
    "math": ExpertEntry("math", "word problems with sums and differences of two-digit numbers"),
    "code": ExpertEntry("code", "small Python functions of one number"),
    "reasoning": ExpertEntry("reasoning", "multiple-choice questions about sizes and categories"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder written by pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bank")
    parser.add_argument("--steps", type=int, default=60, help="policy-gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        reports = train_experts(Path(folder), arguments.steps, arguments.seed, arguments.base)
        bank = assemble_bank(Path(folder), EXPERTS, ROUTING_INSTRUCTION, arguments.base)
        bank.save_pretrained(arguments.output, include_base=True)
    results = {name: evaluate_family(bank, name, 500, report) for name, report in reports.items()}
    print_results(results)
    write_cards(arguments.output, results, arguments.steps, arguments.seed, license="apache-2.0")


if __name__ == "__main__":
    main()
