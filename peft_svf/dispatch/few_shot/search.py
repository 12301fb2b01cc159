"""MixtureSearch: the loop of few-shot adaptation, which looks for the mixture that answers a few examples best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor
from tqdm import tqdm

from peft_svf.answering import Processes
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness, Optimizer, StartDistribution, all_equal
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.dispatch.few_shot.search_state import Generation, SearchFolder, SearchStateError
from peft_svf.dispatch.route import Route


logger = logging.getLogger(__name__)

Evaluate: TypeAlias = Callable[[Tensor], list[Fitness]]
"""Gives the fitness of each row of candidates, `(N, D)`."""

T = TypeVar("T")


class StopReason(str, Enum):
    """Why a search has stopped, in words."""

    ITERATIONS = "all generations have run"
    COLLAPSED = "the distribution has collapsed: new candidates would hardly differ from the best"
    SATURATED = "every example is answered right, and the best candidate grows no surer"
    INDISTINGUISHABLE = "all candidates were equally good for several generations: the examples cannot tell them apart"


@dataclass(frozen=True)
class SearchResult:
    """
    What a search has found.

    Args:
        space ([`MixtureSpace`]): What it has searched.
        best (`torch.Tensor` of shape `(D,)`, float64): The best candidate of the last generation.
        fitness ([`Fitness`]):
            Its fitness there, on the examples that it was chosen by: too good as an estimate for others.
        history (`tuple[Generation, ...]`): What each generation came to.
        stopped ([`StopReason`]): Why the search has stopped.
    """

    space: MixtureSpace
    best: Tensor
    fitness: Fitness
    history: tuple[Generation, ...]
    stopped: StopReason

    def route(self, rows: int = 1) -> Route:
        """The route that gives every one of `rows` rows the mixture that was found."""
        return self.space.to_route(self.best[None], rows)


class MixtureSearch:
    """
    Search for the mixture of experts that answers a few examples best (Transformer², arXiv 2501.06252, section 3.2).

    With several processes `evaluate` is called in all of them, with the same candidates, and what it returns in the
    main one counts, so that all take the same decisions. Only the main process writes, reads and shows progress.

    Args:
        space ([`MixtureSpace`]): The mixtures to choose from.
        settings ([`SearchSettings`], *optional*): By default those of the paper.
        make_optimizer (`Callable[[StartDistribution], Optimizer]`, *optional*):
            Makes another optimizer than the settings say, e.g. one of your own.
        processes ([`Processes`], *optional*): Those that search together; by default those launched together.

    Raises:
        ValueError: Settings that the optimizer cannot work with, or single experts that do not fit into a generation.
        ImportError: The optimizer needs a library that is not installed.
    """

    def __init__(
        self,
        space: MixtureSpace,
        settings: SearchSettings | None = None,
        make_optimizer: Callable[[StartDistribution], Optimizer] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.space = space
        self.settings = settings or SearchSettings()
        self.make_optimizer = make_optimizer or self.settings.make_optimizer
        self.make_optimizer(space.start)  # refuses what it cannot work with before any example is answered
        self._given = space.single_experts if self.settings.include_experts else None
        if self._given is not None and len(self._given) >= self.settings.population:
            raise ValueError(
                f"SearchSettings: a population of {self.settings.population} has no room for {len(self._given)} "
                "single experts besides the start: take a larger one, or include_experts=False."
            )
        self.processes = processes or Processes.launched()

    def run(
        self,
        evaluate: Evaluate,
        folder: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> SearchResult:
        """
        Search, from the start or from where the search in `folder` was interrupted.

        A resumed search gives bit for bit what an uninterrupted one gives, if `evaluate` does. One that is finished
        is not run again; with more `iterations` it goes on.

        Args:
            evaluate (`Callable[[Tensor], list[Fitness]]`):
                Fitness of each of N candidates, a float64 CPU tensor `(N, D)`, which `space.to_route` makes a route.
            folder (`str` or `Path`, *optional*):
                Where the search is kept after every generation. Without, an interrupted one is lost.
            identity (`Mapping[str, Any]`, *optional*):
                What the fitness depends on, of JSON types: examples, bank, options of generation. A search in `folder`
                that had another identity or other settings is refused.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a bar with the best score so far.

        Raises:
            SearchStateError: The search in `folder` is another one, or damaged.
            ValueError: `evaluate` does not return one fitness for each candidate, or `identity` is no JSON.
        """
        optimizer = self.make_optimizer(self.space.start)
        state_of = SearchFolder(Path(folder), self._identity(optimizer, identity or {})) if folder else None
        history = self._resume(optimizer, state_of)
        main = self.processes.is_main
        with tqdm(
            total=self.settings.iterations,
            initial=len(history),
            desc="Few-shot search",
            disable=not (progress and main),
            leave=False,
        ) as bar:
            while (stopped := self._stop_reason(history, optimizer)) is None:
                candidates = optimizer.ask()
                if self._given is not None and not history:
                    candidates[1 : len(self._given) + 1] = self._given
                candidates = self._agreed(candidates)
                fitness = self._agreed(_checked(evaluate(candidates), len(candidates)))
                optimizer.tell(candidates, fitness)
                history.append(Generation.of(candidates, fitness))
                if state_of and main:
                    state_of.save(history, optimizer.state())
                bar.set_postfix(_scores(history[-1].best_fitness), refresh=False)
                bar.update()
        logger.info("Few-shot search stopped after %d generations: %s.", len(history), stopped.value)
        return SearchResult(self.space, history[-1].best, history[-1].best_fitness, tuple(history), stopped)

    def _identity(self, optimizer: Optimizer, identity: Mapping[str, Any]) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["iterations"]  # an option of when to stop, not of what is searched
        return {
            "optimizer": type(optimizer).__qualname__,
            "settings": settings,
            "space": asdict(self.space),
            "evaluation": dict(identity),
        }

    def _resume(self, optimizer: Optimizer, folder: SearchFolder | None) -> list[Generation]:
        """The history in `folder`, with the optimizer in the state that belongs to it."""
        found, refusal = None, None
        if folder and self.processes.is_main:
            try:
                found = folder.load()
            except SearchStateError as error:
                refusal = error
        found, refusal = self._agreed((found, refusal))  # else the other processes would wait for ever
        if refusal:
            raise refusal
        if not found:
            return []
        history, state = found
        optimizer.load_state(state)
        logger.info("Few-shot search goes on after generation %d.", len(history))
        return history

    def _agreed(self, value: T) -> T:
        """The value that the main process has."""
        return self.processes.gather([value])[0]

    def _stop_reason(self, history: list[Generation], optimizer: Optimizer) -> StopReason | None:
        """Why to stop; the same for a resumed search, as it follows from the history and the optimizer alone."""
        if not history:
            return None
        if self._saturated(history):
            return StopReason.SATURATED
        patience = self.settings.patience
        if 0 < patience <= len(history) and all(all_equal(one.fitness) for one in history[-patience:]):
            return StopReason.INDISTINGUISHABLE
        if optimizer.converged:
            return StopReason.COLLAPSED
        return StopReason.ITERATIONS if len(history) >= self.settings.iterations else None

    def _saturated(self, history: list[Generation]) -> bool:
        patience, tolerance = self.settings.patience, self.settings.likelihood_tolerance
        if not patience:
            return False
        worst, best = min(history[-1].fitness), history[-1].best_fitness
        if worst.success == 1 and not _surer(best, worst, tolerance):
            return True
        recent = [generation.best_fitness for generation in history[-patience - 1 :]]
        perfect = all(one.success == 1 for one in recent)
        return len(recent) > patience and perfect and not _surer(best, recent[0], tolerance)


def _surer(one: Fitness, other: Fitness, tolerance: float) -> bool:
    """Written so that two of -inf, which nobody has measured, are equally sure."""
    return one.log_likelihood > other.log_likelihood + tolerance


def _checked(fitness: list[Fitness], expected: int) -> list[Fitness]:
    with suppress(TypeError):
        if len(fitness) == expected and all(isinstance(one, Fitness) for one in fitness):
            return list(fitness)
    raise ValueError(f"evaluate() must return one Fitness for each of {expected} candidates, got {fitness!r:.200}.")


def _scores(fitness: Fitness) -> dict[str, str]:
    return {"right": f"{fitness.success:.0%}", "log-likelihood": f"{fitness.log_likelihood:.3f}"}
