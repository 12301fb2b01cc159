"""Train an expert in ten lines. The same as a command: `peft-svf train --model ... --task gsm8k --output ...`.

On a machine without a GPU or a connection, try it on the playground: `python train_expert.py --playground`.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import SVFConfig
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.logs.progress import RewardProgressCallback
from peft_svf.trainers.tasks import get_task


def main(model: str, task_name: str, output: str, **options: object) -> None:
    task = get_task(task_name)
    args = SVFPolicyGradientConfig(
        output,
        max_completion_length=task.max_new_tokens,
        eval_strategy="steps",
        load_best_model_at_end=True,
        **options,
    )
    trainer = SVFPolicyGradientTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        reward_funcs=task.reward,
        args=args,
        train_dataset=task.load("train"),
        eval_dataset=task.load("validation", 200),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )
    RewardProgressCallback.attach(trainer, f"training on {task.name}")
    trainer.train()
    trainer.save_model(output)

    test = task.load("test", 200)
    with trainer.model.disable_adapter():
        base = evaluate(trainer.model, trainer.processing_class, task, test)
    expert = evaluate(trainer.model, trainer.processing_class, task, test)
    mean, low, high = expert.gain_over(base)
    print(
        f"{base.success:.1%} -> {expert.success:.1%}, gain {mean:+.1%} [{low:+.1%}, {high:+.1%}], {len(test)} prompts"
    )


if __name__ == "__main__":
    if "--playground" in sys.argv:
        small = {"learning_rate": 2e-2, "max_steps": 20, "eval_steps": 5, "per_device_train_batch_size": 128}
        main(
            str(BANK_FOLDER / "base"), "playground-math", "playground-svf-math", gradient_accumulation_steps=1, **small
        )
    else:
        main("Qwen/Qwen2.5-0.5B-Instruct", "gsm8k", "qwen-svf-gsm8k", eval_steps=10)
