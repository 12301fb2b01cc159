"""The program that is killed: trains the tiny model of the tests in the current folder, always resuming.

`python program.py <recipe>` imports everything, prints `ready`, and starts when it reads a line `go <k>`: with k > 0
it kills itself at the k-th access to a file of the run, which hits moments that no clock can.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


RUN = "run"
RECIPES: dict[str, dict[str, Any]] = {
    # Three optimizer steps an epoch, the last of half the batch; best checkpoint and early stopping.
    "best checkpoint": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "logging_steps": 3,
        "max_steps": 11,
        "patience": 4,
    },
    # Several generations per step, loss and metrics carried over checkpoints, improvements only.
    "improvements only": {
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "kl_coef": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_strategy": "best",
        "save_total_limit": 1,
        "logging_steps": 2,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "patience": 3,
    },
    # No evaluation; saves between logs; random start; ends in the middle of an epoch and of a log interval.
    "unaligned saves": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "logging_steps": 4,
        "max_steps": 7,
        "num_generations": 2,
        "baseline": "group",
    },
}


def builders() -> Any:
    """The tiny model, its tokenizer and the prompts of the tests of the trainers."""
    path = Path(__file__).resolve().parents[1] / "trainers" / "conftest.py"
    spec = importlib.util.spec_from_file_location("faults_builders", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_of_even_numbers(completions: list[Any], **kwargs: Any) -> list[float]:
    """From −1 to +1, with a little noise from the generator of Python, whose state is part of a checkpoint too."""
    answers = [completion[0]["content"].split() for completion in completions]
    shares = [
        sum(word.isdigit() and int(word) % 2 == 0 for word in answer) / max(len(answer), 1) for answer in answers
    ]
    return [2.0 * share - 1.0 + 1e-3 * random.random() for share in shares]


class KeepEveryCheckpoint(TrainerCallback):
    """Copies each checkpoint of the uninterrupted run, before rotation deletes it, to compare with."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(RUN) / name, Path("history") / name)


def die_at(k: int) -> None:
    """Kill this process at its k-th access to a file of the run; the number of accesses is kept in `accesses`."""
    count = 0
    folder = os.path.abspath(RUN)
    events = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in events or not isinstance(args[0], (str, os.PathLike)):
            return
        relative = event in ("os.remove", "os.rmdir")  # `rmtree` deletes by folder descriptor
        if relative or os.path.abspath(os.fspath(args[0])).startswith(folder):
            count += 1
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if not k:
        import atexit

        atexit.register(lambda: Path("accesses").write_text(str(count)))


def train(recipe: dict[str, Any], keep: bool) -> None:
    tiny = builders()
    options = dict(recipe)
    patience = options.pop("patience", None)
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(patience)] if patience else []
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "max_completion_length": 6,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    trainer = SVFPolicyGradientTrainer(
        tiny.build_model(),
        share_of_even_numbers,
        args=SVFPolicyGradientConfig(RUN, **{**defaults, **options}),
        train_dataset=tiny.prompts(40),
        eval_dataset=tiny.prompts(21, shift=3) if "eval_strategy" in options else None,
        processing_class=tiny.build_tokenizer(),
        peft_config=SVFConfig(),
        callbacks=callbacks + ([KeepEveryCheckpoint()] if keep else []),
    )
    output = trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    result = {
        "metrics": output.metrics,
        "log_history": trainer.state.log_history,
        "best_metric": trainer.state.best_metric,
        "best_model_checkpoint": trainer.state.best_model_checkpoint,
        "base_eval_reward": trainer.base_eval_reward,
        "patience": [callback.early_stopping_patience_counter for callback in callbacks],  # type: ignore[attr-defined]
    }
    Path("result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    word, k = sys.stdin.readline().split()
    assert word in ("go", "keep")
    die_at(int(k))
    train(RECIPES[sys.argv[1]], keep=word == "keep")
