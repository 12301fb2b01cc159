"""SVFModel: puts SVF layers into a model, and makes sure that an adapter only ever meets the base it belongs to."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.other import _set_adapter
from torch import nn

from peft_svf.tuner.adapted import adapted_layers, adapted_name, wrapping_modules
from peft_svf.tuner.base_check import check_base_model, collect_fingerprint, compare_fingerprints
from peft_svf.tuner.bases import compute_bases
from peft_svf.tuner.checkpoint import complete_checkpoint, complete_offsets, take_bases
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.distributed import (
    keep_bases_out_of_ddp,
    refuse_merging_into_shards,
    refuse_sharded_model,
    run_where_weights_are,
)
from peft_svf.tuner.layer import Linear, SVFLayer
from peft_svf.tuner.mixture import check_mixture, mix_offsets
from peft_svf.tuner.module_checks import ModuleChecks
from peft_svf.tuner.parameter import (
    ParamWrapper,
    check_nesting,
    why_not_parameter,
)
from peft_svf.tuner.rollback import Rollback
from peft_svf.tuner.routed import RoutedModel, share_batches
from peft_svf.tuner.saved_bases import wait_for_bases
from peft_svf.tuner.selection import check_adapter_name, matches_by_ending, resolve_all_linear


class SVFModel(RoutedModel, BaseTuner):
    """
    Adapts a model by scaling the singular values of its weights (Transformer², arXiv 2501.06252, section 3.1).

    Args:
        model (`torch.nn.Module`): The model to adapt, changed in place.
        config ([`SVFConfig`]): The configuration of the adapter. The fingerprint of the base model is written into it.
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
    targeted_module_names: list[str]
    targeted_parameter_names: list[str]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter `adapter_name`, configured in `self.peft_config`, to `model`.

        Raises:
            ValueError: The adapter was trained on another base model, has a name that cannot be used, meets a module
                that cannot be adapted or a weight that has no singular basis. The model is left as it was.
        """
        config = self.peft_config[adapter_name]
        before = Rollback(model)
        targets_before = list(self.targeted_module_names), list(self.targeted_parameter_names)
        self._checks, self._refused = ModuleChecks(model), dict[str, str]()
        try:
            check_adapter_name(model, adapter_name)
            refuse_sharded_model(model, config.target_parameters)
            if config.compares_base:
                run_where_weights_are(partial(check_base_model, model, config))
            resolve_all_linear(config, model)
            with _no_false_warning(config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._raise_if_refused()
            self.svf_batches = share_batches(model)
            check_nesting(model, adapter_name)
            self._prepare_bases(model, adapter_name, config)
            keep_bases_out_of_ddp(model)
        except Exception:
            before.restore()
            del self.peft_config[adapter_name]
            self.targeted_module_names, self.targeted_parameter_names = targets_before
            raise
        finally:
            del self._checks, self._refused  # they hold the parameters, which FSDP replaces to free their memory

    def _prepare_bases(self, model: nn.Module, adapter_name: str, config: SVFConfig) -> None:
        layers = adapted_layers(model, adapter_name)
        if config.target_parameters and not layers:
            raise ValueError(
                f"`exclude_modules` and `layers_to_transform` leave none of the parameters {config.target_parameters}"
            )
        if config.compares_base and config.save_basis:
            wait_for_bases(layers, adapter_name, config.base_fingerprint or {})
            return  # they come with the weights of the adapter
        compute_bases(layers, config.basis_source)
        fingerprint = collect_fingerprint(layers)
        if config.compares_base and config.basis_source:
            compare_fingerprints(fingerprint, config)
        if not config.compares_base:
            config.base_fingerprint = fingerprint

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_merging_into_shards(self.model)

    def _raise_if_refused(self) -> None:
        if self._refused:
            reasons = "; ".join(f"'{name}' {reason}" for name, reason in self._refused.items())
            raise ValueError(f"SVF cannot adapt {reasons}. Leave them out: `exclude_modules={list(self._refused)}`")

    @staticmethod
    def _check_target_module_exists(peft_config: SVFConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        targets = peft_config.target_modules
        if found and peft_config.layers_to_transform is not None and isinstance(targets, set) and key in targets:
            # PEFT ignores `layers_to_transform` for full names, which is what "all-linear" becomes: match by ending.
            return matches_by_ending(peft_config, key)
        return found

    def _create_and_replace(
        self,
        peft_config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None and not matches_by_ending(peft_config, current_key):
            return  # PEFT ignores `layers_to_transform` and `exclude_modules` for parameters
        if isinstance(target, SVFLayer) and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, peft_config)
            return
        reason = self._why_not(current_key, target, parent, parameter_name)
        if reason is not None:
            self._refused[current_key] = reason
            return
        new_module: SVFLayer
        if parameter_name is None:
            new_module = Linear(target, adapter_name, peft_config, current_key, **get_quantization_kwargs(self))
        else:
            new_module = ParamWrapper(target, adapter_name, parameter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _why_not(self, name: str, target: nn.Module, parent: nn.Module, parameter_name: str | None) -> str | None:
        if parameter_name is not None:
            return why_not_parameter(self._checks, name, target, parent)
        if isinstance(target, ParamWrapper):
            return "because an adapter with `target_parameters` adapts its parameter already"
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        return self._checks.why_not(name, base_layer, parent)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version assigns `new_module.weight = child.weight` when it unloads, which not every layer has.
        setattr(parent, child_name, new_module)
        base_layer = child.base_layer if isinstance(child, BaseTunerLayer) else child
        device = next((parameter.device for parameter in base_layer.parameters() if not parameter.is_meta), None)
        for name, module in new_module.named_modules():
            if self.prefix in name and device is not None and not any(p.is_meta for p in module.parameters()):
                module.to(device)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return  # offsets are float32 from the start
        for layer in adapted_layers(self.model, adapter_name).values():
            if layer.svf_basis is not None:
                layer.svf_offset[adapter_name].to(layer.svf_basis.dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SVFConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return complete_checkpoint(model, config, adapter_name, state_dict, entries)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = take_bases(model, adapter_name, state_dict)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return complete_offsets(model, adapter_name, state_dict)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter, or several, the active ones, as in [`~peft.PeftModel.set_adapter`]."""
        # PEFT visits every module of the model, twice; in a large model that is most of the time.
        for module in wrapping_modules(self.model):
            if isinstance(module, AuxiliaryTrainingWrapper):
                _set_adapter(module, adapter_name, inference_mode=inference_mode)
            elif isinstance(module, SVFLayer):
                if module.merged:
                    warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
                    module.unmerge()
                module.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Apply the offsets of an adapter times `strength`: 0 is the base model, 1 the adapter as trained.

        Not saved with the adapter; `add_weighted_adapter([name], [strength], new_name)` makes one that is.

        Raises:
            ValueError: There is no such adapter, it is merged, or the number is not finite.
        """
        layers = adapted_layers(self.model, adapter_name).values()
        if not layers:
            raise ValueError(f"there is no adapter named '{adapter_name}'; loaded are {', '.join(self.peft_config)}")
        if not math.isfinite(strength):
            raise ValueError(f"`strength` must be a finite number, got {strength}")
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"the adapter '{adapter_name}' is merged; call `unmerge_adapter` first")
        for layer in layers:
            layer.svf_strength[adapter_name] = float(strength)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        normalize: bool = False,
        residual: bool = True,
    ) -> None:
        """Add an adapter that is a mixture of others, z' = Σ αₖ zₖ (Transformer², section 3.2, few-shot adaptation).

        A module that an adapter does not adapt counts as z = 1. The mixture is exact, not an approximation.

        Args:
            adapters (`list[str]`): The adapters to mix, at the strength they have.
            weights (`list[float]`): Their weights α, of any sign.
            adapter_name (`str`): The name of the new adapter. It is not made active.
            normalize (`bool`, *optional*, defaults to `False`): Divide the weights by their sum first.
            residual (`bool`, *optional*, defaults to `True`):
                Leave the base model at weight 1 − Σα, so that offset' = Σ αₖ offsetₖ, and one adapter at weight 0.5 is
                that adapter at half strength. `False` is the formula of the paper as it stands,
                offset' = Σ αₖ offsetₖ + Σα − 1. If the weights sum to 1, both are the same.

        Raises:
            ValueError: An unknown adapter, a taken name, or weights that cannot be used.
        """
        weights = check_mixture(self.peft_config, adapters, weights, adapter_name, normalize)
        layers = {
            adapted_name(name, layer): layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, SVFLayer) and not layer.svf_offset.keys().isdisjoint(adapters)
        }
        offsets = {name: mix_offsets(layer, adapters, weights, residual) for name, layer in layers.items()}
        self.peft_config[adapter_name] = SVFConfig(
            task_type=self.peft_config[adapters[0]].task_type,
            base_model_name_or_path=self.peft_config[adapters[0]].base_model_name_or_path,
            target_modules=[name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)],
            target_parameters=[name for name, layer in layers.items() if isinstance(layer, ParamWrapper)] or None,
            rank_pattern={re.escape(name): offset.shape[-1] for name, offset in offsets.items()},
            inference_mode=True,
        )
        self.inject_adapter(self.model, adapter_name)
        for name, layer in layers.items():
            layer.svf_offset[adapter_name].get_parameter("weight").data.copy_(offsets[name])


@contextmanager
def _no_false_warning(config: SVFConfig) -> Iterator[None]:
    """PEFT looks for the names in `rank_pattern` among modules only, and would call those of parameters ignored."""
    with warnings.catch_warnings():
        if config.target_parameters and config.rank_pattern:
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match any")
        yield
