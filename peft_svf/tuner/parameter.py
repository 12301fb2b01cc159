"""SVF of a parameter that is no linear layer: the fused experts of a mixture-of-experts model (`target_parameters`).

transformers keeps all experts of a layer in one parameter of shape (experts, rows, columns). Every matrix of such a
stack has singular values of its own, so its offsets have shape (experts, k). With Q as in [`SVFLayer`], matrix by
matrix, the module that owns the parameter runs with

    W' = W + W (Q diag(offset) Qᵀ)  if columns ≤ rows,      W' = W + (Q diag(offset) Qᵀ) W  if rows < columns
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_svf.spectrum import SingularBasis, sketch_of_stack, weight_sketch
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.module_checks import ModuleChecks, is_linear


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Found: TypeAlias = tuple[SingularBasis, list[float]]  # of one matrix: its singular basis and its sketch

_PARAMETERS_LOCK = threading.RLock()  # a parameter that is replaced for one thread's forward is so for all threads


class ParamWrapper(nn.Module, SVFLayer):
    """SVF of one parameter of a module: a stack of matrices, shape (experts, rows, columns), or one, (rows, columns).

    Wraps the module and calls it with W' in place of the parameter; the parameter itself is only touched by merging.
    Two parameters of one module mean two wrappers, one inside the other. The class is called what PEFT calls LoRA's,
    because PEFT looks for this name.

    - Rows and columns are those of the stored matrix. Some models store (out, in), others (in, out); that makes no
      difference to an offset, because a matrix and its transpose have the same singular values.
    - A fused `gate_up_proj` is one matrix, so its singular values are those of gate and up together.
    - Memory: every forward computes W' of the whole stack, as large as the parameter, and for training keeps it until
      the backward pass (as LoRA does).
    - Time: W' takes experts · r² · (k + the longer side) multiplications, however few tokens the forward has. So
      generate with the adapter merged; it then costs what the base model costs.

    Args:
        base_layer (`nn.Module`): The module that owns the parameter, or the wrapper of another of its parameters.
        adapter_name (`str`): The first adapter.
        parameter_name (`str`): The name of the parameter in its module.
        config (`SVFConfig`): The adapter's configuration.
        name (`str`, *optional*): The parameter's name in the model, for `rank_pattern` and messages.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: SVFConfig, name: str = ""
    ) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self.stack = getattr(innermost(base_layer), parameter_name).shape[:-2]
        SVFLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def get_param(self) -> nn.Parameter:
        """The parameter as it is in its module: that of the base model, or the merged one."""
        return getattr(innermost(self), self.parameter_name)

    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of one matrix of the stack."""
        rows, columns = self.get_param().shape[-2:]
        return rows, columns

    def compute_basis(self, weight: torch.Tensor, find: Callable[[torch.Tensor], Found]) -> None:
        """Take over the basis and the sketch that `find` returns for each matrix of `weight`, one after the other.

        Raises:
            ValueError: A matrix has no singular basis; the message has its index.
        """
        if not self.stack:
            self.set_basis(*find(weight))
            return
        columns = max(offset.shape[-1] for offset in self.svf_offset.parameters())
        vectors, singular_values, sketches = [], [], []
        for index, matrix in enumerate(weight):
            try:
                basis, sketch = find(matrix)
            except ValueError as error:
                raise ValueError(f"in expert {index} of {len(weight)}, {error}") from error
            vectors.append(basis.vectors[:, :columns].clone())  # lets go of the columns not in use
            singular_values.append(basis.singular_values)
            sketches.append(sketch)
        stacked = SingularBasis(self.svf_side, torch.stack(vectors), torch.stack(singular_values))
        self.set_basis(stacked, sketch_of_stack(sketches))

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def get_base_weight(self) -> torch.Tensor:
        return self.get_param().data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        self.get_param().data = weight_data

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT's conversion knows only matrices

    def _scaling(self, offset: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Q diag(offset) Qᵀ of every matrix, shape (experts, r, r)."""
        basis = self._columns(offset.shape[-1]).to(dtype)  # (experts, r, k)
        return (basis * offset.unsqueeze(-2)).to(dtype) @ basis.mT

    def _changed_parameter(self, offset: torch.Tensor) -> torch.Tensor:
        """W', in the shape and dtype of the parameter; only `offset`, shape (experts, k), needs a gradient."""
        weight = self.get_param()
        add_product = torch.baddbmm if self.stack else torch.addmm
        with torch.autocast(weight.device.type, enabled=False):  # it would change the dtype of the parameter
            scaling = self._scaling(offset, weight.dtype)
            factors = (weight, scaling) if self.svf_side == "input" else (scaling, weight)
            return add_product(weight, *factors)

    @torch.no_grad()
    def _weight_change(self, adapter_names: list[str]) -> torch.Tensor:
        offset = self.sum_offsets(adapter_names)
        if offset is None:
            raise ValueError(f"'{self.svf_name}' has no adapter named {', '.join(adapter_names)}")
        weight = self.unmerged_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight, scaling = weight.to(dtype), self._scaling(offset, dtype)
        return weight @ scaling if self.svf_side == "input" else scaling @ weight

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this wrapper and those inside it; with `merge`, their adapters are merged into it."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns when its parameter is W'. Afterwards, and after an exception, it is W again."""
        if torch.compiler.is_compiling():  # which knows no locks
            return self._forward(*args, **kwargs)
        with _PARAMETERS_LOCK:
            return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        offset = self._current_offset()
        if offset is None:
            return self.base_layer(*args, **kwargs)
        if self.get_param().is_meta:
            raise RuntimeError(
                f"'{self.svf_name}' is offloaded, so SVF cannot change it for a forward pass; keep this module on a "
                "device, or merge the adapter"
            )
        parameters: dict[str, Any] = innermost(self)._parameters
        unchanged = parameters[self.parameter_name]
        parameters[self.parameter_name] = self._changed_parameter(offset)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parameters[self.parameter_name] = unchanged

    def _current_offset(self) -> torch.Tensor | None:
        """z − 1 of every matrix under the mixed batch of this thread or else the active adapters, (experts, k)."""
        if not self.has_mixed_batches():
            return self._active_offset()
        return self._uncompiled_offset() if torch.compiler.is_compiling() else self._offset_of_thread()

    def _offset_of_thread(self) -> torch.Tensor | None:
        batch = self.mixed_batch()
        if batch is None:
            return self._active_offset()
        table = batch.offsets(self)
        if table is not None and len(table) > 1:
            raise ValueError(no_mixed_batches(self.svf_name))
        return None if table is None else table[0]

    _uncompiled_offset = torch.compiler.disable(_offset_of_thread)  # torch.compile knows no threads

    def __repr__(self) -> str:
        return "svf." + super().__repr__()

    def extra_repr(self) -> str:
        return f"parameter_name='{self.parameter_name}'"


