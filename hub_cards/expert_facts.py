"""ExpertCardData: the facts of one expert, read from and written to `expert.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.download import is_hub_id
from peft_svf.hub_cards.results import ExpertResult, result_from_json


@dataclass(frozen=True)
class ExpertCardData:
    """
    The facts of one expert. What is None or empty appears on the card as "not recorded".

    Args:
        name (`str`): Name of the expert, the card's title.
        label (`str`, *optional*): The dispatcher's label for prompts that this expert answers.
        repo_id (`str`, *optional*): Where the expert is published, used in the code to run it.
        base_model (`str`, *optional*): Hub id or local folder; a folder's path stays off the card.
        base_revision (`str`, *optional*): Commit of the base model.
        trained_parameters (`int`, *optional*): Number of offsets.
        task (`str`, *optional*), reward (`str`, *optional*): What it was trained on and what was rewarded.
        kl_coefficient, steps, learning_rate, batch_size (*optional*):
            Policy-gradient settings; the batch size is the number of answers in one step.
        seeds (`tuple[int, ...]`, *optional*): One seed per training run that the results stand for.
        hardware (`str`, *optional*), training_seconds (`float`, *optional*): Where, and how long.
        results (`tuple[ExpertResult, ...]`, *optional*): Measured success beside the base model's.
        license (`str`, *optional*): The Hub's license identifier, e.g. `"apache-2.0"`.
        description (`str`, *optional*): One sentence: which prompts the expert is for.
        method (`str`, *optional*): How it was trained, e.g. `"policy gradient"`.
        baseline, kl_estimator (`str`, *optional*): Of the policy gradient.
        train_prompts (`int`, *optional*): Different prompts in the training data.
        validation (`Mapping`, *optional*):
            What the best checkpoint was chosen by: `metric`, `start`, `best`, `step` and `prompts`.
        precision (`str`, *optional*): Of the base model in training, e.g. `"bfloat16"` or `"4-bit"`.
        versions (`Mapping[str, str]`, *optional*): Of packages, by name.
        learning_curve (`tuple[Mapping[str, float], ...]`, *optional*): Rows of the learning curve, by step.
        origin (`Mapping`, *optional*):
            How the expert was made, if not by training: `operation` ("mix", "transfer", "adapt", "import", ...),
            `formula`, `statement`, `sources` (objects with `name`, `repo_id`, `fingerprint_id`, `weight`) and
            `settings` (an object). All are optional.
        datasets (`tuple[str, ...]`, *optional*): Hub ids of the data it was trained on.
        language (`tuple[str, ...]`, *optional*): Codes, e.g. `("en",)`.
        pipeline_tag (`str`, *optional*): `"text-generation"` or `"image-text-to-text"`.
        fingerprint_id, parametrization, adapted_modules, file_bytes (*optional*):
            What the adapter's own files say: they win over `expert.json`.
        other (`Mapping[str, Any]`, *optional*): Facts in `expert.json` that no card shows; they are kept.

    Raises:
        ValueError: Without a name, or with a `repo_id` that is none.
    """

    name: str
    label: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    trained_parameters: int | None = None
    task: str | None = None
    reward: str | None = None
    kl_coefficient: float | None = None
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    hardware: str | None = None
    training_seconds: float | None = None
    results: tuple[ExpertResult, ...] = ()
    license: str | None = None
    description: str | None = None
    method: str | None = None
    baseline: str | None = None
    kl_estimator: str | None = None
    train_prompts: int | None = None
    validation: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    learning_curve: tuple[Mapping[str, float], ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    fingerprint_id: str | None = None
    parametrization: str | None = None
    adapted_modules: str | None = None
    file_bytes: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("an expert card needs the expert's name")
        if self.repo_id is not None and not is_repo_id(self.repo_id):
            raise ValueError(
                f"repo_id {self.repo_id!r:.80} is not a Hub id such as 'user/expert': leave it out or correct it"
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], name: str = "expert") -> ExpertCardData:
        """
        The facts in an `expert.json`.

        Args:
            metadata (`Mapping[str, Any]`): Its content. What it does not say stays unknown; unknown keys are kept.
            name (`str`, *optional*, defaults to `"expert"`): Of an expert whose facts have none.

        Raises:
            ValueError: A fact is of the wrong type; it is named.
        """
        values, other = {}, {}
        for key, value in metadata.items():
            if key not in _READERS:
                other[key] = value
            elif value is not None:
                try:
                    values[key] = _READERS[key](value)
                except (TypeError, ValueError, RecursionError) as error:
                    raise ValueError(f"the expert's fact {key!r} cannot be used: {error}") from error
        if not str(values.get("name", "")).strip():
            values["name"] = name
        return cls(**values, other=other)

    def to_metadata(self) -> dict[str, Any]:
        """What `expert.json` holds: all facts that are known, of JSON types, but no path of this machine."""
        found = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "other" or value is None or value == () or value == {}:
                continue
            found[entry.name] = value
        if self.base_model is not None and not is_repo_id(self.base_model):
            del found["base_model"]
        found["results"] = [_without_none(asdict(result)) for result in self.results]
        if not self.results:
            del found["results"]
        return dict(json.loads(json.dumps({**self.other, **found}, allow_nan=False)))


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository's on the Hub; "base" is the folder of a bank."""
    return name != BASE_FOLDER and is_hub_id(name, needs_owner=False)


def _without_none(entry: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: _without_none(value) if isinstance(value, Mapping) else value for name, value in entry.items()}
    return {name: value for name, value in plain.items() if value is not None and value is not False}


# -- reading ---------------------------------------------------------------------------------------------------------
def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it must be a text, not {value!r:.80}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"it must be a whole number of at least 0, not {value!r:.80}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"it must be a finite number, not {value!r:.80}")
    return value


def _several(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def of_all(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"it must be a list, not {value!r:.80}")
        return tuple(map(read, value))

    return of_all


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"it must be an object, not {value!r:.80}")
    return dict(json.loads(json.dumps(value, allow_nan=False)))  # a copy, of JSON types only


def _texts(value: Any) -> dict[str, str]:
    return {name: _text(item) for name, item in _object(value).items()}


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(item) for name, item in _object(value).items()}


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"it must hold whole numbers, not {value!r:.80}")
    return value


def _origin(value: Any) -> dict[str, Any]:
    origin = _object(value)
    for name in ("operation", "formula", "statement"):
        if origin.get(name) is not None:
            _text(origin[name])
    origin["sources"] = list(_several(_object)(origin.get("sources") or []))
    origin["settings"] = _object(origin.get("settings") or {})
    return {name: part for name, part in origin.items() if part not in (None, [], {})}


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("name", "label", "repo_id", "base_model", "base_revision", "task", "reward", "hardware", "license"), _text
    ),
    **dict.fromkeys(("description", "method", "baseline", "kl_estimator", "precision", "pipeline_tag"), _text),
    **dict.fromkeys(("fingerprint_id", "parametrization", "adapted_modules"), _text),
    **dict.fromkeys(("trained_parameters", "steps", "batch_size", "train_prompts", "file_bytes"), _count),
    **dict.fromkeys(("kl_coefficient", "learning_rate", "training_seconds"), _number),
    **dict.fromkeys(("datasets", "language"), _several(_text)),
    "seeds": _several(_seed),
    "validation": _object,
    "versions": _texts,
    "learning_curve": _several(_numbers),
    "origin": _origin,
    "results": _several(result_from_json),
}
