"""Experts of the source and of the targets, trained by the playground's recipe and kept for the next run."""

from __future__ import annotations

from pathlib import Path

from peft_svf.experts import Expert
from peft_svf.experts.files import replaced_folder
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS
from transferring.setting import Setting, Target


EMBEDDED_STEPS = 60  # of the embedded bank, which is seed 0


def source_expert(setting: Setting, family: str, seed: int) -> Expert:
    """An expert of the playground's base model; seed 0 at 60 steps is the embedded one."""
    if seed == 0 and setting.source_steps == EMBEDDED_STEPS:
        return Expert.from_pretrained(BANK_FOLDER / family)
    folder = setting.work / f"experts-{setting.source_steps}-steps" / f"seed{seed}" / family
    return _trained(folder, family, setting.source_steps, seed, BANK_FOLDER / "base")


def own_expert(setting: Setting, target: Target, family: str, seed: int) -> Expert:
    """An expert trained on the target itself: what transfer is to be measured by."""
    folder = setting.work / f"own-{setting.own_steps}-steps" / target.name / f"seed{seed}" / family
    return _trained(folder, family, setting.own_steps, seed, target.folder)


def _trained(folder: Path, family: str, steps: int, seed: int, base: Path) -> Expert:
    if not folder.is_dir():
        from peft_svf.cli.playground_experts import train_expert  # takes seconds to import

        with replaced_folder(folder.absolute()) as staging:
            report = train_expert(PLAYGROUND_TASKS[family], staging, steps, seed, base)
        start, best = report.base_validation_reward, report.validation_reward
        print(
            f"  trained the {family} expert of {base.name}, seed {seed}, {steps} steps, in {report.seconds:.0f} s; "
            f"validation reward {start:+.2f} -> {best:+.2f}",
            flush=True,
        )
    return Expert.from_pretrained(folder)
