"""Modules that look linear but cannot be adapted by wrapping them: found by name before anything is computed."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D


# Their fused kernels read the weight of the output projection instead of calling it.
MAMBA_MODEL_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
# They read the weights of these children in some of their code paths instead of calling them.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class ModuleChecks:
    """Tells which modules of `model` SVF cannot adapt."""

    def __init__(self, model: nn.Module) -> None:
        self.model_type = getattr(getattr(model, "config", None), "model_type", None)
        self.owners: dict[nn.Parameter | None, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(parameter, []).append(name)

    def why_not(self, name: str, layer: nn.Module, parent: nn.Module) -> str | None:
        """The reason why the module called `name`, a child of `parent`, cannot be adapted; `None` if it can."""
        if not is_linear(layer):
            return (
                f"of type {type(layer).__name__}: only linear layers (`torch.nn.Linear`, "
                "`transformers.pytorch_utils.Conv1D`, quantized linear layers) have a singular basis"
            )
        if isinstance(layer, nn.Linear) and _has_own_forward(layer):
            return f"of type {type(layer).__name__}: it has a forward of its own, so its weight has another meaning"
        if isinstance(parent, READERS):
            return f"because {type(parent).__name__} reads its weight without calling it"
        if name.rpartition(".")[2] == "out_proj" and self._is_mamba(parent):
            return "because the fused kernels of Mamba read its weight without calling it"
        others = [owner for owner in self.owners.get(layer._parameters.get("weight"), ()) if owner != name]
        if others and not all(owner.startswith(f"{name}.") for owner in others):
            return f"because its weight is tied to '{others[0]}', which would change with it or be left behind"
        return None

    def _is_mamba(self, parent: nn.Module) -> bool:
        return self.model_type in MAMBA_MODEL_TYPES or "mamba" in type(parent).__name__.lower()


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is y = x Wᵀ + b: plain, transposed (Conv1D) or quantized."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer)
    return backend is not None and backend.layer_type == "linear"


def _has_own_forward(layer: nn.Linear) -> bool:
    return type(layer).forward is not nn.Linear.forward and resolve_quantization_backend(layer) is None
