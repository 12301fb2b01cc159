"""Mixed batches: one batch whose rows run under different adapters or mixtures, through the same two matrix products.

A mixed batch belongs to the thread that entered it: other threads that run the same model do not see it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import pad
from transformers import GenerationConfig

from peft_svf.tuner.adapted import adapted_name
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.parameter import ParamWrapper, no_mixed_batches


BASE_MODEL = "__base__"  # PEFT's name for "no adapter" in `adapter_names`

_HOOKS_LOCK = threading.RLock()  # for modules that PEFT trains in full, whose hooks all threads would see


class MixedBatch:
    """The mixture of adapters that each row of a batch runs under.

    Args:
        adapters (`Sequence[str]`): K adapters of the model.
        weights (`torch.Tensor` of shape `(B, K)` or `(B, G, K)`):
            Mixture weights of each row, for all layers or for each group of layers. A row of zeros is the base model.
        groups (`Sequence[str]`, *optional*):
            G names of modules, or dotted beginnings of such names. A matrix belongs to the longest that fits.
        residual (`bool`, *optional*, defaults to `True`):
            offset' = Σ αₖ offsetₖ. `False`: offset' = Σ αₖ offsetₖ + Σα − 1, which is z' = Σ αₖ zₖ.
        every_row (`bool`, *optional*, defaults to `False`): The weights have one row, for all rows of any batch.
        expansion (`int`, *optional*, defaults to 1): How many rows generate makes of one: beams or returned sequences.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        weights: torch.Tensor,
        groups: Sequence[str] = (),
        residual: bool = True,
        every_row: bool = False,
        expansion: int = 1,
    ) -> None:
        self.adapters, self.groups, self.residual = tuple(adapters), tuple(groups), residual
        self.every_row = every_row
        self.rows = len(weights)
        self.expansion = expansion
        # A table of the distinct mixtures is what layers compute: shapes (U, …, K) and (B,)
        self.weights, self._rows_of = weights[:1], torch.zeros(len(weights), dtype=torch.long)
        if weights.numel():
            self.weights, self._rows_of = torch.unique(weights, dim=0, return_inverse=True)
        self._used = [bool(self.weights[..., k].any()) for k in range(len(self.adapters))]
        self._tokens = 1  # of a row, as the last layer with a batch axis saw it
        self._tables: dict[SVFLayer, torch.Tensor | None] = {}
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}

    @classmethod
    def of_names(cls, adapter_names: Sequence[str], expansion: int = 1) -> MixedBatch:
        """One adapter for each row, `"__base__"` for the base model."""
        adapters = sorted(set(adapter_names) - {BASE_MODEL})
        weights = torch.zeros(len(adapter_names), len(adapters))  # (B, K)
        for row, name in enumerate(adapter_names):
            if name != BASE_MODEL:
                weights[row, adapters.index(name)] = 1.0
        return cls(adapters, weights, expansion=expansion)

    def row_offsets(self, layer: SVFLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The offsets for the input x of `layer`.

        Returns:
            `torch.Tensor`: Shape (k,) if all rows are alike, (B, 1, …, k) with as many axes as x if not; `None` if the
            layer is that of the base model for all rows.

        Raises:
            ValueError: The rows of x are not those of the call (several times over), or an adapter is merged.
        """
        repeats = 1 if self.every_row else self._repeats(x)
        table = self.offsets(layer)
        if table is None or len(table) == 1:
            return None if table is None else table[0]
        offsets = table[self._index(repeats, table.device)]  # (B, k)
        return offsets.view(offsets.shape[0], *(1,) * (x.dim() - 2), offsets.shape[-1])

    def offsets(self, layer: SVFLayer) -> torch.Tensor | None:
        """The offsets of the distinct mixtures in `layer`, shape (U, k); `None` if all are the base model."""
        if layer.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if layer not in self._tables:  # once for each call, not for each token
            self._tables[layer] = self._mix(layer)
        return self._tables[layer]

    def names(self, rows: int) -> list[str]:
        """The adapter of each of `rows` rows; the rows of one prompt lie next to each other.

        Raises:
            ValueError: A row is a mixture.
        """
        mixtures = self.weights if self.groups else self.weights[:, None]  # (U, G, K)
        one_hot = [self._name(mixture) for mixture in mixtures]
        repeats = rows if self.every_row else self._divide(rows)
        return [one_hot[index] for index in self._rows_of.tolist() for _ in range(repeats)]

    @contextmanager
    def expanded(self, expansion: int) -> Iterator[None]:
        """Within generate, which makes `expansion` rows of one."""
        before, self.expansion = self.expansion, expansion
        try:
            yield
        finally:
            self.expansion = before

    def _name(self, mixture: torch.Tensor) -> str:
        """The only adapter of a mixture, given as (groups, K) weights."""
        if not mixture.any():
            return BASE_MODEL
        column = int(mixture[0].argmax())
        if not torch.equal(mixture, torch.eye(len(self.adapters), dtype=mixture.dtype)[[column] * len(mixture)]):
            raise ValueError(
                "Adapters with whole modules or token embeddings (`modules_to_save`, `trainable_token_indices`) "
                "cannot be mixed; give each row one adapter"
            )
        return self.adapters[column]

    def _mix(self, layer: SVFLayer) -> torch.Tensor | None:
        weights = self.weights[:, self._group(layer.svf_name)] if self.groups else self.weights  # (U, K)
        terms = [
            weights[:, k].to(offset.device).reshape(-1, *(1,) * offset.dim()) * offset  # (U, …, k)
            for k, name in enumerate(self.adapters)
            if self._used[k] and name in layer.svf_offset
            for offset in [layer.offset(name)]
        ]
        surplus = torch.zeros(len(weights)) if self.residual else weights.sum(-1) - 1  # (U,)
        moves_all = bool((surplus.abs() > 1e-6).any())
        if not terms and not moves_all:
            return None
        longest = layer.components if moves_all else max(term.shape[-1] for term in terms)
        if moves_all and not terms:
            terms = [next(layer.svf_offset.parameters()).new_zeros(len(weights), *layer.stack, longest)]
        mixture: torch.Tensor = sum(pad(term, (0, longest - term.shape[-1])) for term in terms)  # type: ignore[assignment]
        if not moves_all:
            return mixture
        self._check_full_rank(layer)
        return mixture + surplus.to(mixture).reshape(-1, *(1,) * (mixture.dim() - 1))

    def _check_full_rank(self, layer: SVFLayer) -> None:
        layer.require_basis()
        if layer.svf_basis.shape[-1] < layer.components:
            raise ValueError(
                f"mixture weights that do not sum to 1 scale all singular values, but of '{layer.svf_name}' only the "
                f"leading {layer.svf_basis.shape[-1]} are adapted: use `residual=True`, or weights that sum to 1"
            )

    def _group(self, name: str) -> int:
        fits = [group for group in self.groups if name == group or name.startswith(f"{group}.")]
        if not fits:
            raise ValueError(f"no group has weights for the adapted matrix '{name}'; the groups are {self.groups}")
        return self.groups.index(max(fits, key=len))

    def _index(self, repeats: int, device: torch.device) -> torch.Tensor:
        if (repeats, device) not in self._indices:
            self._indices[repeats, device] = self._rows_of.to(device).repeat_interleave(repeats)
        return self._indices[repeats, device]

    def _repeats(self, x: torch.Tensor) -> int:
        """How many rows of x belong to one row of the call."""
        repeats = self._divide(x.shape[0])
        expansions = {1, self.expansion}  # 1: the encoder of an encoder-decoder model
        if x.dim() > 2:
            self._tokens = x.shape[1]
            allowed = expansions
        else:  # some models (OPT) flatten the tokens of all rows into one axis
            allowed = expansions | {expansion * self._tokens for expansion in expansions}
        if repeats not in allowed:
            self._refuse(x.shape[0])
        return repeats

    def _divide(self, rows: int) -> int:
        if not self.rows or rows % self.rows:
            self._refuse(rows)
        return rows // self.rows

    def _refuse(self, rows: int) -> None:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{self.rows} and {rows} respectively. The same holds for the rows of a route."
        )


@contextmanager
def entered(batches: dict[int, MixedBatch], batch: MixedBatch) -> Iterator[None]:
    """Let the layers that share `batches` run under `batch` in this thread."""
    thread = threading.get_ident()
    before = batches.get(thread)
    batches[thread] = batch
    try:
        yield
    finally:
        if before is None:
            del batches[thread]
        else:
            batches[thread] = before


@contextmanager
def choosing_whole_modules(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    """Let the modules that PEFT trains in full choose by row; only one thread at a time, if there are such modules."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if not wrappers:
        yield
        return

    def pass_names(
        module: AuxiliaryTrainingWrapper, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = args[0] if args else next(iter(kwargs.values()))
        # For PEFT a name without a copy of this module is an error; it means the module of the base model.
        names = [name if name in module._adapters else BASE_MODEL for name in batch.names(len(inputs))]
        return args, {**kwargs, "adapter_names": names}

    with _HOOKS_LOCK:
        handles = [wrapper.register_forward_pre_hook(pass_names, with_kwargs=True) for wrapper in wrappers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def refuse_modules_without_rows(model: nn.Module) -> None:
    """Raise a `ValueError` that names an adapted module which cannot tell the rows of a batch apart."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            raise ValueError(no_mixed_batches(adapted_name(name, module)))
        if isinstance(module, SVFLayer) and "experts" in name.split("."):
            raise ValueError(
                f"Cannot pass `adapter_names` when an adapter adapts '{name}': it sees tokens routed to it, not "
                "rows; run one adapter at a time, or leave the experts out of the adapters"
            )


def generation_expansion(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows `model.generate(*args, **kwargs)` makes of one: the larger of beams and returned sequences."""
    given = kwargs.get("generation_config") or next((arg for arg in args if isinstance(arg, GenerationConfig)), None)
    places = (given, getattr(model, "generation_config", None))  # what the first leaves open, the second fills in

    def setting(name: str) -> int:
        return next(filter(None, (kwargs.get(name), *(getattr(place, name, None) for place in places))), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
