"""Banks of experts trained with several seeds on the playground, kept in a folder for the next run."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from train_routing_expert import SOURCES, train_routing_expert

from peft_svf import ExpertBank
from peft_svf.cli.playground_experts import assemble_bank, train_expert
from peft_svf.dispatch import ClassifierDispatcher, PromptDispatcher
from peft_svf.experts.files import replaced_folder
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks import routing_task
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


STEPS = 60  # as the embedded bank
ROUTING_STEPS = 15  # as examples/train_routing_expert.py
BARE_LIST = "math code reasoning others"  # an instruction that the base model follows only in part
NOTE = "training.json"


def trained_bank(seed: int, work: Path) -> ExpertBank:
    """
    The bank of one seed; seed 0 is the embedded one, trained by the same recipe (examples/tiny_lab).

    Args:
        seed (`int`): Seed of the training, and of its prompts.
        work (`Path`): Experts that are there are loaded, others are trained (a minute each) and kept.
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


def classifier_dispatcher(bank: ExpertBank, instruction: str, seed: int, work: Path, quick: bool) -> PromptDispatcher:
    """
    Strategy B for `bank`: routing under a classification expert that was trained with `instruction`.

    Where no checkpoint was better than the base model on validation prompts there is no such expert, and the base
    model goes on routing: this then is strategy A. If `quick`, nothing is trained and some expert classifies.
    """
    if quick:
        return ClassifierDispatcher(bank, next(iter(bank.experts)), instruction=instruction)
    folder = _classifier(bank, instruction, seed, work)
    if json.loads((folder / NOTE).read_text("utf-8"))["best_is_base"]:
        return PromptDispatcher(bank, instruction=instruction)
    return ClassifierDispatcher(bank, folder, instruction=instruction)


def _classifier(bank: ExpertBank, instruction: str, seed: int, work: Path) -> Path:
    """The folder of the classification expert, trained if it is not there."""
    kind = "bare-list" if instruction == BARE_LIST else "bank-instruction"
    folder = (work / f"routing-{kind}-{ROUTING_STEPS}-steps" / f"seed{seed}").absolute()
    if not folder.is_dir():
        task = routing_task(SOURCES, instruction=instruction, tokenizer=bank.tokenizer)
        with replaced_folder(folder) as staging, TemporaryDirectory() as checkpoints:
            trainer = train_routing_expert(task, checkpoints, ROUTING_STEPS, seed)
            trainer.save_model(str(staging))
            (staging / NOTE).write_text(json.dumps({"best_is_base": bool(trainer.best_is_base)}), "utf-8")
        print(f"Trained the classification expert of seed {seed} for {instruction!r}", flush=True)
    return folder
