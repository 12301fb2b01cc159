"""Training that stops before a loss, a gradient, a reward or a logit that is not finite can touch the offsets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer

from peft_svf.trainers.guards.finite_gradients import FiniteGradientsCallback
from peft_svf.trainers.guards.non_finite_batch import NonFiniteLossError, save_batch


LOSSES = ("policy_loss", "kl_sequence")  # means over all processes, so that every process sees the same
SAMPLING_FAILED = "probability tensor contains"  # torch.multinomial, on the CPU

TRY = (
    "Try a lower `learning_rate`, and check that the base model answers sensibly in this dtype (float16 overflows "
    "where bfloat16 does not) and that rewards are of size 1."
)


class StopsOnNonFinite(GRPOTrainer):
    """Mixin: raises [`NonFiniteLossError`] on all processes alike, with the offending batch saved.

    The batch goes to `output_dir/non_finite_batch-<step>`, every process its own share. The class that uses it records
    the metrics `LOSSES` in `_compute_loss` and has the method `_score`.
    """

    _score: Callable[..., Any]
    _rewards_per_func: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finite_gradients = FiniteGradientsCallback(self.accelerator, self._stop_at_gradient)
        self.add_callback(self._finite_gradients)

    # -- where it can arise -------------------------------------------------------------------------------------------
    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        failure: RuntimeError | None = None
        output: Any = None
        try:
            output = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if SAMPLING_FAILED not in str(error):
                raise
            failure = error
        # With tools processes generate different numbers of times: the one that fails cannot wait for the others.
        own = failure is not None
        if not (own if self.tools else self._any_process(own)):
            return output
        answers = [{"prompt": prompt} for prompt in self.processing_class.batch_decode(prompt_ids)]
        why = f"Answers could not be sampled in {'this' if own else 'another'} process."
        self._stop_with_batch("the logits are", why, {}, {"answers": answers}, failure)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        infinite = rewards.isinf()  # NaN is "cannot be judged"
        if infinite.any():
            start = self.accelerator.process_index * len(prompts)
            own = rewards[start : start + len(prompts)]
            names = [
                name for name, column in zip(self.reward_func_names, infinite.unbind(1), strict=True) if column.any()
            ]
            answers = [
                {"prompt": prompt, "completion": completion, "rewards": self._rewards_by_name(row)}
                for prompt, completion, row in zip(prompts, completions, own, strict=True)
            ]
            functions = ", ".join(f"`{name}`" for name in names)
            self._stop_with_batch(
                f"the reward of {functions} is",
                f"It is infinite for {int(infinite.any(1).sum())} of {len(rewards)} answers: return a finite number, "
                "or None for an answer that cannot be judged.",
                {"rewards": own},
                {"answers": answers},
            )
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        local = len(output["completion_ids"])
        start = self.accelerator.process_index * local
        output["rewards"] = self._rewards_per_func[start : start + local]  # to be saved with their answers
        return output

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return loss
        self._finite_gradients.micro_batches.append(inputs)
        newest = {name: self._metrics["train"][name][-1] for name in LOSSES if self._metrics["train"].get(name)}
        broken = {name: value for name, value in newest.items() if not math.isfinite(value)}
        if broken:
            self._stop_at_loss(model, inputs, broken)
        return loss

    # -- what is done about it ----------------------------------------------------------------------------------------
    def _any_process(self, flag: bool) -> bool:
        tensor = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.gather(tensor).any())

    def _stop_at_loss(self, model: nn.Module, inputs: dict[str, Any], broken: dict[str, float]) -> NoReturn:
        tensors, facts = self._describe_micro_batch(inputs, self._score_again(model, inputs))
        places = gather_object([facts["not_finite"]])
        named = [f"{', '.join(map(str, rows))} of process {i}" for i, rows in enumerate(places) if rows]
        values = ", ".join(f"`{name}` is {value}" for name, value in broken.items())
        where = f", because of answers {' and '.join(named)}" if named else "; no single answer explains it"
        self._stop_with_batch("the loss is", f"The mean {values}{where}.", tensors, facts)

    def _stop_at_gradient(self) -> NoReturn:
        micro_batches = self._finite_gradients.micro_batches
        described = [self._describe_micro_batch(inputs, {}) for inputs in micro_batches]
        tensors = {f"{i}.{name}": tensor for i, (own, _) in enumerate(described) for name, tensor in own.items()}
        facts = {"micro_batches": [own for _, own in described]}
        why = f"The losses of the {len(micro_batches)} micro-batches were finite: the backward pass overflowed."
        self._stop_with_batch("the gradient is", why, tensors, facts)

    @torch.no_grad()
    def _score_again(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities and KL of every token, (B, T), and whether each answer's part of the loss is finite."""
        valid = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            valid = valid & inputs["tool_mask"].bool()
        scores = self._score(model, inputs, valid)
        found = {"log_probs": scores.log_probs, "kl": scores.kl}
        tensors = {
            name: values.new_zeros(valid.shape).masked_scatter(valid, values)
            for name, values in found.items()
            if values is not None
        }
        losses = inputs["advantages"] * tensors["log_probs"].sum(1)
        if "kl" in tensors:
            losses = losses + tensors["kl"].sum(1)
        return {**tensors, "is_finite": losses.isfinite()}

    def _describe_micro_batch(
        self, inputs: dict[str, Any], scores: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A micro-batch as tensors and as plain data: one entry an answer."""
        tensors = {name: value for name, value in {**inputs, **scores}.items() if isinstance(value, Tensor)}
        answers = []
        for row in range(len(inputs["completion_ids"])):
            answer: dict[str, Any] = {
                part: self.processing_class.decode(inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()])
                for part in ("prompt", "completion")
            }
            answer["rewards"] = self._rewards_by_name(inputs["rewards"][row]) if "rewards" in inputs else None
            answer["advantage"] = inputs["advantages"][row].item()
            answer |= {name: scores[name][row].sum().item() for name in ("log_probs", "kl") if name in scores}
            answers.append(answer)
        facts: dict[str, Any] = {"answers": answers}
        if scores:
            facts["not_finite"] = (~scores["is_finite"]).nonzero().flatten().tolist()
        return tensors, facts

    def _rewards_by_name(self, row: Tensor) -> dict[str, float]:
        return dict(zip(self.reward_func_names, row.tolist(), strict=True))

    def _stop_with_batch(
        self,
        what: str,
        why: str,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        cause: Exception | None = None,
    ) -> NoReturn:
        """Save this process's share of the batch and raise; every process comes here."""
        step = self.state.global_step
        folder = os.path.join(self.args.output_dir, f"non_finite_batch-{step}")
        message = f"Step {step + 1}: {what} not finite. {why}"
        try:
            facts = {"step": step + 1, "what": f"{what} not finite", "why": why, **facts}
            save_batch(folder, self.accelerator.process_index, tensors, facts)
            saved = f"The batch is in {folder}."
        except OSError as error:
            saved = f"The batch could not be saved ({error})."
        raise NonFiniteLossError(
            f"{message} {saved} The offsets are those after step {step}. {TRY}", step, folder
        ) from cause
