"""The card that stands beside every saved expert: what the trainer knows of it, and no results."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from peft_svf.hub_cards import ExpertCardData, write_expert_card


class WritesExpertCards(GRPOTrainer):
    """Mixin: whatever is saved has the card of the expert, not GRPO's; adapters that are not SVF keep TRL's.

    The class that uses it sets `_base_model`, `_is_svf` and `_start`, copies of what is trainable by name.
    """

    _base_model: Any
    _is_svf: bool
    _start: dict[str, Tensor]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the expert into `output_dir`, with what the trainer knows and no results.

        Args:
            model_name (`str`, *optional*): Name of the expert. Defaults to the name of the folder.
            dataset_name (`str`, *optional*): What the expert was trained on.
            tags (`str` or `list[str]`, *optional*): Used only for adapters that are not SVF, whose card is TRL's.
        """
        if not self._is_svf:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            write_expert_card(self.args.output_dir, self._card_facts(model_name, dataset_name))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the expert with its card, last: PEFT rewrites the metadata of any card that it finds."""
        super()._save(output_dir, state_dict)
        if self._is_svf and self.args.should_save:
            write_expert_card(output_dir or self.args.output_dir, self._card_facts())

    def _card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> ExpertCardData:
        args, config = self.args, self._base_model.config
        return ExpertCardData(
            name=model_name or os.path.basename(os.path.abspath(args.output_dir)),
            base_model=config._name_or_path or None,
            base_revision=getattr(config, "_commit_hash", None),
            trained_parameters=sum(offsets.numel() for offsets in self._start.values()),
            task=dataset_name,
            reward=", ".join(self.reward_func_names),
            kl_coefficient=args.kl_coef,
            seeds=(args.seed,),
            steps=self.state.global_step,
            learning_rate=args.learning_rate,
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
