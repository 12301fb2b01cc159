"""Dispatchers that ask no model: a fixed route, and a function of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from peft_svf.dispatch.route import Prompt, Route, check_prompts
from peft_svf.experts.bank import ExpertBank


RoutingFunction: TypeAlias = Callable[[list[Prompt]], Any]


class FixedDispatcher:
    """
    Sends every prompt the same way.

    Args:
        bank (`ExpertBank`): the experts.
        route (`str`, `Mapping[str, float]` or [`Route`]):
            An expert's name, or `"others"` for the base model; mixture weights by expert, the rest of which stays with
            the base model; or a route of one row, for weights per layer or without the base model.

    Raises:
        ValueError: an unknown expert, a weight that is not a finite number, a route of several rows.
    """

    def __init__(self, bank: ExpertBank, route: str | Mapping[str, float] | Route) -> None:
        self.bank = bank
        if isinstance(route, Route):
            if len(route) != 1:
                raise ValueError(
                    f"A fixed route has one row, for every prompt, but this one has {len(route)}; to decide prompt by "
                    "prompt, pass a function of the prompts."
                )
            self._row = route
        else:
            self._row = Route.mixture(checked_mixture(bank, route))
        _check_names(bank, self._row.experts)

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """The fixed route for each prompt; raises a `ValueError` if the bank has lost one of its experts."""
        _check_names(self.bank, self._row.experts)
        return self._row.repeat_rows(len(check_prompts(prompts)))


class CallableDispatcher:
    """
    Asks a function.

    Args:
        bank (`ExpertBank`): the experts.
        function (`Callable`):
            Takes a list of B prompts (texts or chats) and returns one of: a [`Route`] of B rows; a list of B experts'
            names (`"others"` for the base model) or mixtures (`{"math": 0.7}`, the rest stays with the base model);
            weights of shape `(B, K)`, as tensor, array or lists, with the bank's experts as columns, in its order.

    Raises:
        TypeError: not a function.
    """

    def __init__(self, bank: ExpertBank, function: RoutingFunction) -> None:
        if not callable(function):
            raise TypeError(f"A routing function must be callable; {type(function).__name__} is not.")
        self.bank, self.function = bank, function

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """
        What the function says.

        Raises:
            ValueError: the function returned something else than it should: other rows than prompts, unknown experts.
        """
        prompts = list(check_prompts(prompts))
        if not prompts:
            return Route.one_hot([], list(self.bank.experts))
        returned = self.function(prompts)
        name = getattr(self.function, "__name__", type(self.function).__name__)
        try:
            route = self._as_route(returned)
            _check_names(self.bank, route.experts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The routing function {name} returned what is no route: {error}") from error
        if len(route) != len(prompts):
            raise ValueError(f"The routing function {name} was given {len(prompts)} prompts and routed {len(route)}.")
        return route

    def _as_route(self, returned: Any) -> Route:
        if isinstance(returned, Route):
            return returned
        if isinstance(returned, str | Mapping):
            raise ValueError(f"{returned!r} is one choice; return a list with one for each prompt.")
        if returned is None:
            raise ValueError("None; return a list with an expert's name or a mixture for each prompt.")
        if isinstance(returned, Sequence) and any(isinstance(row, str | Mapping) for row in returned):
            return Route.concatenate([self._row(row) for row in returned])
        weights = torch.as_tensor(returned, dtype=torch.float32)
        experts = tuple(self.bank.experts)
        if weights.dim() != 2 or weights.shape[1] != len(experts):
            raise ValueError(f"weights of shape {tuple(weights.shape)}, expected (prompts, {len(experts)} experts).")
        return Route(weights, experts)

    def _row(self, choice: Any) -> Route:
        if not isinstance(choice, str | Mapping):
            raise ValueError(f"{choice!r} is neither an expert's name nor a mixture.")
        return Route.mixture(checked_mixture(self.bank, choice))


def checked_mixture(bank: ExpertBank, choice: str | Mapping[str, Any]) -> dict[str, float]:
    """
    The mixture that an expert's name, or weights by expert, stand for.

    Raises:
        ValueError: an unknown expert, or a weight that is not a finite number.
    """
    mixture = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    _check_names(bank, mixture)
    for name, weight in mixture.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"The weight of '{name}' in the mixture must be a finite number, not {weight!r}.")
    return mixture


def _check_names(bank: ExpertBank, names: Iterable[str]) -> None:
    for name in names:
        bank.check_expert(name)
