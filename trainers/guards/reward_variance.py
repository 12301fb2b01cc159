"""Warning when rewards have had no spread for many steps, so that there is nothing to learn from."""

from __future__ import annotations

import logging
from typing import Any

from transformers.trainer_callback import TrainerControl, TrainerState

from peft_svf.trainers.guards.rollout_guard import Metrics, RolloutGuard


logger = logging.getLogger(__name__)

NO_SPREAD = 1e-6  # of the standard deviation, relative to rewards of size 1: rounding of a mean in float32
OFTEN_CUT_OFF = 0.5  # share of answers cut off at the limit, above which the limit is the first suspect


class RewardVarianceCallback(RolloutGuard):
    """Warns once when every reward has been the same for `zero_variance_patience` optimizer steps in a row.

    With `baseline="group"` rewards are compared within the answers to one prompt, otherwise within a generation batch.
    The policy gradient is then zero, or, with `baseline="none"`, says only what was sampled. The paper names the case
    as a limit of the method (arXiv 2501.06252): where the base model hardly ever succeeds, rewards are too sparse for
    reinforcement learning. A step with spread ends the episode: the next one warns again.
    """

    def reset(self) -> None:
        self.steps_without_signal = 0
        self.has_warned = False

    def seen(self) -> dict[str, Any]:
        return {"steps_without_signal": self.steps_without_signal, "has_warned": self.has_warned}

    def judge(self, args: Any, state: TrainerState, control: TrainerControl, step: Metrics, model: Any) -> None:
        if not args.zero_variance_patience:
            return
        if has_signal(step, args.baseline):
            self.reset()
            return
        self.steps_without_signal += 1
        if self.steps_without_signal >= args.zero_variance_patience and not self.has_warned:
            self.has_warned = True
            if state.is_world_process_zero:
                logger.warning(self._message(args, state, step))

    def _message(self, args: Any, state: TrainerState, step: Metrics) -> str:
        scope = "to one prompt" if args.baseline == "group" else "of one batch"
        return (
            f"No learning signal: for the {self.steps_without_signal} steps up to step {state.global_step} all "
            f"answers {scope} had the same reward. {advice(step, args)}"
        )


def has_signal(step: Metrics, baseline: str) -> bool:
    """Whether any rewards that are compared with one another differed, by the mean metrics of a step."""
    if "reward" not in step:  # no answer could be judged
        return False
    is_same_in_groups = baseline == "group" and step["frac_reward_zero_std"] == 1.0
    return _is_spread(step) and not is_same_in_groups


def _is_spread(step: Metrics) -> bool:
    return step.get("reward_std", 0.0) > NO_SPREAD * max(1.0, abs(step["reward"]))


def advice(step: Metrics, args: Any) -> str:
    """What rewards without spread mean, and what to try."""
    if "reward" not in step:
        return "None of them could be judged: the reward functions returned None for every one."
    reward = step["reward"]
    if args.baseline == "group" and _is_spread(step):
        return (
            f"The mean reward is {reward:.3g}: some prompts are always solved and the others never. Try prompts of "
            f"middling difficulty, more answers per prompt (`num_generations`, now {args.num_generations}), a higher "
            f'`temperature` (now {args.temperature:g}), or `baseline="batch"`, which compares across prompts.'
        )
    if reward > 0:
        return (
            f"The reward is {reward:.3g} for every answer: the task is solved as far as this reward can tell. Try "
            "harder prompts or a stricter reward, or stop here."
        )
    cut_off = step.get("completions/clipped_ratio", 0.0)
    limit = (
        f"{cut_off:.0%} of the answers are cut off: first try a longer `max_completion_length` (now "
        f"{args.max_completion_length}). Then try"
        if cut_off > OFTEN_CUT_OFF
        else "Try"
    )
    return (
        f"The reward is {reward:.3g} for every answer: no answer succeeds, and reinforcement learning only "
        f"reinforces what happens now and then (the sparse rewards that the paper warns of). {limit} easier prompts, "
        "a reward with partial credit, more answers per step (`num_generations`, `gradient_accumulation_steps`), a "
        f"higher `temperature` (now {args.temperature:g}) or a base model that sometimes succeeds. Read a few answers "
        "first (`log_completions=True`): an answer that the reward cannot parse fails too."
    )
