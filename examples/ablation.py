"""The paper's ablation on a task of yours: which parameters to train, and by which loss (arXiv 2501.06252, Table 4).

    python examples/ablation.py                                        # the playground, about 25 minutes on two cores
    python examples/ablation.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --steps 100 --batch-size 64

Every method gets the same prompts, as many steps and its own best learning rate out of four. The rate is chosen by
greedy success on validation prompts with one seed; the test prompts and the other seeds are not seen before the end.
Policy gradient learns from the task's reward, next-token loss from the task's worked solutions.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from datasets import Dataset, disable_progress_bars
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from peft_svf import SVFConfig
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.evaluation import evaluate_success
from peft_svf.trainers.statistics import bootstrap_interval
from peft_svf.trainers.tasks import Task, get_task


Loss = Literal["policy gradient", "next token"]
TUNING_SEED = 1000  # of the runs that choose the learning rate; the reported runs have the seeds 0, 1, 2, ...
EVALUATIONS = 4  # validations in the course of a policy-gradient run, besides the one of the base model


@dataclass(frozen=True)
class Method:
    """What is trained, by which loss, and the learning rates that are tried."""

    name: str
    adapter: Callable[[], PeftConfig]
    loss: Loss
    learning_rates: tuple[float, ...]


def _lora() -> PeftConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _ia3() -> PeftConfig:
    return IA3Config(task_type="CAUSAL_LM")  # PEFT's own choice of layers for the architecture


def _svf() -> PeftConfig:
    return SVFConfig(task_type="CAUSAL_LM")


SVF_RATES = (2e-3, 1e-2, 3e-2, 1e-1)
LORA_RATES = (1e-4, 5e-4, 2e-3, 1e-2)
IA3_RATES = (2e-3, 1e-2, 5e-2, 2e-1)

METHODS = {
    method.name: method
    for method in (
        Method("SVF", _svf, "policy gradient", SVF_RATES),
        Method("LoRA r16", _lora, "policy gradient", LORA_RATES),
        Method("IA3", _ia3, "policy gradient", IA3_RATES),
        Method("SVF, next token", _svf, "next token", SVF_RATES),
        Method("LoRA r16, next token", _lora, "next token", LORA_RATES),
    )
}


@dataclass(frozen=True)
class Setting:
    """Base model, task and size of the runs, the same for every method.

    Args:
        model (`str`): Path or Hub id of the base model.
        task ([`Task`]): Gives prompts, rewards and, for next-token loss, solutions.
        steps (`int`): Optimizer steps of every run.
        batch_size (`int`): Answers (policy gradient) or solutions (next token) per step.
        micro_batch_size (`int`): As many as fit on the device at once; divides `batch_size`.
        train_prompts, validation_prompts, test_prompts (`int`): Rows drawn from the task's splits.
        data_files (`dict[str, str]`): Files of the official splits; without them, the Hub.
    """

    model: str
    task: Task
    steps: int
    batch_size: int
    micro_batch_size: int
    train_prompts: int
    validation_prompts: int
    test_prompts: int
    data_files: dict[str, str] | None = None

    def rows(self, split: str, n: int, seed: int = 0) -> Dataset:
        """`n` rows of one split."""
        options = {"data_files": self.data_files} if self.data_files else {}
        return self.task.load(split, n, seed, **options)

    def load_model(self) -> Any:
        """The base model, on the device that the trainers use."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class Run:
    """One training run and how it ended; successes are greedy answers, one entry a prompt."""

    method: str
    learning_rate: float
    seed: int
    parameters: int
    seconds: float
    validation: list[bool]
    test: list[bool]


@dataclass(frozen=True)
class Result:
    """A method at its own best learning rate."""

    method: str
    tried: dict[float, float]  # learning rate: validation success
    runs: list[Run]

    @property
    def learning_rate(self) -> float:
        return self.runs[0].learning_rate


