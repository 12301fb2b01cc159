"""The card that stands beside every saved expert: what the trainer knows of it, and no results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from peft_svf.experts.base_commit import base_commit
from peft_svf.experts.live_facts import attach_facts
from peft_svf.hub_cards import ExpertCardData, write_expert_card
from peft_svf.trainers.distributed import is_sharded


METHOD = "policy gradient (REINFORCE)"


class WritesExpertCards(GRPOTrainer):
    """
    Mixin: whatever is saved has the card of the expert, not GRPO's; adapters that are not SVF keep TRL's.

    One card is written for each save, beside the expert that it is of. It draws no pictures, which would take longer
    than the saving, and says nothing that a resumed run could not repeat.

    The class that uses it sets `_base_model`, `_is_svf` and `_start`, copies of what is trainable by name.

    Attributes:
        card_facts (`Mapping[str, Any]`):
            What the trainer cannot know, for the card: fields of [`~peft_svf.hub_cards.ExpertCardData`] such as
            `task`, `label`, `description`, `datasets` and `license`. They win over what the trainer knows.
    """

    _base_model: Any
    _is_svf: bool
    _start: dict[str, Tensor]
    _staging: Path | None
    card_facts: Mapping[str, Any] = {}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the expert into `output_dir`, with what the trainer knows and no results.

        While a checkpoint is saved, which TRL calls this for, there is no expert in `output_dir`: the card goes into
        the checkpoint only.

        Args:
            model_name (`str`, *optional*): Name of the expert. Defaults to the name of the folder.
            dataset_name (`str`, *optional*): What the expert was trained on.
            tags (`str` or `list[str]`, *optional*): Used only for adapters that are not SVF, whose card is TRL's.
        """
        if not self._is_svf:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero() and self._staging is None:
            os.makedirs(self.args.output_dir, exist_ok=True)
            write_expert_card(self.args.output_dir, self.expert_facts(model_name, dataset_name), pictures=False)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; afterwards the live model knows what is known of its expert."""
        if self._is_svf:
            self.expert_facts()  # raises for what `card_facts` cannot say, before anything is trained
        output: TrainOutput = super().train(*args, **kwargs)
        self._tell_the_model()
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the expert with its card, last: PEFT rewrites the metadata of any card that it finds."""
        super()._save(output_dir, state_dict)
        if self._is_svf and self.args.should_save:
            write_expert_card(output_dir or self.args.output_dir, self.expert_facts(), pictures=False)
        self._tell_the_model()

    def _tell_the_model(self) -> None:
        """Keep the facts with the live model, for whoever pushes or banks that."""
        if self._is_svf and not is_sharded(self):
            model = self.accelerator.unwrap_model(self.model)
            attach_facts(model, model.active_adapter, self.expert_facts().to_metadata())

    def expert_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> ExpertCardData:
        """
        What is known of the expert now: how it is trained, on what base model, and `card_facts`.

        Args:
            model_name (`str`, *optional*): Name of the expert. Defaults to the name of `output_dir`.
            dataset_name (`str`, *optional*): What the expert was trained on. Defaults to the task in `card_facts`.

        Raises:
            ValueError: A fact in `card_facts` cannot be used; it is named.
        """
        args, config = self.args, self._base_model.config
        given = {name: value for name, value in self.card_facts.items() if value is not None}
        known = {
            "name": model_name or os.path.basename(os.path.abspath(args.output_dir)),
            "base_model": config._name_or_path or None,
            "base_revision": base_commit(config),
            "task": dataset_name,
            "reward": ", ".join(self.reward_func_names),
            "method": METHOD,
            "baseline": args.baseline,
            "kl_coefficient": args.kl_coef,
            "kl_estimator": args.kl_estimator if args.kl_coef else None,
            "seeds": [args.seed],
            "steps": self.state.global_step,
            "learning_rate": args.learning_rate,
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "train_prompts": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            "validation": self._validation_facts(),
            "precision": precision_of(self._base_model),
            "pipeline_tag": "image-text-to-text" if self._is_vlm else "text-generation",
        }
        facts = ExpertCardData.from_metadata({**known, **given})
        return replace(facts, trained_parameters=sum(offsets.numel() for offsets in self._start.values()))

    def _validation_facts(self) -> dict[str, Any]:
        """What the best checkpoint so far was chosen by."""
        best, metric = self.state.best_metric, self.args.metric_for_best_model
        if not self.args.load_best_model_at_end or best is None or metric is None:
            return {}
        start = getattr(self, "base_eval_reward", None)
        is_reward = metric.removeprefix("eval_") == "reward"
        found = {
            "metric": f"validation {metric.removeprefix('eval_')}",
            "start": round(float(start), 6) if start is not None and is_reward else None,
            "best": round(float(best), 6),
            "step": self.state.best_global_step,
        }
        return {name: value for name, value in found.items() if value is not None}


def precision_of(model: Any) -> str | None:
    """`"bfloat16"`, or of a quantized model `"4-bit"` or `"8-bit"`."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        options = quantization if isinstance(quantization, dict) else quantization.to_dict()
        bits = [name for name in (4, 8) if options.get(f"load_in_{name}bit")]
        return f"{bits[0]}-bit" if bits else f"quantized ({options.get('quant_method', 'method not known')})"
    return str(model.dtype).removeprefix("torch.") if getattr(model, "dtype", None) is not None else None
