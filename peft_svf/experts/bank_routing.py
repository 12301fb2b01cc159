"""How a bank computes: under a route, one expert, a mixture, or the base model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_svf.experts.bank_config import BASE_LABEL, ExpertEntry
from peft_svf.experts.route_weights import RouteWeights
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch
from peft_svf.tuner.names import in_layer


class BankRouting:
    """The part of [`~peft_svf.experts.bank.ExpertBank`] that routes."""

    model: Any  # PeftModel or PreTrainedModel
    experts: dict[str, ExpertEntry]
    classifier: str | None

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model, adapters injected; without `base_only` it computes under the active adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def check_expert(self, name: str) -> str:
        """Return `name` if it is an expert or the base label, else raise a `ValueError` that lists the known ones."""
        if not isinstance(name, str) or (name != BASE_LABEL and name not in self.experts):
            known = ", ".join(f"'{expert}'" for expert in [*self.experts, BASE_LABEL])
            raise ValueError(f"Unknown expert {name!r}; this bank knows {known} ('{BASE_LABEL}' is the base model).")
        return name

    @contextmanager
    def routed(self, route: RouteWeights | str | Mapping[str, float]) -> Iterator[PeftModel | PreTrainedModel]:
        """
        Compute under a route: `with bank.routed(route): bank.model.generate(**batch)`.

        The route belongs to the thread that enters it: other threads that use the same bank do not see it, and
        neither the active adapter nor anything else of the model is changed. A thread that is started inside does not
        inherit it, so where `generate` runs in one to feed a streamer, enter the route there. Mixtures are exact.

        Args:
            route (`Route`, `str` or `Mapping[str, float]`):
                A [`~peft_svf.dispatch.Route`] with one row for each row of the batch; or, for any number of rows, an
                expert's name, `"others"` for the base model, or a mixture like `{"math": 0.7, "code": 0.3}`.

        Raises:
            ValueError: an unknown expert, a batch of other rows than the route, a merged expert.
        """
        experts, weights, groups, residual = self._weights(route)
        if not isinstance(self.model, PeftModel):
            if weights.any():
                raise ValueError(f"This bank has no experts, so it cannot be routed to {experts}.")
            yield self.model
            return
        every_row = isinstance(route, str | Mapping)
        with self.model.base_model.routed(MixedBatch(experts, weights, groups, residual, every_row)):
            yield self.model

    def _weights(
        self, route: RouteWeights | str | Mapping[str, float]
    ) -> tuple[tuple[str, ...], torch.Tensor, tuple[str, ...], bool]:
        if isinstance(route, str):
            route = {route: 1.0}
        if not isinstance(route, Mapping):
            if not hasattr(route, "weights"):
                raise ValueError(f"A route is a Route, an expert's name or a mixture by expert, not {route!r}.")
            return route.experts, route.weights, route.groups, route.residual
        mixture = {name: float(weight) for name, weight in route.items() if name != BASE_LABEL}
        for name in mixture:
            if name != self.classifier:
                self.check_expert(name)
        return tuple(mixture), torch.tensor([list(mixture.values())]), (), True

    def row_groups(self, route: RouteWeights) -> list[list[int]]:
        """
        The rows of a route that `routed` takes in one batch.

        All of them, or those of equal weights, if the route changes modules that cannot tell rows apart (vision
        towers, the experts of a mixture-of-experts model).
        """
        batch = MixedBatch(*self._weights(route))
        layers = (module for module in self.base_model.modules() if isinstance(module, SVFLayer))
        if batch.is_uniform or all(layer.svf_sees_rows or not batch.changes(layer) for layer in layers):
            return [list(range(batch.rows))]
        return batch.equal_rows()

    @contextmanager
    def base_only(self) -> Iterator[PreTrainedModel]:
        """Compute with the base model's own weights, in this thread; the active adapter is not touched."""
        with self.routed(BASE_LABEL):
            yield self.base_model

    def matrix_groups(self) -> tuple[str, ...]:
        """The names of all adapted matrices: groups for mixture weights of each matrix."""
        if not isinstance(self.model, PeftModel):
            return ()
        layers = [module for module in self.base_model.modules() if isinstance(module, SVFLayer)]
        return tuple(dict.fromkeys(layer.svf_name for layer in layers))

    def layer_groups(self) -> tuple[str, ...]:
        """The layers of the model, like "model.layers.3", and the names of adapted matrices outside of them."""
        names = self.matrix_groups()
        places = [in_layer(name) for name in names]
        return tuple(
            dict.fromkeys(
                name.removesuffix(f".{place.rest}") if place else name
                for name, place in zip(names, places, strict=True)
            )
        )
