"""Use an expert on another base model, and find out whether that is worth anything (arXiv 2501.06252, section 4.2).

    python examples/transfer_expert.py --to FOLDER                      # one expert: report, then success and controls
    python examples/transfer_expert.py --study --to FOLDER FOLDER ...   # Tables 5 and 9 in miniature, resumable

An expert that was transferred is compared with the base model and with controls on the same prompts: its offsets in
another order, or random ones of the same size. Only what is better than its controls owes that to the order of the
singular values. The README has the tables of this study. In short: worth a try on a descendant of the expert's own
base model, beside a shuffled control; between bases that were trained apart it was worth next to nothing, and 20 steps
of training on the target far more.

The bases of the study, from examples/tiny_lab:

    python pretrain.py --threads 1 --output seed --seed 1
    python pretrain.py --threads 1 --output continued --seed 4 --steps 300 --start-from BANK/base
    python pretrain.py --threads 1 --output width --seed 2 --hidden-size 112
    python pretrain.py --threads 1 --output depth --seed 3 --layers 5 --steps 1200

BANK is `python -c "from peft_svf.playground import BANK_FOLDER; print(BANK_FOLDER)"`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from transferring.cells import Cells
from transferring.setting import FAMILIES, Setting, Target
from transferring.study import check_targets, quiet, study_target
from transferring.tables import report, results
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import ExpertBank
from peft_svf.dispatch import FixedDispatcher
from peft_svf.experts import BASE_LABEL, Expert
from peft_svf.experts.files import replace_file
from peft_svf.experts.transfer import transfer
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.tasks import get_task


WORK = Path.home() / ".cache" / "peft-svf" / "transfer-study"


def transfer_one(source: str, source_model: str, target: str, task_name: str, n: int) -> None:
    """Transfer an expert, print the report, and compare it with the target's base model and with controls."""
    expert = Expert.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    made = transfer(expert, model, source_model=AutoModelForCausalLM.from_pretrained(source_model, dtype="auto"))
    print(made.report.to_text() + "\n")
    model = made.expert.put_into(model, "transferred")  # made.expert.save_pretrained(folder) keeps it
    for control in ("shuffled", "reversed", "random"):
        model = transfer(expert, model, control=control).expert.put_into(model, control)

    bank = ExpertBank(model, AutoTokenizer.from_pretrained(target))
    task = get_task(task_name)
    rows = task.load("test", n)
    base = None
    for name in (BASE_LABEL, *bank.experts):
        found = evaluate(bank, bank.tokenizer, task, rows, dispatcher=FixedDispatcher(bank, name))
        if base is None:
            base = found
            print(f"base model   {found.success:.1%} of {n} prompts of {task.name}")
        else:
            gain, low, high = found.gain_over(base)
            print(f"{name:12} {found.success:.1%}, {gain:+.1%} [{low:+.1%}, {high:+.1%}]")


def study(setting: Setting, targets: list[Target], output: Path) -> None:
    """Measure what is missing in `output`, then write the tables of everything in it."""
    check_targets(targets)
    cells = Cells(output / "cells.jsonl", setting.identity())
    for target in targets:
        print(f"{target.name}", flush=True)
        study_target(setting, target, cells)
        names = list(dict.fromkeys(cell.target for cell in cells.of()))
        text, found = report(cells, names), json.dumps(results(cells, names), indent=1) + "\n"
        replace_file(output / "report.md", lambda path, text=text: path.write_text(text, "utf-8"))
        replace_file(output / "results.json", lambda path, found=found: path.write_text(found, "utf-8"))
    print("\n" + report(cells, [target.name for target in targets]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--to", nargs="+", required=True, metavar="FOLDER", help="base models to transfer to")
    add("--expert", default=str(BANK_FOLDER / "math"), help="one expert (default: the playground's, for math)")
    add("--from-model", default=str(BANK_FOLDER / "base"), help="its base model (default: the playground's)")
    add("--task", default="playground-math", help="to compare one expert on (default: %(default)s)")
    add("--study", action="store_true", help="all experts of the playground, several seeds, on every target")
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="of the study (default: all)")
    add("--seeds", type=int, default=3, help="trained sources (default: %(default)s)")
    add("--draws", type=int, default=1, help="of the random controls, a source (default: %(default)s)")
    add("--test-prompts", type=int, default=300, help="of each task (default: %(default)s)")
    add("--source-steps", type=int, default=60, help="training of the source's experts (default: %(default)s)")
    add("--own-steps", type=int, default=20, help="training of the target's own; 0: none (default: %(default)s)")
    add("--examples", type=int, default=10, help="of few-shot search; 0: none (default: %(default)s)")
    add("--iterations", type=int, default=5, help="of few-shot search, at most (default: %(default)s)")
    add("--population", type=int, default=16, help="of few-shot search (default: %(default)s)")
    add("--work", type=Path, default=WORK, help="folder of trained experts (default: %(default)s)")
    add("--output", type=Path, default=Path("transfer-study"), help="folder of the study (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet()
    started = time.perf_counter()
    if arguments.study:
        setting = Setting(
            tuple(arguments.families),
            arguments.seeds,
            arguments.draws,
            arguments.test_prompts,
            arguments.source_steps,
            arguments.own_steps,
            arguments.examples,
            arguments.iterations,
            arguments.population,
            arguments.work,
        )
        study(setting, [Target(Path(folder)) for folder in arguments.to], arguments.output)
    else:
        for folder in arguments.to:
            transfer_one(arguments.expert, arguments.from_model, folder, arguments.task, arguments.test_prompts)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
