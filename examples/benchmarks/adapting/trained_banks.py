"""Banks of experts trained with several seeds on the playground, kept in a folder for the next run."""

from __future__ import annotations

from pathlib import Path

from peft_svf import ExpertBank
from peft_svf.cli.playground_experts import assemble_bank, train_expert
from peft_svf.experts.files import replaced_folder
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


STEPS = 60  # as the embedded bank


def trained_bank(seed: int, work: Path) -> ExpertBank:
    """The bank of one seed; seed 0 is the embedded one, trained by the same recipe (examples/tiny_lab).

    Args:
        seed (`int`): Seed of the training, and of its prompts.
        work (`Path`): Experts that are there are loaded, others are trained (half a minute each on two cores) and
            kept.
    """
    embedded = ExpertBank.from_pretrained(BANK_FOLDER)
    if seed == 0:
        return embedded
    folder = (work / f"experts-{STEPS}-steps" / f"seed{seed}").absolute()
    for name in embedded.experts:
        if not (folder / name).is_dir():
            with replaced_folder(folder / name) as staging:
                report = train_expert(PLAYGROUND_TASKS[name], staging, STEPS, seed)
            print(f"Trained the {name} expert of seed {seed} in {report.seconds:.0f} s", flush=True)
    return assemble_bank(folder, embedded.experts, embedded.instruction)
