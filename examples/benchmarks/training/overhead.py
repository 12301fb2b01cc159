"""What the trainer costs beside a loop written by hand: a whole step, and the rollouts of it.

Both learn from the same prompts with equal models. Every step of the trainer is followed by one of the loop, so that
both meet the same state of the machine, and ratios are taken step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from report import Row
from timing import Spread
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


GOALS = {0.0: 1.05, 0.1: 1.15}  # KL coefficient: step time, × of the loop
ROLLOUT_GOAL = 1.05
WARM_UP = 2  # steps that are not counted
LEARNING_RATE, CLIP = 2e-3, 1e-3


@dataclass(frozen=True)
class Size:
    """A random Llama, and the rollouts of one step; answers always have `new_tokens` tokens."""

    layers: int = 8
    hidden: int = 512
    vocabulary: int = 32000
    answers: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 64

    def __str__(self) -> str:
        return (
            f"Llama, {self.layers} layers of {self.hidden}, vocabulary {self.vocabulary}, "
            f"{self.answers} answers of {self.new_tokens} tokens"
        )

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.hidden * 11 // 4,
                num_hidden_layers=self.layers,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=4096,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One word a token: "w2", "w3", ..."""
        words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, self.vocabulary)}
        inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")

    def prompts(self, steps: int) -> Dataset:
        ids = torch.randint(2, self.vocabulary, (steps * self.answers, self.prompt_tokens))
        return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()]})


def even_first_word(completions: list[str], **kwargs: Any) -> list[float]:
    """+1 if the first word has an even number; it costs nothing and is right half of the time."""
    return [1.0 if int(completion.split()[0][1:]) % 2 == 0 else -1.0 for completion in completions]


class HandWrittenLoop:
    """REINFORCE as one would write it down: the paper's Eq. 1 with the mean of the other rewards as baseline."""

    def __init__(self, size: Size, kl_coef: float) -> None:
        self.size, self.kl_coef = size, kl_coef
        self.tokenizer = size.tokenizer()
        self.model = get_peft_model(size.model(), SVFConfig(task_type="CAUSAL_LM"))
        self.offsets = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.offsets, lr=LEARNING_RATE, weight_decay=0.0)

    @torch.no_grad()
    def answer(self, model: Any, prompts: list[str]) -> Tensor:
        """Prompts and sampled answers, shape (answers, prompt tokens + new tokens)."""
        inputs = self.tokenizer(prompts, return_tensors="pt")
        return model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=None,
            min_new_tokens=self.size.new_tokens,
            max_new_tokens=self.size.new_tokens,
        )

    def step(self, prompts: list[str]) -> None:
        self.model.eval()
        self.model.merge_adapter()
        ids = self.answer(self.model, prompts)
        self.model.unmerge_adapter()
        answers = ids[:, -self.size.new_tokens :]  # (B, T)
        rewards = torch.tensor(even_first_word(self.tokenizer.batch_decode(answers, skip_special_tokens=True)))
        advantages = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
        self.model.train()
        p = self.log_probabilities(ids)  # (B, T, V)
        loss = -(advantages * p.gather(-1, answers.unsqueeze(-1)).squeeze(-1).sum(1)).mean()
        if self.kl_coef:
            with torch.no_grad(), self.model.disable_adapter():
                q = self.log_probabilities(ids)
            loss = loss + self.kl_coef * (p.exp() * (p - q)).sum(-1).sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.offsets, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log_probabilities(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, -self.size.new_tokens - 1 : -1].float().log_softmax(-1)


class TakeTurns(TrainerCallback):
    """After each step of the trainer, one of the loop and one bare `generate` of the base model, all timed."""

    def __init__(self, loop: HandWrittenLoop, prompts: Dataset, clock: Callable[[], float]) -> None:
        self.loop, self.prompts, self.clock = loop, prompts, clock
        self.base = loop.size.model()
        self.seconds: dict[str, list[float]] = {"trainer": [], "loop": [], "rollout": [], "base rollout": []}
        self.started = clock()

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = self.clock()
        result = call()
        self.seconds[name].append(self.clock() - start)
        return result

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["trainer"].append(self.clock() - self.started)
        first = (state.global_step - 1) * self.loop.size.answers
        prompts = self.prompts[first : first + self.loop.size.answers]["prompt"]
        self.timed("loop", lambda: self.loop.step(prompts))
        self.timed("base rollout", lambda: self.loop.answer(self.base, prompts))
        self.started = self.clock()

    def ratios(self, name: str, to: str) -> Spread:
        pairs = zip(self.seconds[name][WARM_UP:], self.seconds[to][WARM_UP:], strict=True)
        return Spread.of([value / base for value, base in pairs])


class TimedRollouts(SVFPolicyGradientTrainer):
    """The trainer; it tells how long its rollouts take, merging and unmerging included."""

    turns: TakeTurns

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generate = super()._generate
        return self.turns.timed("rollout", lambda: generate(*args, **kwargs))


def measure(size: Size, steps: int, clock: Callable[[], float] = time.perf_counter) -> Iterator[Row]:
    """Step time without and with exact KL, and the time of the rollouts."""
    for kl_coef, goal in GOALS.items():
        turns = run(size, steps + WARM_UP, kl_coef, clock)
        what = f"exact KL, λ = {kl_coef:g}" if kl_coef else "no KL"
        seconds = Spread.of(turns.seconds["trainer"][WARM_UP:])
        yield Row(
            f"training step, {what}, × of a loop written by hand",
            str(size),
            {"SVF": turns.ratios("trainer", "loop")},
            goal,
            "it also pads, logs, scores the entropy of every token and checks what it is given",
            f"{seconds} s a step",
        )
    yield Row(
        "rollouts, merging included, × of the base model's own generate",
        str(size),
        {"SVF": turns.ratios("rollout", "base rollout")},
        ROLLOUT_GOAL,
        "merging takes as many products as some hundred tokens of one answer: it weighs less the more is generated",
        f"{Spread.of(turns.seconds['rollout'][WARM_UP:])} s",
    )


def run(size: Size, steps: int, kl_coef: float, clock: Callable[[], float]) -> TakeTurns:
    """Train for `steps` steps in turns with the loop."""
    prompts = size.prompts(steps)
    turns = TakeTurns(HandWrittenLoop(size, kl_coef), prompts, clock)
    with TemporaryDirectory() as folder:
        trainer = TimedRollouts(
            model=size.model(),
            reward_funcs=even_first_word,
            args=SVFPolicyGradientConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=size.answers,
                gradient_accumulation_steps=1,
                max_completion_length=size.new_tokens,
                generation_kwargs={"min_new_tokens": size.new_tokens},
                kl_coef=kl_coef,
                learning_rate=LEARNING_RATE,
                max_grad_norm=CLIP,
                shuffle_dataset=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=prompts,
            processing_class=size.tokenizer(),
            peft_config=SVFConfig(task_type="CAUSAL_LM"),
            callbacks=[turns],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.turns = turns
        trainer.train()
    return turns
