"""The SVF layer: a linear layer whose singular values are scaled by 1 + offset, in the singular basis of its weight.

    input side  (in ≤ out):  y = base(x + ((x Q) ⊙ offset) Qᵀ)
    output side (out < in):  y = y₀ + ((y₀ Q) ⊙ offset) Qᵀ,  y₀ = W x before the bias

The base layer is only ever called, so quantized and sharded linear layers work as they are. Several adapters at once
mean the sum of their offsets, which leaves the base model at weight 1 − K (a mixture under the residual convention).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.spectrum import SingularBasis, singular_basis, weight_change, weight_sketch
from peft_svf.tuner.config import SVFConfig


BASE_MODEL = "__base__"  # PEFT's name for "no adapter" in `adapter_names`
INIT_STD = 0.1


class SVFOffset(nn.Module):
    """The offsets z − 1 of one weight under one adapter: the trained parameter, shape (r,), always float32.

    A module of its own, because FSDP wraps leaf modules that own a trainable `.weight`, and because TRL finds the
    parameters of an adapter by `.<adapter>.` inside their names.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        return self.weight


class SVFLayer(BaseTunerLayer):
    """What an adapted layer keeps: one singular basis, shared by all adapters, and one offset vector per adapter.

    Attributes:
        svf_offset (`nn.ModuleDict`): [`SVFOffset`] by adapter name.
        svf_basis (`torch.Tensor`): Q, shape (r, r), a buffer that no checkpoint holds.
        svf_side (`"input"` or `"output"`): The side on which Q acts.
        svf_sketch (`list[float]`): The fingerprint of the weight that Q was computed from.
    """

    adapter_layer_names = ("svf_offset",)
    svf_basis: torch.Tensor
    svf_unmerged_weight: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.svf_offset = nn.ModuleDict()

        weight = self._to_matrix(self.get_base_weight())
        basis = singular_basis(weight)
        self.svf_side = basis.side
        self.svf_sketch = weight_sketch(weight)
        dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
        self.register_buffer("svf_basis", basis.vectors.to(weight.device, dtype), persistent=False)
        # The weight as it was before merging; a buffer so that it follows the model to other devices.
        self.register_buffer("svf_unmerged_weight", None, persistent=False)

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add the offsets of a new adapter; the basis is the one that the layer already has."""
        offset = SVFOffset(self.svf_basis.shape[0])
        if not config.init_weights:
            nn.init.normal_(offset.weight, std=INIT_STD)
        self.svf_offset[adapter_name] = offset
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's, never changes the dtype: near 0 a half-precision offset would lose the steps of the optimizer.
        offset = self.svf_offset[adapter_name]
        if not offset.weight.is_meta:
            offset.to(self.svf_basis.device if device is None else device)

    def _to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """From the layout of the base layer to (out, in), and back."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _active_offset(self) -> torch.Tensor | None:
        """The offset to apply in this forward pass, shape (r,); `None` if the base layer alone is right."""
        return None if self.merged else self._sum_offsets(self.active_adapters)

    def _sum_offsets(self, adapter_names: Iterable[str]) -> torch.Tensor | None:
        """Σ offset over those of the adapters that this layer has, shape (r,); `None` if it has none of them."""
        offsets = [self.svf_offset[name]() for name in adapter_names if name in self.svf_offset]
        if not offsets:
            return None
        return offsets[0] if len(offsets) == 1 else torch.stack(offsets).sum(0)

    def _gather_offsets(self, adapter_names: list[str]) -> torch.Tensor:
        """The offsets of each row of a mixed batch, shape (B, r); zeros for the base model."""
        unique = sorted({name for name in adapter_names if name in self.svf_offset})
        base = torch.zeros(self.svf_basis.shape[0], dtype=torch.float32, device=self.svf_basis.device)
        table = torch.stack([base, *(self.svf_offset[name]() for name in unique)])  # (1 + K, r)
        index = [unique.index(name) + 1 if name in unique else 0 for name in adapter_names]
        return table[torch.tensor(index, device=table.device)]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _scale_singular_values(self, x: torch.Tensor, offset: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer itself: `offset` is (r,) for the whole batch, or (B, 1, …, r) with one row for each row of x."""
        if self.svf_side == "input":
            return self.base_layer(x + self._project(x, offset), *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)  # (..., out)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        unbiased = result if self.bias is None else result - self.bias
        return result + self._project(unbiased, offset).to(result.dtype)

    def _project(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """((x Q) ⊙ offset) Qᵀ, in the dtype of x."""
        basis = self.svf_basis
        scaled = (self._cast_input_dtype(x, basis.dtype) @ basis) * offset  # float32 or better, as the offset is
        return (scaled.to(basis.dtype) @ basis.T).to(x.dtype)

    def _row_offsets(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """The offsets of a mixed batch, shape (B, 1, …, r) with as many axes as x."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        offsets = self._gather_offsets(repeat_adapter_names(adapter_names, x.shape[0]))  # (B, r)
        return offsets.view(offsets.shape[0], *(1,) * (x.dim() - 2), offsets.shape[1])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the weight change of the given adapters to the base weight. The weight as it was is kept, so that
        [`~SVFLayer.unmerge`] brings it back bit for bit.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the merged weight for NaN and infinite values before it replaces the base weight.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge, all active ones if not given.

        Raises:
            ValueError: `safe_merge` found a value that is not finite. Nothing was changed.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svf_offset]
        if not new:
            return
        original = self._get_unmerged_weight()
        change = self._weight_change([*self.merged_adapters, *new])
        merged = (original.to(change.dtype) + change).to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken; nothing was "
                "merged into this layer"
            )
        self.svf_unmerged_weight = original
        self.set_base_weight(merged)
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Put the weight from before [`~SVFLayer.merge`] back, bit for bit (a quantized one is quantized again)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.set_base_weight(self.svf_unmerged_weight)
        self.svf_unmerged_weight = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter in the layout of the base weight, in float32 or better, whether it is merged or not."""
        return self._weight_change([adapter])

    def _get_unmerged_weight(self) -> torch.Tensor:
        return self.get_base_weight() if self.svf_unmerged_weight is None else self.svf_unmerged_weight

    @torch.no_grad()
    def _weight_change(self, adapter_names: list[str]) -> torch.Tensor:
        offset = self._sum_offsets(adapter_names)
        if offset is None:
            raise ValueError(f"this layer has no adapter named {', '.join(adapter_names)}")
        basis = SingularBasis(self.svf_side, self.svf_basis, torch.empty(0))
        return self._to_matrix(weight_change(self._to_matrix(self._get_unmerged_weight()), basis, offset))


class Linear(nn.Module, SVFLayer):
    """SVF of a linear layer: `nn.Linear`, `transformers.pytorch_utils.Conv1D`, or a quantized linear layer.

    Args:
        base_layer (`nn.Module`): The layer to adapt.
        adapter_name (`str`): The first adapter.
        config (`SVFConfig`): Its configuration.

    Raises:
        ValueError: The weight has no singular basis (see [`singular_basis`]).
        TypeError: The weight is quantized in a format that cannot be dequantized.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SVFConfig, **kwargs: Any) -> None:
        super().__init__()
        SVFLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Shape (..., in) to (..., out). `adapter_names` holds one name for each row of the batch."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._scale_singular_values(x, self._row_offsets(x, adapter_names), *args, **kwargs)
        offset = self._active_offset()
        if offset is None:
            return self.base_layer(x, *args, **kwargs)
        return self._scale_singular_values(x, offset, *args, **kwargs)

    def __repr__(self) -> str:
        return "svf." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def repeat_adapter_names(adapter_names: list[str], rows: int) -> list[str]:
    """Repeat each name so that there is one for each row: for the beams and returned sequences of its prompt, and for
    its tokens in layers that see them flattened (OPT). All of these keep the rows of one prompt next to each other."""
    if not adapter_names or rows % len(adapter_names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} and "
            f"{rows} respectively."
        )
    return [name for name in adapter_names for _ in range(rows // len(adapter_names))]