def why_not_parameter(checks: ModuleChecks, name: str, target: nn.Module, parent: nn.Module) -> str | None:
    """The reason why the parameter called `name`, of the module `target` in `parent`, cannot be adapted, or `None`."""
    if isinstance(target, BaseTunerLayer) and not isinstance(target, ParamWrapper):
        return "because an adapter of another method is on it; put SVF on a model of its own"
    module_name, _, parameter_name = name.rpartition(".")
    module = innermost(target)
    parameter = module._parameters.get(parameter_name)
    if parameter is None:
        return "because `torch.nn.utils.parametrize` computes it; remove the parametrization first"
    if parameter.dtype not in DTYPES:
        return f"of dtype {parameter.dtype}: load the base model with these weights in a floating-point dtype"
    if parameter.dim() not in (2, 3):
        return f"of shape {tuple(parameter.shape)}: only matrices and stacks of matrices have singular values"
    if is_linear(module):
        return checks.why_not(module_name, module, parent)
    if len(owners := checks.owners.get(parameter, [])) > 1:
        return f"because it is tied, with the modules {owners}, which would all change with it or be left behind"
    return None


def innermost(module: nn.Module) -> nn.Module:
    """The module of the base model, without the wrappers around it."""
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    return module


def check_nesting(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter whose checkpoint would not be the same on a fresh model.

    PEFT tells the parameters of one module apart by how deep their wrappers are nested, so all adapters of a model
    have to agree on them.

    Raises:
        ValueError: Another adapter on the model adapts other parameters of the same module.
    """
    for name, outer in model.named_modules():
        inner = getattr(outer, "base_layer", None)
        if not isinstance(outer, ParamWrapper) or not isinstance(inner, ParamWrapper):
            continue
        order = list(innermost(outer)._parameters)
        as_on_a_fresh_model = order.index(inner.parameter_name) < order.index(outer.parameter_name)
        if (adapter_name in outer.svf_offset) != (adapter_name in inner.svf_offset) or not as_on_a_fresh_model:
            raise ValueError(
                f"all adapters must target the same set of parameters of '{name}'; the adapters before "
                f"'{adapter_name}' disagree with it on '{outer.parameter_name}' or '{inner.parameter_name}': give it "
                "the same `target_parameters`, or a model of its own"
            )


def no_mixed_batches(name: str) -> str:
    """The message of the error for `adapter_names` on a model in which the parameter called `name` is adapted."""
    return (
        f"svf.ParamWrapper does not support mixed adapter batches yet: '{name}' is one parameter for all rows of a "
        "batch; run one adapter at a time, without `adapter_names`"
    )


def sketch_parameter(module: nn.Module, parameter_name: str) -> list[float] | None:
    """The fingerprint of a parameter of `module`, right even while an adapter is merged; `None` if it has none."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name and module.svf_sketch is not None:
            return module.svf_sketch
        module = module.base_layer
    parameter = innermost(module)._parameters.get(parameter_name)
    if parameter is None or parameter.is_meta or parameter.dtype not in DTYPES or parameter.dim() not in (2, 3):
        return None
    return weight_sketch(parameter) if parameter.dim() == 2 else sketch_of_stack([weight_sketch(m) for m in parameter])
