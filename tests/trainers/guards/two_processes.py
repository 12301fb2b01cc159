"""What the two processes of test_guards_distributed.py do: the guards, where only one of them sees the trouble.

Started with a folder and the names of scenarios. Forks, so that torch is imported once; every process leaves
<rank>.json with what each scenario came to.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the name of the machine

import torch
from torch import distributed, nn
from transformers import TrainerCallback

from peft_svf import SVFConfig
from peft_svf.trainers import NonFiniteLossError, SVFPolicyGradientConfig, SVFPolicyGradientTrainer


PROCESSES = 2
TIMEOUT = 240  # seconds, for all scenarios together

spec = importlib.util.spec_from_file_location("builders", Path(__file__).parents[1] / "conftest.py")
builders: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builders)


def rank() -> int:
    return int(os.environ["RANK"])


def make(
    folder: Path, trainer: type[SVFPolicyGradientTrainer], reward: Any, **options: Any
) -> SVFPolicyGradientTrainer:
    settings = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_steps": 3,
        "report_to": "none",
        **options,
    }
    model = builders.build_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    model.generation_config.eos_token_id = [2, *range(5, 15)]
    return trainer(
        model,
        reward,
        SVFPolicyGradientConfig(str(folder), **settings),
        train_dataset=builders.prompts(64),
        processing_class=builders.build_tokenizer(),
        peft_config=SVFConfig(),
    )


class NaNAdvantage(SVFPolicyGradientTrainer):
    """In the second step one answer of process 1 has an advantage that is NaN."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if rank() == 1 and self.state.global_step == 1:
            output["advantages"][3] = torch.nan
        return output


class NaNGradient(SVFPolicyGradientTrainer):
    """In the second step process 1 holds a gradient that is NaN, as a shard would; the loss is finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, PoisonGradient())


class PoisonGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if rank() == 1 and state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.nan


class NaNLogits(SVFPolicyGradientTrainer):
    """In the second step process 1 cannot sample answers, in the words of `torch.multinomial`."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        generate = self.accelerator.unwrap_model(self.model).generate
        if rank() == 1 and self.state.global_step == 1:
            logits_processor = [lambda ids, scores: scores * torch.nan]
            self.model.generate = lambda *a, **k: generate(*a, **k, logits_processor=logits_processor)
        return super()._generate_single_turn(*args, **kwargs)


def infinite_in_process_1(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    is_bad = rank() == 1 and trainer_state.global_step == 1
    return [float("inf") if is_bad else 1.0, *([-1.0] * (len(completions) - 1))]


def longest_wins(completions: list[Any], **kwargs: Any) -> list[float]:
    words = [len(completion[0]["content"].split()) for completion in completions]
    median = sorted(words)[len(words) // 2]
    return [1.0 if n > median else -1.0 for n in words]


def facts_of(trainer: SVFPolicyGradientTrainer) -> dict[str, Any]:
    offsets = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return {"step": trainer.state.global_step, "offsets": offsets.tolist()}


def non_finite(folder: Path, trainer: type[SVFPolicyGradientTrainer], reward: Any) -> dict[str, Any]:
    run = make(folder, trainer, reward)
    try:
        run.train()
    except NonFiniteLossError as error:
        return {"message": str(error), **facts_of(run)}
    return {"message": "", **facts_of(run)}


def collapse(folder: Path) -> dict[str, Any]:
    run = make(
        folder,
        SVFPolicyGradientTrainer,
        longest_wins,
        max_steps=40,
        learning_rate=0.1,
        collapse_patience=3,
        kl_coef=1e-6,
        collapse_kl=0.2,
    )
    run.train()
    return facts_of(run)


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "loss": lambda folder: non_finite(folder, NaNAdvantage, builders.even_digits),
    "gradient": lambda folder: non_finite(folder, NaNGradient, builders.even_digits),
    "logits": lambda folder: non_finite(folder, NaNLogits, builders.even_digits),
    "reward": lambda folder: non_finite(folder, SVFPolicyGradientTrainer, infinite_in_process_1),
    "collapse": collapse,
}


def work(folder: Path, process: int, names: list[str]) -> None:
    log = os.open(folder / f"{process}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sizes = {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), **sizes)
    rendezvous, timeout = f"file://{folder / 'rendezvous'}", timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=PROCESSES, timeout=timeout)
    try:
        facts = {name: SCENARIOS[name](folder / name) for name in names}
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the other must not wait for this process
    (folder / f"{process}.json").write_text(json.dumps(facts))
    distributed.barrier()
    os._exit(0)  # without the clean-up of libraries, which may wait for the other process


def main(folder: Path, names: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(folder, process, names)) for process in range(PROCESSES)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT)
    for child in children:
        child.kill()
        child.join()
    os._exit(max(abs(child.exitcode) for child in children))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