def shared_options(setting: Setting, folder: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Options that the configurations of both trainers have in common."""
    return {
        "output_dir": folder,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.batch_size // setting.micro_batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),
    }


def train_by_policy_gradient(
    setting: Setting, method: Method, learning_rate: float, seed: int, folder: str
) -> PeftModel:
    """The best of several validations; the base model is one of the candidates."""
    trainer = SVFPolicyGradientTrainer(
        model=setting.load_model(),
        reward_funcs=setting.task.reward,
        args=SVFPolicyGradientConfig(
            **shared_options(setting, folder, learning_rate, seed),
            max_completion_length=setting.task.max_new_tokens,
            per_device_eval_batch_size=setting.micro_batch_size,
            eval_strategy="steps",
            eval_steps=max(1, setting.steps // EVALUATIONS),
            load_best_model_at_end=True,
            save_total_limit=1,
        ),
        train_dataset=setting.rows("train", setting.train_prompts, seed),
        eval_dataset=setting.rows("validation", setting.validation_prompts),
        processing_class=setting.load_tokenizer(),
        peft_config=method.adapter(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def train_by_next_token(setting: Setting, method: Method, learning_rate: float, seed: int, folder: str) -> PeftModel:
    """Learns the task's solutions; the loss is on the solution only."""
    trainer = SFTTrainer(
        model=setting.load_model(),
        args=SFTConfig(
            **shared_options(setting, folder, learning_rate, seed), completion_only_loss=True, save_strategy="no"
        ),
        train_dataset=solutions(setting.rows("train", setting.train_prompts, seed)),
        processing_class=setting.load_tokenizer(),
        peft_config=method.adapter(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def solutions(rows: Dataset) -> Dataset:
    """Prompts with their solutions as TRL's prompt-completion rows."""
    if "solution" not in rows.column_names:
        raise ValueError("This task has no column `solution`, so there is nothing for next-token loss to learn from.")
    chat = not isinstance(rows[0]["prompt"], str)

    def row(prompt: Any, solution: str) -> dict[str, Any]:
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": solution}] if chat else solution}

    return Dataset.from_list([row(*pair) for pair in zip(rows["prompt"], rows["solution"], strict=True)])


def run(setting: Setting, method: Method, learning_rate: float, seed: int, test: bool) -> Run:
    """Train once; answer the validation prompts, and the test prompts if `test`."""
    set_seed(seed)  # adapters are initialised before the trainer sets its seed
    train = train_by_policy_gradient if method.loss == "policy gradient" else train_by_next_token
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        model = train(setting, method, learning_rate, seed, folder)
    seconds = time.perf_counter() - started
    return Run(
        method.name,
        learning_rate,
        seed,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds,
        evaluate(setting, model, "validation", setting.validation_prompts),
        evaluate(setting, model, "test", setting.test_prompts) if test else [],
    )


def evaluate(setting: Setting, model: Any, split: str, n: int) -> list[bool]:
    """Greedy success on `n` prompts of one split, which are the same for every model."""
    return evaluate_success(model, setting.load_tokenizer(), setting.task, setting.rows(split, n))


def tune(setting: Setting, method: Method) -> Iterator[Run]:
    """One run for each learning rate, on validation prompts only."""
    for learning_rate in method.learning_rates:
        yield run(setting, method, learning_rate, TUNING_SEED, test=False)


def compare(setting: Setting, methods: Sequence[Method], seeds: int) -> Iterator[Result]:
    """Every method at its own best learning rate; ties go to the smaller one."""
    for method in methods:
        tried = {}
        for found in tune(setting, method):
            tried[found.learning_rate] = mean(found.validation)
            print(f"  {method.name}, learning rate {found.learning_rate:g}: validation {mean(found.validation):.1%}")
        best = max(tried, key=lambda rate: (tried[rate], -rate))
        runs = []
        for seed in range(seeds):
            runs.append(run(setting, method, best, seed, test=True))
            print(f"  {method.name}, learning rate {best:g}, seed {seed}: test {mean(runs[-1].test):.1%}", flush=True)
        yield Result(method.name, tried, runs)


def evaluate_base(setting: Setting) -> list[bool]:
    """Greedy success of the base model on the test prompts."""
    return evaluate(setting, setting.load_model(), "test", setting.test_prompts)


def markdown(base: Sequence[bool], results: Sequence[Result]) -> str:
    """Success before and after; intervals (95 %) are bootstrapped over seeds and prompts, gains are paired."""
    lines = [
        "| method | learning rate (validation of all) | base | trained | gain in points | parameters | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        after = [[float(success) for success in one.test] for one in result.runs]
        gains = [[a - float(b) for a, b in zip(row, base, strict=True)] for row in after]
        tried = ", ".join(f"{rate:g}: {100 * success:.0f} %" for rate, success in result.tried.items())
        lines.append(
            f"| {result.method} | {result.learning_rate:g} ({tried}) | {percent([[float(b) for b in base]])} "
            f"| {percent(after)} | {percent(gains, '+')} | {result.runs[0].parameters} "
            f"| {mean(one.seconds for one in result.runs):.0f} |"
        )
    return "\n".join(lines)


def percent(values: Sequence[Sequence[float]], sign: str = "") -> str:
    """`"47.3 [41.7, 53.0]"`, the mean of a matrix (seeds, prompts) with its interval, times 100."""
    center, low, high = bootstrap_interval(values)
    return f"{100 * center:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def write_report(path: Path, setting: Setting, base: Sequence[bool], results: Sequence[Result]) -> None:
    """The verdict of every single answer, as JSON."""
    described = {**vars(setting), "task": setting.task.name}
    report = {"setting": described, "base": list(base), "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(report, indent=1))


def quiet() -> None:
    """Keep progress bars and the libraries' own warnings out of the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BANK_FOLDER / "base"), help="default: the playground's base model")
    parser.add_argument("--task", default="playground-math", help="name or table of a task (default: %(default)s)")
    parser.add_argument(
        "--data-files",
        nargs="*",
        default=[],
        metavar="SPLIT=FILE",
        help="files, not the Hub: train=... test=...",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method at its best rate (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--train-prompts", type=int, default=2560)
    parser.add_argument("--validation-prompts", type=int, default=128)
    parser.add_argument("--test-prompts", type=int, default=300)
    parser.add_argument("--output", type=Path, help="JSON file with every single verdict")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet()
    setting = Setting(
        arguments.model,
        get_task(arguments.task),
        arguments.steps,
        arguments.batch_size,
        arguments.micro_batch_size,
        arguments.train_prompts,
        arguments.validation_prompts,
        arguments.test_prompts,
        dict(pair.split("=", 1) for pair in arguments.data_files) or None,
    )
    base = evaluate_base(setting)
    results = []
    for result in compare(setting, [METHODS[name] for name in arguments.methods], arguments.seeds):
        results.append(result)
        if arguments.output:
            write_report(arguments.output, setting, base, results)
    print("\n" + markdown(base, results))


if __name__ == "__main__":
    main()
