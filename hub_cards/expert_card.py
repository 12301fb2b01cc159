"""The card of one expert: its facts, rendered into README.md with the metadata that the Hub reads."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


NOT_RECORDED = "not recorded"
_TEMPLATE = Path(__file__).parent / "templates" / "expert.md"


@dataclass(frozen=True)
class ExpertResult:
    """Success of the base model and of the expert on the same prompts, as shares in [0, 1].

    Args:
        task (`str`): What was evaluated, with its split, e.g. `"playground-math, test"`.
        n (`int`): Number of prompts.
        base (`float`), expert (`float`): Share of prompts answered right.
        base_interval, expert_interval (`tuple[float, float]`): Their 95 % intervals.
    """

    task: str
    n: int
    base: float
    base_interval: tuple[float, float]
    expert: float
    expert_interval: tuple[float, float]

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"result on {self.task!r}: n must be at least 1, got {self.n}")
        for name, share, (low, high) in (
            ("base", self.base, self.base_interval),
            ("expert", self.expert, self.expert_interval),
        ):
            if not 0 <= low <= share <= high <= 1:
                raise ValueError(
                    f"result on {self.task!r}: {name} must be a share in [0, 1] within its interval, "
                    f"got {share} in ({low}, {high})"
                )


@dataclass(frozen=True)
class ExpertCardData:
    """The facts of one expert. What is None or empty appears on the card as "not recorded".

    Args:
        name (`str`): Name of the expert, the card's title.
        label (`str`, *optional*): The dispatcher's label for prompts that this expert answers.
        repo_id (`str`, *optional*): Where the expert is published, used in the code to run it.
        base_model (`str`, *optional*): Hub id or local folder; a folder's path stays off the card.
        base_revision (`str`, *optional*): Commit of the base model.
        trained_parameters (`int`, *optional*): Number of offsets.
        task (`str`, *optional*), reward (`str`, *optional*): What it was trained on and what was rewarded.
        kl_coefficient, steps, learning_rate, batch_size (*optional*): Policy-gradient settings.
        seeds (`tuple[int, ...]`, *optional*): One seed per training run that the results stand for.
        hardware (`str`, *optional*), training_seconds (`float`, *optional*): Where, and how long.
        results (`tuple[ExpertResult, ...]`, *optional*): Measured success beside the base model's.
        license (`str`, *optional*): The Hub's license identifier, e.g. `"apache-2.0"`.
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

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("an expert card needs the expert's name")
        if self.repo_id is not None and not _is_hub_id(self.repo_id):
            raise ValueError(
                f"repo_id {self.repo_id!r} is not a Hub id such as 'user/expert': leave it out or correct it"
            )


def write_expert_card(folder: str | Path, facts: ExpertCardData) -> Path:
    """
    Write `README.md` into the folder of an expert, as a whole or not at all.

    PEFT rewrites tags and base model of an existing card whenever it saves, so write the card last.

    Args:
        folder (`str` or `Path`): Existing folder, usually the one with `adapter_config.json`.
        facts ([`ExpertCardData`]): What is known about the expert.

    Returns:
        `Path`: The card.

    Raises:
        `FileNotFoundError`: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: save the expert there first, then write its card")
    text = render_expert_card(facts)
    descriptor, staged = tempfile.mkstemp(dir=folder, prefix=".README.", suffix=".md")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(staged, 0o644)  # mkstemp's 0600 would hide the card from other users
        os.replace(staged, folder / "README.md")
    except BaseException:
        os.unlink(staged)
        raise
    return folder / "README.md"


def render_expert_card(facts: ExpertCardData) -> str:
    """Text of the card, metadata first; parsed back by `huggingface_hub` before it is returned."""
    metadata = _metadata(facts)
    values: dict[str, Any] = {field.name: _shown(getattr(facts, field.name)) for field in fields(facts)}
    values["base_model"] = _base_model_text(facts.base_model)
    if facts.training_seconds is not None:
        values["training_seconds"] = f"{facts.training_seconds:.0f} s"
    values["results"] = [
        {
            "task": _shown(result.task),
            "n": result.n,
            "base": _percent(result.base, result.base_interval),
            "expert": _percent(result.expert, result.expert_interval),
        }
        for result in facts.results
    ]
    values["model_id"] = facts.repo_id or "path/to/this/folder"
    values["needs_base"] = not _is_hub_id(facts.base_model)
    text = str(ModelCard.from_template(metadata, template_path=str(_TEMPLATE), **values))
    if ModelCard(text).data.to_dict() != metadata.to_dict():
        raise ValueError(f"the card of {facts.name!r} does not survive parsing: check its license and base model")
    return text


def _metadata(facts: ExpertCardData) -> ModelCardData:
    base = facts.base_model if _is_hub_id(facts.base_model) else None
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["peft", "svf", "transformer2", *([f"base_model:adapter:{base}"] if base else [])],
        license=facts.license or None,
    )


def _is_hub_id(name: str | None) -> bool:
    """Whether a name can be a repository on the Hub; a folder of that name here makes it a local path."""
    if name is None or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_model_text(base_model: str | None) -> str:
    if base_model is None:
        return NOT_RECORDED
    if _is_hub_id(base_model):
        return f"[`{base_model}`](https://huggingface.co/{base_model})"
    return f"`{_shown(Path(base_model).name)}`, a local folder that is not on the Hub"


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _shown(value: Any) -> str:
    """One line that cannot break out of a Markdown table cell."""
    if value is None or value == () or value == "":
        return NOT_RECORDED
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
