"""Train the experts of the embedded bank: `python train_experts.py --base base --output bank`.

The recipe is the demo's (`peft-svf demo`). Writes a whole bank: base model, experts and their cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from corpus import ROUTING_INSTRUCTION

from peft_svf.cli.demo import FamilyResult, evaluate_family, print_results, train_experts
from peft_svf.cli.playground_experts import BATCH_SIZE, LEARNING_RATE, assemble_bank
from peft_svf.experts import ExpertEntry
from peft_svf.hub_cards import ExpertCardData, ExpertResult, write_expert_card
from peft_svf.trainers.statistics import wilson_interval


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
    for name, result in results.items():
        write_expert_card(arguments.output / name, card(name, result, arguments))


def card(name: str, result: FamilyResult, arguments: argparse.Namespace) -> ExpertCardData:
    """The facts of one expert as it was just trained and measured."""
    n = len(result.base)
    measured = ExpertResult(
        task=f"playground {name}, held-out prompts, greedy",
        n=n,
        base=sum(result.base) / n,
        base_interval=wilson_interval(sum(result.base), n),
        expert=sum(result.expert) / n,
        expert_interval=wilson_interval(sum(result.expert), n),
    )
    return ExpertCardData(
        name=f"Playground expert: {name}",
        label=EXPERTS[name].label,
        base_model=str(arguments.output / "base"),
        trained_parameters=result.training.parameters,
        task=EXPERTS[name].description,
        reward="+1 for a right answer, −1 for any other",
        kl_coefficient=0.0,
        seeds=(arguments.seed,),
        steps=arguments.steps,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        hardware=f"{torch.get_num_threads()} CPU cores",
        training_seconds=result.training.seconds,
        results=(measured,),
        license="apache-2.0",
    )


if __name__ == "__main__":
    main()
