"""Strategy B of Transformer²: a classification expert, trained with the ordinary trainer on the routing task.

    python examples/train_routing_expert.py --instruction "math code reasoning others"

The playground's base model was taught the instruction of its bank and routes held-out prompts of the four families
without a mistake, so with that instruction (`--instruction bank`) there is nothing to learn, and the script says so. A
bare list of the labels it follows only in part: that is what an expert can mend. For a model of your own, give
`routing_task` the tasks of your bank, its instruction and its tokenizer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import ExpertBank, PromptDispatcher, SVFConfig
from peft_svf.dispatch import ClassifierDispatcher
from peft_svf.dispatch.label_scoring import LabelScorer
from peft_svf.dispatch.route import user_text
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.logs.progress import RewardProgressCallback
from peft_svf.trainers.statistics import wilson_interval
from peft_svf.trainers.tasks import Task, routing_task


SOURCES = ("playground-math", "playground-code", "playground-reasoning", "playground-others")


@dataclass(frozen=True)
class Routing:
    """How one model routes: whether each held-out prompt got its label, by generating it and by scoring all labels."""

    generated: list[bool]
    scored: list[bool]

    def __str__(self) -> str:
        return f"generated {share(self.generated)}, scored {share(self.scored)}"


def share(successes: list[bool]) -> str:
    low, high = wilson_interval(sum(successes), len(successes))
    return f"{100 * sum(successes) / len(successes):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def train_routing_expert(
    task: Task, output: str, steps: int, seed: int = 0, learning_rate: float = 2e-2, batch_size: int = 64
) -> SVFPolicyGradientTrainer:
    """Train on the routing task as on any other."""
    base = BANK_FOLDER / "base"
    trainer = SVFPolicyGradientTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        reward_funcs=task.reward,
        args=SVFPolicyGradientConfig(
            output,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=100,
            max_completion_length=task.max_new_tokens,
            eval_strategy="steps",
            eval_steps=max(1, steps // 3),
            load_best_model_at_end=True,
            save_total_limit=1,
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=task.load("train", min(steps * batch_size, 2000), seed),
        eval_dataset=task.load("validation", 100),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )
    RewardProgressCallback.attach(trainer, "training the routing expert")
    trainer.train()
    return trainer


def measure(model: Any, dispatcher: PromptDispatcher, task: Task, rows: Dataset) -> Routing:
    """Both ways of routing with `model` under the adapter it has now: labels are scored as the dispatcher does."""
    tokenizer = dispatcher.bank.tokenizer
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    scorer = LabelScorer(base_model, dispatcher.scorer.template, dispatcher.labels)
    best = scorer([user_text(prompt) for prompt in rows["prompt"]]).argmax(-1).tolist()  # it instructs by itself
    scored = [dispatcher.labels[i] == answer for i, answer in zip(best, rows["answer"], strict=True)]
    return Routing(evaluate(model, tokenizer, task, rows).successes, scored)


def rightly_routed(dispatcher: PromptDispatcher, rows: Dataset) -> list[bool]:
    """Whether each prompt got the expert of its label."""
    chosen = dispatcher.route(list(rows["prompt"])).chosen()
    expert_of = dispatcher.bank.labels
    return [expert_of.get(answer, answer) == name for answer, name in zip(rows["answer"], chosen, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruction", default="math code reasoning others", help='or "bank"')
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--test-prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="playground-routing-expert")
    arguments = parser.parse_args()

    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    own = bank.instruction if arguments.instruction == "bank" else arguments.instruction
    dispatcher = PromptDispatcher(bank, instruction=own)
    task = routing_task(SOURCES, instruction=dispatcher.instruction, tokenizer=bank.tokenizer)
    rows = task.load("test", arguments.test_prompts)
    print(f"Routing {len(rows)} held-out prompts with {dispatcher.instruction!r}")
    print(f"The bank's dispatcher as it is: {share(rightly_routed(dispatcher, rows))}")

    trainer = train_routing_expert(task, arguments.output, arguments.steps, arguments.seed)
    with trainer.model.disable_adapter():
        print(f"before: {measure(trainer.model, dispatcher, task, rows)}")
    print(f"after:  {measure(trainer.model, dispatcher, task, rows)}")
    if trainer.best_is_base:
        print("No checkpoint was better than the base model on the validation prompts: the expert is not saved")
    else:
        trainer.save_model(arguments.output)
        classifier = ClassifierDispatcher(bank, arguments.output, instruction=dispatcher.instruction)
        print(f"The bank's dispatcher under the expert: {share(rightly_routed(classifier, rows))}")
        print(f"The expert is in {arguments.output}; ClassifierDispatcher(bank, that folder) routes by it")


if __name__ == "__main__":
    main()
