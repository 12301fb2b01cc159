"""Early stopping when the policy has left language behind: answers without end, no answers, or a huge KL."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from peft_svf.trainers.guards.rollout_guard import Metrics, RolloutGuard


logger = logging.getLogger(__name__)

WATCHED = ("reward", "completions/clipped_ratio", "completions/mean_length", "entropy", "kl")


class Sign(NamedTuple):
    """One way to see a collapse: whether a step shows it that the first step did not, and how to say so."""

    shows: Callable[[Metrics, Metrics, float, int], bool]  # (step, first step, `collapse_kl`, size of the vocabulary)
    says: Callable[[Metrics, Metrics], str]


def _never_ends(step: Metrics, first: Metrics, limit: float, vocabulary: int) -> bool:
    """Nearly all answers are cut off, of which fewer than half were at the start."""
    name = "completions/clipped_ratio"
    return step.get(name, 0.0) >= 0.9 and first.get(name, 1.0) < 0.5


def _says_nothing(step: Metrics, first: Metrics, limit: float, vocabulary: int) -> bool:
    """Answers have a tenth of the tokens they had at the start."""
    name = "completions/mean_length"
    return step.get(name, math.inf) <= first.get(name, 0.0) / 10


def _is_gibberish(step: Metrics, first: Metrics, limit: float, vocabulary: int) -> bool:
    """As if every token was drawn from √vocabulary equally likely ones: no text is so hard to predict."""
    half = math.log(vocabulary) / 2 if vocabulary > 1 else math.inf
    return step.get("entropy", 0.0) >= half and first.get("entropy", math.inf) < half / 2


def _is_far_away(step: Metrics, first: Metrics, limit: float, vocabulary: int) -> bool:
    """The KL from the base model, per token, has grown by more than `collapse_kl`."""
    return step.get("kl", 0.0) > first.get("kl", 0.0) + limit


SIGNS = {
    "length": Sign(
        _never_ends,
        lambda step, first: (
            f"{step['completions/clipped_ratio']:.0%} of the answers are cut off at `max_completion_length` "
            f"({first['completions/clipped_ratio']:.0%} at the start)"
        ),
    ),
    "silence": Sign(
        _says_nothing,
        lambda step, first: (
            f"answers have {step['completions/mean_length']:.3g} tokens "
            f"({first['completions/mean_length']:.3g} at the start)"
        ),
    ),
    "entropy": Sign(
        _is_gibberish,
        lambda step, first: f"the entropy is {step['entropy']:.3g} a token ({first['entropy']:.3g} at the start)",
    ),
    "kl": Sign(
        _is_far_away,
        lambda step, first: f"the KL from the base model is {step['kl']:.3g} a token ({first['kl']:.3g} at the start)",
    ),
}


class CollapseCallback(RolloutGuard):
    """Stops training when a sign of collapse has been there for `collapse_patience` steps and the reward is lost.

    Signs are answers that never end, answers of no length, an entropy beyond that of text and, with a `kl_coef`, a KL
    above `collapse_kl`; all are compared with the first step, whose answers come from the starting point.
    Policies that get better may show any of them (answers grow longer, a label becomes certain), so that a sign counts
    only if the mean reward of those steps is closer to that of the first step than to the best there was.

    Without `load_best_model_at_end` the trainer then goes back to the checkpoint of this run with the best training
    reward from before the sign (`sound_checkpoints`, the best first), or to the starting offsets if none is better.
    """

    def reset(self) -> None:
        self.first: Metrics | None = None
        self.rewards: list[float] = []  # of the last `collapse_patience` steps
        self.best_reward: float | None = None  # the best mean of that many steps
        self.sign_steps = dict.fromkeys(SIGNS, 0)  # for how many steps in a row
        self.checkpoints: list[tuple[int, float]] = []  # those of this run: step and mean reward up to there
        self.has_collapsed = False
        self.sound_checkpoints: list[int] = []

    def seen(self) -> dict[str, Any]:
        names = (
            "first",
            "rewards",
            "best_reward",
            "sign_steps",
            "checkpoints",
            "has_collapsed",
            "sound_checkpoints",
        )
        return {name: getattr(self, name) for name in names}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step > 0:
            self._note_checkpoint(state)  # the one resumed from did not know of itself
        control.should_training_stop = control.should_training_stop or self.has_collapsed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._note_checkpoint(state)

    def _note_checkpoint(self, state: TrainerState) -> None:
        if self.rewards:
            self.checkpoints.append((state.global_step, self._mean_reward))

    def judge(self, args: Any, state: TrainerState, control: TrainerControl, step: Metrics, model: Any) -> None:
        if not args.collapse_patience:
            return
        if self.first is None:
            self.first = {name: step[name] for name in WATCHED if name in step}
        vocabulary = model.config.get_text_config().vocab_size
        for name, sign in SIGNS.items():
            shown = sign.shows(step, self.first, args.collapse_kl, vocabulary)
            self.sign_steps[name] = self.sign_steps[name] + 1 if shown else 0
        if "reward" in step:
            self.rewards = [*self.rewards, step["reward"]][-args.collapse_patience :]
        if len(self.rewards) == args.collapse_patience:
            self.best_reward = (
                self._mean_reward if self.best_reward is None else max(self.best_reward, self._mean_reward)
            )
        shown_long = [name for name, steps in self.sign_steps.items() if steps >= args.collapse_patience]
        if shown_long and self._reward_is_lost:
            self._stop(state, control, step, shown_long)

    @property
    def _mean_reward(self) -> float:
        return sum(self.rewards) / max(len(self.rewards), 1)

    @property
    def _reward_is_lost(self) -> bool:
        start = (self.first or {}).get("reward")
        if start is None or not self.rewards:
            return True  # a policy whose answers cannot be judged has nothing to show for itself
        best = start if self.best_reward is None else max(start, self.best_reward)
        return self._mean_reward <= (start + best) / 2

    def _stop(self, state: TrainerState, control: TrainerControl, step: Metrics, signs: list[str]) -> None:
        first = self.first or {}
        steps = max(self.sign_steps[name] for name in signs)
        # Answers of step n come from the offsets after step n - 1; those of the last step without a sign were sound.
        sound = [(reward, at) for at, reward in self.checkpoints if at < state.global_step - steps]
        start = first.get("reward", -math.inf)
        self.sound_checkpoints = [at for reward, at in sorted(sound, reverse=True) if reward > start]
        self.has_collapsed = control.should_training_stop = True
        if state.is_world_process_zero:
            seen = " and ".join(SIGNS[name].says(step, first) for name in signs)
            logger.warning(
                f"The policy has collapsed: training stops at step {state.global_step}. For {steps} steps it has been "
                f"like this: {seen}. Their mean reward is {self._mean_reward:.3g} "
                f"({first.get('reward', math.nan):.3g} in the first step). Try a lower `learning_rate`, a higher "
                "`kl_coef`, a larger batch, or a reward that answers of this kind do not earn. "
                "`collapse_patience=0` turns this guard off."
            )
