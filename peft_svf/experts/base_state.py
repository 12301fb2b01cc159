"""The weights of a base model that has adapters in it, under the names they have without."""

from __future__ import annotations

import re

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel

from peft_svf.tuner.mixed_batch import MixedBatch


_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")  # several in a row where two parameters of a module are adapted


def plain_state_dict(base: PreTrainedModel, batch: MixedBatch | None = None) -> dict[str, torch.Tensor]:
    """
    The base model's weights under the names they have without adapters.

    Args:
        base (`PreTrainedModel`): With adapters injected, none of them merged.
        batch ([`~peft_svf.tuner.mixed_batch.MixedBatch`], *optional*):
            One mixture: modules and tokens that its adapter has trained in full come from the adapter. Otherwise the
            base model's.

    Raises:
        ValueError: Several adapters are mixed, and one has trained whole modules or tokens.
    """
    wrappers = {name: m for name, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    within = tuple(f"{name}." for name in wrappers)
    state = {
        without_wrappers(key): tensor
        for key, tensor in base.state_dict().items()
        if ".svf_" not in key and not key.startswith(within)
    }
    made: dict[int, torch.Tensor] = {}
    for name, wrapper in wrappers.items():
        adapter = None if batch is None else batch.check_one_hot(wrapper._adapters)[0]
        state |= {f"{name}.{key}": tensor for key, tensor in _whole_module(wrapper, adapter, made).items()}
    return state


def without_wrappers(name: str) -> str:
    """A name within the model as it is without the layers that PEFT has put around others."""
    return _WRAPPED.sub("", name)


def _whole_module(
    wrapper: AuxiliaryTrainingWrapper, adapter: str | None, made: dict[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state of a module of which adapters train a copy, or tokens; `made` keeps tied embeddings tied."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        own = adapter is not None and adapter in wrapper.modules_to_save
        return dict((wrapper.modules_to_save[adapter] if own else wrapper.original_module).state_dict())
    if not isinstance(wrapper, TrainableTokensWrapper):
        raise ValueError(f"modules that PEFT wraps as {type(wrapper).__name__} cannot be exported")
    layer = wrapper.token_adapter
    state = dict(layer.get_base_layer().state_dict())
    if adapter is not None and adapter in layer.trainable_tokens_delta:
        pointer = state["weight"].data_ptr()
        if pointer not in made:
            made[pointer] = layer.get_merged_weights([adapter]).detach()
        state["weight"] = made[pointer]
    return state
