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
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from peft_svf.spectrum import Side, SingularBasis, weight_change
from peft_svf.tuner.batches import BatchesByThread, RowOffsets
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.distributed import refuse_sharded_weight
from peft_svf.tuner.offset import SVFLogit, SVFOffset
from peft_svf.tuner.quantized import UnmergedLayer, dequantized_weight, device_of


class SVFLayer(BaseTunerLayer):
    """What an adapted layer keeps: one singular basis, shared by all adapters, and one offset vector per adapter.

    Attributes:
        svf_offset (`nn.ModuleDict`): [`SVFOffset`] by adapter name.
        svf_strength (`dict[str, float]`): The factor that each adapter's offset is applied with.
        svf_basis (`torch.Tensor`): Q, shape (r, k): the leading k columns, as many as the largest adapter needs. A
            buffer that no checkpoint holds; `None` until [`~SVFLayer.set_basis`] brings it.
        svf_singular_values (`torch.Tensor`): All singular values, shape (r,).
        svf_sketch (`list[float]`): The fingerprint of the weight that Q was computed from.
        svf_basis_source (`str`): The checkpoint that this weight came from; `None` if it was the layer's own.
        svf_batches ([`BatchesByThread`]): The mixed batches that run; all layers share it, `None` until they do.
        svf_sees_rows (`bool`): Whether the first axis of the input is that of the batch: not in a vision tower, and
            not in the experts of a mixture-of-experts model.
    """

    adapter_layer_names = ("svf_offset",)
    other_param_names = ("svf_strength",)
    active_adapters: list[str]
    _active_adapter: str | list[str]
    svf_basis: torch.Tensor
    svf_singular_values: torch.Tensor
    svf_unmerged_weight: torch.Tensor | None
    stack: tuple[int, ...] = ()  # (experts,) if the layer adapts a stack of matrices

    def __init__(self, base_layer: nn.Module, name: str = "", **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.svf_name = name
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.out_features, self.in_features = self.matrix_shape()
        self.components = min(self.in_features, self.out_features)  # r
        self.svf_side: Side = "input" if self.in_features <= self.out_features else "output"
        self.svf_offset = nn.ModuleDict()
        self.svf_strength: dict[str, float] = {}
        self.svf_sketch: list[float] | None = None
        self.svf_basis_source: str | None = None
        self.svf_batches: BatchesByThread | None = None
        self.svf_sees_rows = True
        self.register_buffer("svf_basis", None, persistent=False)
        self.register_buffer("svf_singular_values", None, persistent=False)
        # The weight as it was before merging; a buffer so that it follows the model to other devices.
        self.register_buffer("svf_unmerged_weight", None, persistent=False)
        self.svf_unmerged_layer: UnmergedLayer | None = None  # the same for a quantized base layer

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        return out_features, in_features

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add the offsets of a new adapter; the basis is shared with the adapters that are there."""
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), self.svf_name), config.rank)
        kind = SVFLogit if config.parametrization == "sigmoid" else SVFOffset
        offset = kind(*self.stack, self.components if rank is None else min(rank, self.components))
        offset.initialize(config.init_weights)
        self.svf_offset[adapter_name] = offset
        self.svf_strength[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def needs_basis(self) -> bool:
        """Whether an adapter wants more columns of the basis than the layer has."""
        columns = -1 if self.svf_basis is None else self.svf_basis.shape[-1]
        return any(offset.shape[-1] > columns for offset in self.svf_offset.parameters())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trainable ones unless `inference_mode`."""
        # What PEFT's own does; its general search for parameters takes three times as long.
        active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, offset in self.svf_offset.items():
            weight: Any = offset._parameters["weight"]
            weight.requires_grad_(name in active and not inference_mode)
        self._active_adapter = active

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the offsets of an adapter, and the room for its basis if that was not loaded yet."""
        super().delete_adapter(adapter_name)
        if "svf_saved_basis" in self._modules:
            self.svf_saved_basis._modules.pop(adapter_name, None)

    def require_basis(self) -> None:
        """Take over the basis that was loaded with an adapter's weights, if there is none yet.

        Raises:
            RuntimeError: None was loaded, or it is damaged.
        """
        if self._modules.get("svf_saved_basis"):  # not there, or empty, if no adapter waits
            self.svf_saved_basis.hand_over(self)
        if self.svf_basis is None:
            raise RuntimeError(
                f"'{self.svf_name}' has no singular basis yet: its adapter was saved with `save_basis=True`, so load "
                "the adapter's weights before using it"
            )

    def set_basis(self, basis: SingularBasis, sketch: list[float]) -> None:
        """Take over the singular basis of the weight, of which only the columns in use are kept, and its sketch."""
        columns = max(offset.shape[-1] for offset in self.svf_offset.parameters())
        vectors = basis.vectors if columns == basis.vectors.shape[-1] else basis.vectors[..., :columns].contiguous()
        device = self.base_device()
        self.svf_basis = vectors.to(device)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.svf_singular_values = basis.singular_values.to(device, dtype)
        self.svf_sketch = sketch

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """From the layout of the base layer to (out, in), and back."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def unmerged_weight(self) -> torch.Tensor:
        """The base weight in its own layout, dequantized, as it is or was without any adapter merged."""
        if self.svf_unmerged_layer is not None:
            return dequantized_weight(self.svf_unmerged_layer.original, self.quantization_backend)
        return self.get_base_weight() if self.svf_unmerged_weight is None else self.svf_unmerged_weight

    def get_base_weight(self) -> torch.Tensor:
        """The base weight in its own layout, dequantized, as it is now: with the merged adapters, if there are any."""
        if self.quantization_backend is None:
            return super().get_base_weight()
        return dequantized_weight(self.get_base_layer(), self.quantization_backend)

    def offset(self, adapter_name: str) -> torch.Tensor:
        """z − 1 of one adapter at its strength, shape (k,)."""
        module = self.svf_offset[adapter_name]
        if isinstance(module, SVFLogit):
            self.require_basis()
        offset = module(self.svf_singular_values)
        strength = self.svf_strength[adapter_name]
        return offset if strength == 1.0 else offset * strength

    def has_mixed_batches(self) -> bool:
        """Whether any thread runs one."""
        return self.svf_batches is not None and self.svf_batches.in_use

    def mixed_batch(self) -> RowOffsets | None:
        """The mixed batch that this thread runs, if it runs one."""
        return None if self.svf_batches is None else self.svf_batches.current()

    def _active_offset(self) -> torch.Tensor | None:
        """Σ offset over the active adapters; `None` if they are disabled, in the base weight or none of this layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        return None if self.merged else self.sum_offsets(self.active_adapters)

    def sum_offsets(self, adapter_names: Iterable[str]) -> torch.Tensor | None:
        """Σ offset over those of the adapters that this layer has, shape (k,); `None` if it has none of them."""
        offsets = [self.offset(name) for name in adapter_names if name in self.svf_offset]
        if len(offsets) < 2:
            return offsets[0] if offsets else None
        return stack_offsets(offsets).sum(0)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def base_device(self) -> torch.device:
        """Where the base layer's weights are; the CPU if they are not there yet."""
        return device_of(self.get_base_layer())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's, does not change the dtype: near 0 a half-precision offset loses the optimizer's small steps.
        offset = self.svf_offset[adapter_name]
        if not offset.weight.is_meta:
            offset.to(self.base_device() if device is None else device)

    def _scale_singular_values(self, x: torch.Tensor, offset: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer itself: `offset` is (k,) for the whole batch, or (B, 1, …, k) with one row for each row of x."""
        if self.svf_side == "input":
            return self.base_layer(x + self._project(x, offset), *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)  # (..., out)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        unbiased = result if self.bias is None else result - self.bias
        return result + self._project(unbiased, offset).to(result.dtype)

    def _project(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """((x Q) ⊙ offset) Qᵀ, in the dtype of x."""
        basis = self._columns(offset.shape[-1])
        scaled = (self._cast_input_dtype(x, basis.dtype) @ basis) * offset  # float32 or better, as the offset is
        return (scaled.to(basis.dtype) @ basis.T).to(x.dtype)

    def _columns(self, count: int) -> torch.Tensor:
        """The leading columns of Q, shape (r, count)."""
        self.require_basis()
        return self.svf_basis if self.svf_basis.shape[-1] == count else self.svf_basis[..., :count]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the weight change of the given adapters to the base weight. The weight as it was is kept, so that
        [`~SVFLayer.unmerge`] brings it back bit for bit. A quantized weight is quantized again, with the error of its
        format, about as large as that of the base: 1e-2 of the weight for 8 bits, 0.1 for 4 bits.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the merged weight for NaN and infinite values before it replaces the base weight.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge, all active ones if not given.

        Raises:
            ValueError: `safe_merge` found a value that is not finite. Nothing was changed.
            TypeError: The base layer has a format that cannot be quantized again (GPTQ, AWQ and the like).
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svf_offset]
        if not new:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(
                f"cannot merge {', '.join(new)} into '{self.svf_name}': a weight in the format "
                f"'{self.quantization_backend.backend_name}' cannot be changed; use the adapter unmerged, or merge it "
                "into the unquantized base model"
            )
        original = self.unmerged_weight()
        change = self._weight_change([*self.merged_adapters, *new])
        merged = (original.to(change.dtype) + change).to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken; nothing was "
                "merged into this layer"
            )
        if self.quantization_backend is None:
            self.svf_unmerged_weight = original
        elif self.svf_unmerged_layer is None:
            self.svf_unmerged_layer = UnmergedLayer(self.get_base_layer())
        self.merged_adapters.extend(new)  # first: whatever interrupts the next line, `unmerge` mends it
        self.set_base_weight(merged)

    def unmerge(self) -> None:
        """Put the weight from before [`~SVFLayer.merge`] back, bit for bit, quantized or not."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        if self.svf_unmerged_layer is None:
            self.set_base_weight(self.svf_unmerged_weight)
        else:
            self.svf_unmerged_layer.restore(self)
        self.svf_unmerged_weight = self.svf_unmerged_layer = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter in the layout of the base weight, in float32 or better, whether it is merged or not."""
        return self._weight_change([adapter])

    @torch.no_grad()
    def _weight_change(self, adapter_names: list[str]) -> torch.Tensor:
        offset = self.sum_offsets(adapter_names)
        if offset is None:
            raise ValueError(f"this layer has no adapter named {', '.join(adapter_names)}")
        weight = self.unmerged_weight()
        refuse_sharded_weight(self.svf_name, weight)
        basis = SingularBasis(self.svf_side, self._columns(offset.shape[0]), self.svf_singular_values)
        return self.to_matrix(weight_change(self.to_matrix(weight), basis, offset))


class Linear(nn.Module, SVFLayer):
    """SVF of a linear layer: `nn.Linear`, `transformers.pytorch_utils.Conv1D`, or a quantized linear layer.

    Args:
        base_layer (`nn.Module`): The layer to adapt.
        adapter_name (`str`): The first adapter.
        config (`SVFConfig`): Its configuration.
        name (`str`, *optional*): The module's name in the model, for `rank_pattern` and messages.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SVFConfig, name: str = "", **kwargs: Any
    ) -> None:
        super().__init__()
        SVFLayer.__init__(self, base_layer, name, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Shape (..., in) to (..., out), under the mixed batch of this thread or else the active adapters."""
        if self.has_mixed_batches():  # a graph break, if the model is compiled
            find = self._uncompiled_offset_for if torch.compiler.is_compiling() else self._offset_for
            offset = find(x)
        else:
            offset = self._active_offset()
        if offset is None:
            return self.base_layer(x, *args, **kwargs)
        return self._scale_singular_values(x, offset, *args, **kwargs)

    def _offset_for(self, x: torch.Tensor) -> torch.Tensor | None:
        batch = self.mixed_batch()
        return self._active_offset() if batch is None else batch.row_offsets(self, x)

    # torch.compile knows no threads: what it records under one thread's route, it would replay for all of them.
    _uncompiled_offset_for = torch.compiler.disable(_offset_for)

    def __repr__(self) -> str:
        return "svf." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def stack_offsets(offsets: list[torch.Tensor]) -> torch.Tensor:
    """Offsets of several adapters as rows, shape (K, k); the shorter ones end in zeros, which change nothing."""
    longest = max(offset.shape[-1] for offset in offsets)
    return torch.stack([pad(offset, (0, longest - offset.shape[-1])) for offset in offsets])


def basis_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What the basis of a weight is kept in: the dtype of the weight, or float32 for formats of fewer bits."""
    return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
