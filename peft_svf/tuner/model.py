"""SVFModel: puts SVF layers into a model, and makes sure that an adapter only ever meets the base it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, _get_submodules, get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.tuner.base_check import check_base_model, collect_fingerprint
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import BASE_MODEL, Linear, SVFLayer, repeat_adapter_names


class SVFModel(BaseTuner):
    """
    Adapts a model by scaling the singular values of its weights (Transformer², arXiv 2501.06252, section 3.1).

    Args:
        model (`torch.nn.Module`): The model to adapt, changed in place.
        config ([`SVFConfig`]): The configuration of the adapter. The object itself is left as it is: the model keeps a
            copy that also holds the fingerprint of the base model.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the offsets without memory, to be filled by a checkpoint.

    Example:

    ```py
    >>> import peft_svf
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForCausalLM

    >>> base_model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B-Instruct")
    >>> model = get_peft_model(base_model, peft_svf.SVFConfig())
    ```
    """

    prefix: str = "svf_"
    tuner_layer_cls = SVFLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter `adapter_name`, configured in `self.peft_config`, to `model`.

        Raises:
            ValueError: The adapter was trained on another base model, has a name that cannot be used, or meets a
                weight that has no singular basis. The model is left as it was.
        """
        # A copy, so that one configuration object can serve for several models.
        config = copy.copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        try:
            _check_adapter_name(adapter_name)
            if config.base_fingerprint is not None:
                check_base_model(model, config.base_fingerprint, config.base_model_name_or_path)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_out(model, adapter_name)
            raise
        if config.base_fingerprint is None:
            config.base_fingerprint = collect_fingerprint(model, adapter_name)

    def _take_out(self, model: nn.Module, adapter_name: str) -> None:
        """Undo an injection that failed, perhaps half-way."""
        del self.peft_config[adapter_name]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SVFLayer) and adapter_name in layer.svf_offset:
                if len(layer.svf_offset) > 1:
                    del layer.svf_offset[adapter_name]
                else:
                    parent, _, child_name = _get_submodules(model, name)
                    setattr(parent, child_name, layer.base_layer)

    @staticmethod
    def _check_target_module_exists(peft_config: SVFConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        targets = peft_config.target_modules
        if found and peft_config.layers_to_transform is not None and isinstance(targets, set) and key in targets:
            # PEFT ignores `layers_to_transform` for full names, which is what "all-linear" becomes: match by ending.
            by_ending = copy.copy(peft_config)
            by_ending.target_modules = {key.rpartition(".")[2]}
            return BaseTuner._check_target_module_exists(by_ending, key)
        return found

    def _create_and_replace(
        self,
        peft_config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, Linear):
            target.update_layer(adapter_name, peft_config)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_linear(base_layer):
            raise TypeError(
                f"SVF cannot adapt '{current_key}' of type {type(base_layer).__name__}: only linear layers "
                "(`torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`, quantized linear layers) have a singular "
                "basis; name only those in `target_modules`"
            )
        try:
            new_module = Linear(target, adapter_name, peft_config, **get_quantization_kwargs(self))
        except (TypeError, ValueError) as error:
            raise ValueError(f"SVF cannot adapt '{current_key}': {error}") from error
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version assigns `new_module.weight = child.weight` when it unloads, which not every layer has.
        setattr(parent, child_name, new_module)
        base_layer = child.base_layer if isinstance(child, BaseTunerLayer) else child
        device = next((parameter.device for parameter in base_layer.parameters()), None)
        for name, module in new_module.named_modules():
            if self.prefix in name and device is not None and not any(p.is_meta for p in module.parameters()):
                module.to(device)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: hand the `adapter_names` of a call of forward or generate to every adapted layer."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        hook = partial(_pass_adapter_names, adapter_names=list(adapter_names))
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (SVFLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"`adapter_names` must be a list with one name for each row, got {adapter_names!r}")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`.")
        unknown = set(adapter_names) - set(self.peft_config) - {BASE_MODEL}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; loaded are "
                f"{', '.join(sorted(self.peft_config))} and {BASE_MODEL}"
            )


def _check_adapter_name(adapter_name: str) -> None:
    # Offsets are kept in a ModuleDict, whose keys are attribute names.
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"an adapter cannot be named '{adapter_name}': choose a name without '.', like 'math'")


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer)
    return backend is not None and backend.layer_type == "linear"


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args and isinstance(module, AuxiliaryTrainingWrapper):  # does not repeat the names for beams itself
        adapter_names = repeat_adapter_names(adapter_names, len(args[0]))
    return args, {**kwargs, "adapter_names": adapter_names}
