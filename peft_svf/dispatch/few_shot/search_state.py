"""What a search knows between two generations, and the folder that it is kept in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_svf.dispatch.few_shot.optimizer import Fitness, OptimizerState
from peft_svf.experts.files import replace_file


FORMAT = 1
FILE_NAME = "search.json"


class SearchStateError(ValueError):
    """A folder whose search cannot be resumed: it is another search, or it is damaged."""


@dataclass(frozen=True)
class Generation:
    """
    What a generation of a search came to.

    Args:
        mean (`torch.Tensor` of shape `(D,)`, float64): Mean of its candidates.
        std (`torch.Tensor` of shape `(D,)`, float64): Their standard deviation, biased.
        best (`torch.Tensor` of shape `(D,)`, float64): The best candidate.
        fitness (`tuple[Fitness, ...]`): Fitness of all candidates; the first is the best of the generation before.
    """

    mean: Tensor
    std: Tensor
    best: Tensor
    fitness: tuple[Fitness, ...]

    @property
    def best_fitness(self) -> Fitness:
        """Fitness of `best`."""
        return max(self.fitness)

    @classmethod
    def of(cls, candidates: Tensor, fitness: Sequence[Fitness]) -> Generation:
        """The generation of these candidates, `(N, D)`; of equally good ones the first is the best."""
        best = max(range(len(fitness)), key=fitness.__getitem__)
        return cls(candidates.mean(0), candidates.std(0, correction=0), candidates[best].clone(), tuple(fitness))


@dataclass(frozen=True)
class SearchFolder:
    """
    The folder of one search: `search.json`, and the tensors that it names.

    The tensors are written beside the old ones, then `search.json` is replaced: whenever a process is killed, the
    folder holds the last complete generation. It is for one search at a time.

    Args:
        path (`Path`): The folder.
        identity (`Mapping[str, Any]`): What must be the same for a search to go on, of JSON types.

    Raises:
        ValueError: The identity is not of JSON types.
    """

    path: Path
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            json.dumps(self.identity)
        except TypeError as error:
            raise ValueError(f"The identity of a search must be of JSON types: {error}.") from error

    def load(self) -> tuple[list[Generation], OptimizerState] | None:
        """
        History and optimizer state of the search in the folder; `None` in a new folder, which is made.

        Raises:
            SearchStateError: The search had another identity, a file is damaged, or the folder cannot be made.
        """
        record = self.path / FILE_NAME
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                return None
            found = json.loads(record.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise SearchStateError(f"{record} has format {found['format']}, this version reads {FORMAT}.")
            self._check_identity(found["identity"])
            tensors = load_file(self.path / found["tensors"])
            history = _unpack_history(tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, SearchStateError):
                raise
            raise SearchStateError(
                f"The search in '{self.path}' cannot be read ({type(error).__name__}: {error}): take another folder, "
                "or delete this one to start again."
            ) from error
        state = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        return history, {**found["numbers"], **state}

    def save(self, history: Sequence[Generation], state: OptimizerState) -> None:
        """Replace what the folder holds."""
        name = f"generation-{len(history):05}.safetensors"
        tensors = {f"optimizer.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= _pack_history(history)
        # a copy of each: safetensors refuses tensors that share memory
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, self.path / name)
        record = {
            "format": FORMAT,
            "identity": self.identity,
            "generations": len(history),
            "tensors": name,
            "numbers": {key: value for key, value in state.items() if not isinstance(value, Tensor)},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        replace_file(self.path / FILE_NAME, lambda partial: partial.write_text(text, "utf-8"))
        for old in self.path.glob("generation-*.safetensors"):
            if old.name != name:
                with contextlib.suppress(OSError):  # litter does no harm
                    old.unlink()

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.identity))  # tuples are lists in JSON
        old, new = _flat(found), _flat(now)
        differences = [
            f"{key} was {_short(old.get(key))} and is {_short(new.get(key))} now"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        if differences:
            raise SearchStateError(
                f"The folder '{self.path}' holds another search: {'; '.join(differences)}. Take another folder, or "
                "delete this one."
            )


def _pack_history(history: Sequence[Generation]) -> dict[str, Tensor]:
    values = [(one.success, one.log_likelihood) for generation in history for one in generation.fitness]
    return {
        **{
            f"history.{name}": torch.stack([getattr(generation, name) for generation in history])
            for name in ("mean", "std", "best")
        },
        "history.fitness": torch.tensor(values, dtype=torch.float64),  # (all candidates, 2)
        "history.sizes": torch.tensor([len(generation.fitness) for generation in history]),
    }


def _unpack_history(tensors: Mapping[str, Tensor]) -> list[Generation]:
    fitness = tensors["history.fitness"].split(tensors["history.sizes"].tolist())
    columns = zip(*(tensors[f"history.{name}"] for name in ("mean", "std", "best")), fitness, strict=True)
    return [
        Generation(mean, std, best, tuple(Fitness(*pair) for pair in pairs.tolist()))
        for mean, std, best, pairs in columns
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
