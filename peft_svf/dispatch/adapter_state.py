"""AdapterState: notices that the values of an adapter have changed, by training, hot-swapping or a new strength."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_svf.dispatch.locking import PicklableLock
from peft_svf.tuner.adapted import wrapping_modules
from peft_svf.tuner.layer import SVFLayer


class AdapterState:
    """
    A version number of the values of one adapter: everything the adapter adds to the base model.

    The values themselves are compared with a copy from the last look, since PyTorch's own version counters miss writes
    through `.data` and tensors that were replaced. Offsets are few (Llama-3.1-8B: 0.9 million numbers).

    Args:
        model (`PeftModel`): the model.
        adapter (`str`): the name of the adapter in it.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self.model, self.adapter = model, adapter
        self._lock = PicklableLock()
        self._config: object = None
        self._modules: list[SVFLayer | AuxiliaryTrainingWrapper] = []
        self._seen: tuple[list[float], Tensor] | None = None
        self._version = 0

    def version(self) -> int:
        """
        A number that is the same as at the last call if, and only if, all values are.

        Raises:
            ValueError: the model has no such adapter any more.
        """
        with self._lock:
            config = self.model.peft_config.get(self.adapter)
            if config is None:
                known = ", ".join(self.model.peft_config) or "none"
                raise ValueError(f"The model has no adapter '{self.adapter}' any more; it has {known}.")
            if config is not self._config:  # the adapter was loaded anew: perhaps into other layers
                self._config, self._modules = config, self._find_modules()
            seen = self._look()
            if not _same(self._seen, seen):
                self._version += 1
            self._seen = seen
            return self._version

    def _find_modules(self) -> list[SVFLayer | AuxiliaryTrainingWrapper]:
        modules = wrapping_modules(self.model.get_base_model())
        return [
            module
            for module in modules
            if (isinstance(module, SVFLayer) and self.adapter in module.svf_offset)
            or isinstance(module, AuxiliaryTrainingWrapper)
        ]

    def _look(self) -> tuple[list[float], Tensor] | None:
        """Strengths and values; `None` if the values are not in memory (offloaded), so that nobody can tell."""
        strengths, parameters = [], list[Tensor]()
        for module in self._modules:
            if isinstance(module, SVFLayer):
                strengths.append(module.svf_strength[self.adapter])
                parameters += module.svf_offset[self.adapter].parameters()
            else:
                parameters += _parameters_of(module, self.adapter)
        if not parameters or any(parameter.is_meta for parameter in parameters):
            return None
        device = parameters[0].device
        return strengths, torch.cat([p.detach().flatten().to(device, torch.float32) for p in parameters])


def _parameters_of(module: nn.Module, adapter: str) -> list[Tensor]:
    """What an adapter trains of a module as a whole, or of its embeddings."""
    return [parameter for name, parameter in module.named_parameters() if adapter in name.split(".")]


def _same(before: tuple[list[float], Tensor] | None, now: tuple[list[float], Tensor] | None) -> bool:
    if before is None or now is None or before[0] != now[0]:
        return False
    return before[1].device == now[1].device and torch.equal(before[1], now[1])
