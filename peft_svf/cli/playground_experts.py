"""How an expert of the playground is trained: the recipe that the demo and the embedded bank share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import SVFConfig
from peft_svf.experts import ExpertBank, ExpertEntry
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.logs.progress import RewardProgressCallback
from peft_svf.trainers.tasks import Task


BASE_FOLDER = BANK_FOLDER / "base"
BATCH_SIZE = 128
LEARNING_RATE = 2e-2  # ten times the paper's; the better of 2e-2 and 5e-2 on math validation prompts, one seed
MAX_TRAINING_PROMPTS = 6000
VALIDATION_PROMPTS = 128
VALIDATIONS = 4


@dataclass(frozen=True)
class TrainingReport:
    """What training one expert took and reached; rewards are greedy means on validation prompts, from −1 to +1."""

    parameters: int
    seconds: float
    base_validation_reward: float
    validation_reward: float


def training_config(folder: Path | str, task: Task, steps: int, seed: int) -> SVFPolicyGradientConfig:
    """REINFORCE with one answer per prompt, the batch mean as baseline and the best of several validations."""
    return SVFPolicyGradientConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=VALIDATION_PROMPTS,
        max_completion_length=task.max_new_tokens,
        learning_rate=LEARNING_RATE,
        max_steps=steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, steps // VALIDATIONS),
        load_best_model_at_end=True,
        save_total_limit=1,
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def training_prompts(task: Task, steps: int, seed: int) -> Dataset:
    """Distinct training prompts for `steps` batches; beyond `MAX_TRAINING_PROMPTS` they repeat."""
    return task.load("train", min(steps * BATCH_SIZE, MAX_TRAINING_PROMPTS), seed)


def train_expert(task: Task, folder: Path, steps: int, seed: int, base: Path = BASE_FOLDER) -> TrainingReport:
    """Train one expert on `task` from real rollouts and save it as a PEFT adapter in `folder`."""
    started = time.perf_counter()
    with TemporaryDirectory() as checkpoints:
        trainer = SVFPolicyGradientTrainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            reward_funcs=task.reward,
            args=training_config(checkpoints, task, steps, seed),
            train_dataset=training_prompts(task, steps, seed),
            eval_dataset=task.load("validation", VALIDATION_PROMPTS),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=SVFConfig(task_type="CAUSAL_LM"),
        )
        RewardProgressCallback.attach(trainer, f"training the {task.label} expert")
        trainer.train()
        trainer.model.save_pretrained(folder)
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    seconds = time.perf_counter() - started
    start = trainer.base_eval_reward
    assert start is not None  # the configuration evaluates before the first step
    return TrainingReport(parameters, seconds, start, trainer.state.best_metric)


def assemble_bank(
    folder: Path, experts: Mapping[str, ExpertEntry], instruction: str | None, base: Path = BASE_FOLDER
) -> ExpertBank:
    """Bank of the experts that lie in `folder`, each in a sub-folder of its name."""
    model = AutoModelForCausalLM.from_pretrained(base)
    first, *others = experts
    model = PeftModel.from_pretrained(model, str(folder / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(folder / name), adapter_name=name)
    return ExpertBank(model, AutoTokenizer.from_pretrained(base), experts, instruction)
