"""What the two processes of test_population.py do: share a population, a search and an evaluation.

Started with a folder. Forks, so that torch is imported once; every process leaves <rank>.json with what it came to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the name of the machine

import torch
from accelerate import PartialState
from torch import distributed

from peft_svf import ExpertBank
from peft_svf.dispatch.few_shot import FewShotDispatcher, MixtureSpace, SearchSettings
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.tasks import get_task


PROCESSES = 2
TIMEOUT = 120  # seconds


def odd(completions: list[Any], **kwargs: Any) -> list[float]:
    """Right or wrong like tossing a coin, but always the same of the same answer, also of one that is cut short."""
    return [1.0 if sum(map(ord, completion[0]["content"])) % 2 else -1.0 for completion in completions]


def results(folder: Path) -> dict[str, Any]:
    """The same calls in one process and in several; everything that must not depend on their number."""
    bank, task = ExpertBank.from_pretrained(BANK_FOLDER), get_task("playground-reasoning")
    experts = tuple(bank.experts)
    dispatcher = FewShotDispatcher(
        bank,
        task.load("train", 3),
        odd,
        max_new_tokens=6,
        settings=SearchSettings(iterations=2, population=6, elite_ratio=0.4),
        configurations=[MixtureSpace(experts, normalized=False)],
        batch_size=5,  # 18 rows make 4 batches
    )
    adapted = dispatcher.adapt(folder / "state", progress=False).to_dict()
    dispatcher.save_pretrained(folder / "expert")
    options: Any = {"dispatcher": dispatcher, "temperature": 3.0, "samples": 2, "split_over_processes": True}
    found = evaluate(bank, bank.tokenizer, task, task.load("test", 5), 3, **options)
    verdicts = [found.answers, found.rewards, found.reasons, found.experts, found.route.weights.tolist()]
    return {"adapted": adapted, "evaluated": verdicts}


def work(folder: Path, process: int) -> None:
    log = os.open(folder / f"{process}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1")
    try:
        rendezvous = f"file://{folder / 'rendezvous'}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=PROCESSES)
        state = PartialState(cpu=True)
        found = {**results(folder), "process": [state.process_index, state.num_processes]}
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the other must not wait for this process
    (folder / f"{process}.json").write_text(json.dumps(found))
    distributed.barrier()
    os._exit(0)  # without the clean-up of libraries, which may wait for the other process


def main(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(folder, process)) for process in range(PROCESSES)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT)
    for child in children:
        child.kill()
        child.join()
    os._exit(max(abs(child.exitcode or 0) for child in children))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
