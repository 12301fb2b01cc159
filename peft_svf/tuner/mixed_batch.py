"""MixedBatch: one batch whose rows run under different adapters or mixtures, through the same two matrix products."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from peft_svf.tuner.layer import SVFLayer


BASE_MODEL = "__base__"  # PEFT's name for "no adapter" in `adapter_names`


class MixedBatch:
    """The mixture of adapters that each row of a batch runs under.

    Args:
        adapters (`Sequence[str]`): K adapters of the model.
        weights (`torch.Tensor` of shape `(B, K)` or `(B, G, K)`):
            Mixture weights of each row, for all layers or for each group of layers. A row of zeros is the base model.
        groups (`Sequence[str]`, *optional*):
            G names of modules, or dotted beginnings of such names. A matrix belongs to the longest that fits.
        residual (`bool`, *optional*, defaults to `True`):
            offset' = Σ αₖ offsetₖ. `False`: offset' = Σ αₖ offsetₖ + Σα − 1, which is z' = Σ αₖ zₖ. An adapter
            that does not adapt a matrix counts as z = 1 there; a matrix that none of the K adapts stays as it is.
        every_row (`bool`, *optional*, defaults to `False`): The weights have one row, for all rows of any batch.

    Raises:
        ValueError: A weight is not finite.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        weights: torch.Tensor,
        groups: Sequence[str] = (),
        residual: bool = True,
        every_row: bool = False,
    ) -> None:
        if not torch.isfinite(weights).all():
            raise ValueError(f"mixture weights must be finite numbers, got {weights.tolist()} for {list(adapters)}")
        self.adapters, self.groups, self.residual = tuple(adapters), tuple(groups), residual
        self.every_row = every_row
        self.rows = len(weights)
        self._expansion = 1  # how many rows generate has made of one: beams or returned sequences
        self._tokens = 1  # of a row, as the last layer with a batch axis saw it
        # A table of the distinct mixtures is what layers compute: shapes (U, …, K) and (B,)
        self.weights, self._rows_of = _distinct(weights)
        self._in_order = len(self.weights) == self.rows
        self._used = [bool(self.weights[..., k].any()) for k in range(len(self.adapters))]
        self._group_indices = {group: index for index, group in enumerate(self.groups)}
        self._tables: dict[SVFLayer, torch.Tensor | None] = {}
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}

    @classmethod
    def of_names(cls, adapter_names: Sequence[str]) -> MixedBatch:
        """One adapter for each row, `"__base__"` for the base model."""
        adapters = sorted(set(adapter_names) - {BASE_MODEL})
        weights = torch.zeros(len(adapter_names), len(adapters))  # (B, K)
        for row, name in enumerate(adapter_names):
            if name != BASE_MODEL:
                weights[row, adapters.index(name)] = 1.0
        return cls(adapters, weights)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows run under the same mixture."""
        return len(self.weights) < 2

    def equal_rows(self) -> list[list[int]]:
        """The rows, those of the same mixture together."""
        groups: list[list[int]] = [[] for _ in self.weights]
        for row, mixture in enumerate(self._rows_of.tolist()):
            groups[mixture].append(row)
        return groups

    def changes(self, layer: SVFLayer) -> bool:
        """Whether a row may run under other weights than those of the base model in `layer`."""
        used = [name for name, is_used in zip(self.adapters, self._used, strict=True) if is_used or not self.residual]
        return not layer.svf_offset.keys().isdisjoint(used)

    def row_offsets(self, layer: SVFLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The offsets for the input x of `layer`.

        Returns:
            `torch.Tensor`: Shape (k,) if all rows are alike, (B, 1, …, k) with as many axes as x if not; `None` if the
            layer is that of the base model for all rows.

        Raises:
            ValueError: The rows of x are not those of the call (several times over), or an adapter is merged.
        """
        repeats = self._repeats(x) if layer.svf_sees_rows and not self.every_row else 1
        table = self.offsets(layer)
        if table is None or len(table) == 1:
            return None if table is None else table[0]
        if self._in_order and repeats == 1:
            offsets = table  # (B, k)
        else:
            offsets = table.index_select(0, self._index(repeats, table.device))
        return offsets.view(offsets.shape[0], *(1,) * (x.dim() - 2), offsets.shape[-1])

    def offsets(self, layer: SVFLayer) -> torch.Tensor | None:
        """The offsets of the distinct mixtures in `layer`, shape (U, …, k); `None` if all are the base model."""
        if layer.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if torch.is_grad_enabled():
            return self._mix(layer)  # a kept one would belong to the graph of another forward pass, or to none
        if layer not in self._tables:  # once for each call, not for each token
            self._tables[layer] = self._mix(layer)
        return self._tables[layer]

    def forget_offsets(self) -> None:
        """At the start of a call: the adapters may have changed since the last one."""
        self._tables.clear()

    def names(self, x: torch.Tensor, copies: Collection[str]) -> list[str]:
        """The adapter of each row of x, for a module of which only the adapters `copies` have one of their own.

        Raises:
            ValueError: A row is a mixture with one of `copies`, or the rows of x are not those of the call.
        """
        one_hot = self.check_one_hot(copies)
        repeats = len(x) if self.every_row else self._repeats(x)
        return [one_hot[index] for index in self._rows_of.tolist() for _ in range(repeats)]

    def check_one_hot(self, copies: Collection[str]) -> list[str]:
        """The adapter among `copies` of each distinct mixture; a `ValueError` if it is not one alone."""
        mixtures = self.weights if self.groups else self.weights[:, None]  # (U, G, K)
        return [self._name(mixture, copies) for mixture in mixtures]

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Within a call of generate, which makes several rows of one once [`~MixedBatch.expand`] says so."""
        self.forget_offsets()
        before, self._expansion = self._expansion, 1
        try:
            yield
        finally:
            self._expansion = before

    def expand(self, rows: int, expansion: int) -> None:
        """From now on, generate runs `expansion` times its `rows` rows; raises if these are not those of the call."""
        if not self.every_row and rows != self.rows:
            self._refuse(rows)
        self._expansion = expansion

    def _name(self, mixture: torch.Tensor, copies: Collection[str]) -> str:
        """The only adapter of a mixture, given as (groups, K) weights."""
        if not any(mixture[:, k].any() for k, name in enumerate(self.adapters) if name in copies):
            return BASE_MODEL
        column = int(mixture[0].argmax())
        if not torch.equal(mixture, torch.eye(len(self.adapters), dtype=mixture.dtype)[[column] * len(mixture)]):
            raise ValueError(
                f"Adapters with whole modules or token embeddings ({', '.join(sorted(copies))}: `modules_to_save`, "
                "`trainable_token_indices`) cannot be mixed; give each row one adapter"
            )
        return self.adapters[column] if self.adapters[column] in copies else BASE_MODEL

    def _mix(self, layer: SVFLayer) -> torch.Tensor | None:
        adapted = [name in layer.svf_offset for name in self.adapters]
        if not any(adapted):
            return None
        weights = self.weights[:, self._group(layer.svf_name)] if self.groups else self.weights  # (U, K)
        terms = [
            (weights[:, k], layer.offset(name)) for k, name in enumerate(self.adapters) if self._used[k] and adapted[k]
        ]
        surplus = torch.zeros(len(weights)) if self.residual else weights.sum(-1) - 1  # (U,)
        moves_all = bool((surplus.abs() > 1e-6).any())
        if not moves_all:
            if not terms:
                return None
            if len(terms) == 1 and torch.equal(terms[0][0], torch.ones(len(weights))):
                return terms[0][1].expand(1, *terms[0][1].shape)  # one adapter as it is
        return self._weighted_sum(layer, terms, surplus if moves_all else None)

    def _weighted_sum(
        self, layer: SVFLayer, terms: list[tuple[torch.Tensor, torch.Tensor]], surplus: torch.Tensor | None
    ) -> torch.Tensor:
        """Σ αₖ offsetₖ + surplus, shape (U, …, k), of terms (αₖ, shape (U,); offsetₖ, shape (…, k))."""
        if surplus is not None:
            self._check_full_rank(layer)
        # Only the surplus can be without terms; then the layer has its whole basis
        like = terms[0][1] if terms else layer.svf_singular_values
        length = layer.components if surplus is not None else max(offset.shape[-1] for _, offset in terms)
        mixture = like.new_zeros(len(self.weights), *layer.stack, length)

        def by_row(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.to(mixture).reshape(-1, *(1,) * (mixture.dim() - 1))

        for weight, offset in terms:  # no matmul, which autocast would round
            rows = weight.nonzero()[:, 0]  # only these: 0 · NaN would carry a broken adapter into the rows of others
            term = by_row(weight[rows]) * offset
            mixture[..., : offset.shape[-1]].index_add_(0, rows.to(mixture.device), term.to(mixture))
        return mixture if surplus is None else mixture + by_row(surplus)

    def _check_full_rank(self, layer: SVFLayer) -> None:
        layer.require_basis()
        if layer.svf_basis.shape[-1] < layer.components:
            raise ValueError(
                f"mixture weights that do not sum to 1 scale all singular values, but of '{layer.svf_name}' only the "
                f"leading {layer.svf_basis.shape[-1]} are adapted: use `residual=True`, or weights that sum to 1"
            )

    def _group(self, name: str) -> int:
        beginning = name
        while beginning not in self._group_indices:
            beginning = beginning.rpartition(".")[0]
            if not beginning:
                raise ValueError(f"no group has weights for the adapted matrix '{name}'; the groups are {self.groups}")
        return self._group_indices[beginning]

    def check_groups(self, layers: Collection[SVFLayer]) -> None:
        """Raise a `ValueError` that names an adapted matrix without weights."""
        if self.groups:
            for layer in layers:
                if not layer.svf_offset.keys().isdisjoint(self.adapters):
                    self._group(layer.svf_name)

    def _index(self, repeats: int, device: torch.device) -> torch.Tensor:
        if (repeats, device) not in self._indices:
            self._indices[repeats, device] = self._rows_of.to(device).repeat_interleave(repeats)
        return self._indices[repeats, device]

    def _repeats(self, x: torch.Tensor) -> int:
        """How many rows of x belong to one row of the call."""
        expansion = self._expansion
        repeats = x.shape[0] // self.rows if self.rows else 0
        if x.dim() > 2:
            self._tokens = x.shape[1]
            fits = repeats == expansion
        else:  # some models (OPT) flatten the tokens of all rows into one axis
            fits = repeats in (expansion, expansion * self._tokens)
        if not fits or repeats * self.rows != x.shape[0]:
            self._refuse(x.shape[0])
        return repeats

    def _refuse(self, rows: int) -> None:
        expansion = "" if self._expansion == 1 else f" (times {self._expansion} beams or returned sequences)"
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{self.rows} and {rows} respectively{expansion}. The same holds for the rows of a route."
        )


def _distinct(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows, in the order in which they first appear, and for each row which of them it is."""
    numbers: dict[tuple[float, ...], int] = {}
    rows_of = [numbers.setdefault(tuple(row), len(numbers)) for row in weights.flatten(1).tolist()]
    first = [rows_of.index(number) for number in range(len(numbers))] or slice(0, 1)
    return weights[first], torch.tensor(rows_of, dtype=torch.long)
