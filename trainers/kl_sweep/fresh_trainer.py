"""Setting a trainer back to what it was before its first `train`, so that its next run depends on no earlier one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers.trainer_callback import TrainerControl


# Builds or refills a value as it was when remembered; containers and tensors stay the same objects.
Restore = Callable[[], Any]


class FreshTrainer:
    """What has to be set back in a trainer before a run that depends on no other.

    Plain data of the trainer and of its callbacks (numbers, texts, tensors and containers of them) is remembered and
    set back in place. Other objects that a callback or a reward function refers to are shared by all runs. The model
    is reached through the trainer's `_start`, the random generators through the seed, as `GRPOTrainer` leaves them.

    Args:
        trainer (`Trainer`): The trainer, not trained yet.
    """

    def __init__(self, trainer: Any) -> None:
        self.start: dict[str, torch.Tensor] = trainer._start  # a run rebinds the name to its own start
        self.names = set(vars(trainer))
        self.data = remember(vars(trainer))
        self.callbacks = [(callback, dict(vars(callback))) for callback in trainer.callback_handler.callbacks]
        self.callback_data = [remember(attributes) for _, attributes in self.callbacks]
        self.brings_optimizer = trainer.optimizer is not None or trainer.lr_scheduler is not None
        scaler = trainer.accelerator.scaler
        self.scaler_state = copy.deepcopy(scaler.state_dict()) if scaler is not None else None

    def restore(self, trainer: Any) -> None:
        """Set `trainer` back. Private attributes that it did not have before are removed."""
        for name, value in list(vars(trainer).items()):
            if name.startswith("_") and name not in self.names and value is not self:
                delattr(trainer, name)
        vars(trainer).update({name: refill() for name, refill in self.data.items()})
        for (callback, attributes), data in zip(self.callbacks, self.callback_data, strict=True):
            vars(callback).clear()
            vars(callback).update(attributes | {name: refill() for name, refill in data.items()})
        handler = trainer.callback_handler
        handler.callbacks = [callback for callback, _ in self.callbacks]
        trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
        trainer.control = TrainerControl()
        if self.scaler_state:
            trainer.accelerator.scaler.load_state_dict(self.scaler_state)
        trainer._return_to_start()
        trainer.model.zero_grad(set_to_none=True)
        set_seed(trainer.args.seed, device_specific=True)


def remember(attributes: dict[str, Any]) -> dict[str, Restore]:
    """How to get back each attribute that is plain data."""
    return {name: _remember(value) for name, value in attributes.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, complex, str, bytes, torch.Tensor)


def _remember(value: Any) -> Restore:
    # In place, because others may hold the same object: a callback, for example, the trainer's metrics.
    if isinstance(value, dict):
        items = {key: _remember(item) for key, item in value.items()}
        return lambda: _refill(value, value.update, {key: item() for key, item in items.items()})
    if isinstance(value, (list, deque)):
        elements = [_remember(element) for element in value]
        return lambda: _refill(value, value.extend, [element() for element in elements])
    if isinstance(value, set):
        members = frozenset(value)
        return lambda: _refill(value, value.update, members)
    if type(value) is torch.Tensor:
        saved = value.detach().clone()
        return lambda: _copy_back(value, saved)
    return lambda: value


def _refill(container: Any, add: Callable[[Any], None], content: Any) -> Any:
    container.clear()
    add(content)
    return container


def _copy_back(tensor: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    tensor.data.copy_(saved)
    return tensor
