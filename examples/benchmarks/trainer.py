"""What SVFPolicyGradientTrainer costs and reaches: `python trainer.py --output report.md`.

    overhead   a training step beside a loop written by hand, rollouts beside the base model's own `generate`
    success    greedy success on unseen prompts before and after policy-gradient training: SVF beside LoRA r16 and IA3,
               each at its own best learning rate of four, on the playground and on a story model (see ../ablation.py)

The last line of `success` is SVF's best learning rate over all tasks. It speaks for models of under a million
parameters in runs of 20 to 40 steps: the default of `SVFPolicyGradientConfig` is the paper's, for models of billions.
The whole run takes about an hour on two CPU cores; `--quick` is a smoke run of a minute whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from report import Report, describe_environment
from timing import make_clock
from training.overhead import Size, measure
from training.stories import STORIES


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation import METHODS, SVF_RATES, Result, Setting, compare, evaluate_base, markdown, quiet

from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks import get_task


PARTS = ("overhead", "success")
TASKS = ("playground-math", "playground-reasoning", "playground-code", STORIES.name)
COMPARED = ("SVF", "LoRA r16", "IA3")
STORY_MODEL = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
QUICK_SIZE = Size(layers=1, hidden=64, vocabulary=128, answers=4, prompt_tokens=4, new_tokens=4)


def settings(tasks: list[str], story_model: Path) -> Iterator[Setting]:
    """The playground's families, and stories if their model is there."""
    for name in tasks:
        if name != STORIES.name:
            yield Setting(str(BANK_FOLDER / "base"), get_task(name), 40, 64, 64, 2560, 128, 300)
        elif (story_model / "model.safetensors").is_file():
            yield Setting(str(story_model), STORIES, 20, 64, 64, 606, 201, 201)
        else:
            print(f"No stories: there is no model at {story_model}; see --story-model.")


def success(arguments: argparse.Namespace) -> Iterator[str]:
    """One table a task, then the learning rates of SVF over all tasks."""
    found: list[Result] = []
    for setting in settings(arguments.tasks[:1] if arguments.quick else arguments.tasks, arguments.story_model):
        methods = [METHODS[name] for name in COMPARED]
        if arguments.quick:
            setting = replace(setting, steps=2, batch_size=8, micro_batch_size=8, validation_prompts=8, test_prompts=8)
            methods = [replace(method, learning_rates=method.learning_rates[:2]) for method in methods]
        base = evaluate_base(setting)
        results = list(compare(setting, methods, arguments.seeds))
        found.append(results[0])
        yield (
            f"**{setting.task.name}**, {setting.steps} steps of {setting.batch_size}, {arguments.seeds} seeds, "
            f"{len(base)} unseen prompts, % with 95 % interval\n\n{markdown(base, results)}\n"
        )
    yield learning_rates(found)


def learning_rates(results: list[Result]) -> str:
    """SVF's validation success at each learning rate, averaged over tasks."""
    rates = [rate for rate in SVF_RATES if all(rate in result.tried for result in results)]
    means = {rate: mean(result.tried[rate] for result in results) for rate in rates}
    best = max(means, key=lambda rate: (means[rate], -rate))
    listed = ", ".join(f"{rate:g}: {100 * success:.1f} %" for rate, success in means.items())
    return f"SVF, mean validation success over {len(results)} tasks by learning rate: {listed}. The best: {best:g}.\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of success (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of overhead (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a CPU that others use too; set --threads 1 as well"
    )
    parser.add_argument("--story-model", type=Path, default=STORY_MODEL, help="a copy of stories260K")
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet()
    torch.set_num_threads(arguments.threads)
    parts: list[str] = []

    def show(part: str) -> None:
        print(f"\n{part}", flush=True)
        parts.append(part)
        if arguments.output:  # after every part, so that an interrupted run leaves what it has
            arguments.output.write_text("\n".join(parts), encoding="utf-8")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "overhead" in arguments.parts:
        report = Report(describe_environment(device, arguments.processor_time), columns=("SVF",))
        size, steps = (QUICK_SIZE, 2) if arguments.quick else (Size(), arguments.steps)
        for row in measure(size, steps, make_clock(device, arguments.processor_time)):
            print(f"{row.quantity} | {row.values['SVF']} | {row.verdict()}", flush=True)
            report.rows.append(row)
        show(report.markdown())
    if "success" in arguments.parts:
        for part in success(arguments):
            show(part)


if __name__ == "__main__":
    main()
