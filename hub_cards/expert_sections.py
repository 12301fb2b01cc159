"""The sections of an expert's card, as Markdown that no fact can break out of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.hub_cards.expert_facts import ExpertCardData, is_repo_id
from peft_svf.hub_cards.metadata import is_hub_id, is_revision
from peft_svf.hub_cards.results import cautions, result_cells
from peft_svf.hub_cards.text import NOT_RECORDED, clean, inline, literal, paragraph, plain


HUB = "https://huggingface.co"
FOLDER, BANK = "path/to/this/folder", "path/to/the/bank"
OPERATIONS = {
    "mix": "A mixture of other experts, without training.",
    "adapt": "A mixture of other experts that a few-shot search has found (strategy C of Transformer²).",
    "transfer": "Carried over from an expert of another base model, without training.",
    "import": "Converted from a checkpoint of the paper's released code.",
    "interpolate": "A point between two other experts, without training.",
    "difference": "The difference of two experts, without training.",
    "scale": "Another expert at another strength, without training.",
    "negate": "Another expert in the opposite direction, without training.",
    "average": "The mean of other experts, without training.",
    "top_components": "The components of another expert that it moves most, without training.",
    "reverse": "A control, not an expert: the offsets of another expert in reversed order.",
    "random_like": "A control, not an expert: random offsets of the size of another expert's.",
    "shuffle": "A control, not an expert: the offsets of another expert in random order.",
}
IN_FORMULA = ("residual", "normalize")  # settings of a mixture that its formula shows
MOST_ROWS = 60  # of sources and settings


def expert_sections(facts: ExpertCardData, bank: str | None = None, folder: str | None = None) -> dict[str, Any]:
    """
    The values of the template `expert.md`.

    Args:
        facts ([`ExpertCardData`]): Of the expert.
        bank, folder (`str`, *optional*): Hub id, or "", of the bank that it is in, and where there.
    """
    is_made = bool(facts.origin)
    training = training_rows(facts)
    return {
        "title": inline(facts.name),
        "description": paragraph(facts.description) if facts.description else None,
        "facts": fact_rows(facts),
        "run": run_code(facts, bank, folder),
        "made": origin_section(facts.origin) if is_made else None,
        "training": [row for row in training if row[1] != NOT_RECORDED] if is_made else training,
        "training_title": "How it was trained" if facts.method or not is_made else "Besides",
        "results": [result_cells(result) for result in facts.results],
        "limits": limits(facts),
        "license": inline(facts.license),
        "peft_svf": version_of_package(facts.versions),
    }


def fact_rows(facts: ExpertCardData) -> list[tuple[str, str]]:
    """What the expert is, and which base model it fits."""
    size = "" if facts.file_bytes is None else f" ({facts.file_bytes} bytes)"
    return [
        ("Routing label", inline(facts.label)),
        ("Base model", base_model_text(facts.base_model, facts.base_revision)),
        ("Base revision", inline(facts.base_revision)),
        ("Base fingerprint", inline(facts.fingerprint_id)),
        ("Adapted", inline(facts.adapted_modules)),
        ("Parameters", inline(facts.trained_parameters) + size),
        *([("Published as", repo_link(facts.repo_id))] if facts.repo_id else []),
    ]


def training_rows(facts: ExpertCardData) -> list[tuple[str, str]]:
    """How the expert was trained."""
    estimator = inline(facts.kl_estimator)
    if not facts.kl_estimator and facts.kl_coefficient == 0:
        estimator = "none needed"
    return [
        ("Method", inline(facts.method)),
        ("Task", inline(facts.task)),
        ("Reward", inline(facts.reward)),
        ("Baseline", inline(facts.baseline)),
        ("KL estimator", estimator),
        ("KL coefficient", inline(facts.kl_coefficient)),
        ("Training prompts", inline(facts.train_prompts)),
        ("Seeds", inline(facts.seeds)),
        ("Steps", inline(facts.steps)),
        ("Answers per step", inline(facts.batch_size)),
        ("Learning rate", inline(facts.learning_rate)),
        ("Checkpoint chosen by", validation_text(facts.validation)),
        ("Parametrization", inline(facts.parametrization)),
        ("Precision of the base model", inline(facts.precision)),
        ("Hardware", inline(facts.hardware)),
        ("Training time", NOT_RECORDED if facts.training_seconds is None else f"{facts.training_seconds:.0f} s"),
        ("Versions", inline(facts.versions)),
    ]


def validation_text(validation: Mapping[str, Any]) -> str:
    """`"validation reward on 256 prompts: -0.05 before, 0.92 at step 45"`."""
    if not validation:
        return NOT_RECORDED
    known = {name: inline(value) for name, value in validation.items() if value is not None}
    where = f" on {known['prompts']} prompts" if "prompts" in known else ""
    numbers = [f"{known['start']} before"] if "start" in known else []
    if "best" in known:
        numbers.append(f"{known['best']} at " + (f"step {known['step']}" if "step" in known else "its best"))
    return f"{known.get('metric', 'validation')}{where}" + (f": {', '.join(numbers)}" if numbers else "")


# -- base model and repositories -------------------------------------------------------------------------------------
def base_model_text(base_model: str | None, revision: str | None) -> str:
    """A link for a model on the Hub, the name alone for a folder."""
    if base_model is None:
        return NOT_RECORDED
    if base_model == BASE_FOLDER:
        return "in the folder `base` of the bank"
    if is_hub_id(base_model):
        return repo_link(base_model, revision)
    return f"{inline(Path(base_model).name)}, a local folder that is not on the Hub"


def repo_link(repo_id: str, revision: str | None = None) -> str:
    """A link to a repository whose name was checked."""
    tree = f"/tree/{revision}" if is_revision(revision) else ""
    return f"[`{repo_id}`]({HUB}/{repo_id}{tree})"


# -- code ------------------------------------------------------------------------------------------------------------
def run_code(facts: ExpertCardData, bank: str | None = None, folder: str | None = None) -> dict[str, Any]:
    """What the code to run the expert is made of; texts are Python literals."""
    base = facts.base_model if is_hub_id(facts.base_model) else None
    is_vision = facts.pipeline_tag == "image-text-to-text"
    return {
        "needs_base": base is None or bank is not None or is_vision,
        "pipeline": "Transformer2ImageTextToTextPipeline" if is_vision else "Transformer2Pipeline",
        "alone": not is_vision and facts.base_model is not None,
        "pinned": literal(folder if bank is not None and folder else "default"),  # PEFT's name for the only one
        "bank": None if bank is None else literal(bank or BANK),
        "subfolder": literal(folder) if bank and folder else None,
        "auto": "AutoModelForImageTextToText" if is_vision else "AutoModelForCausalLM",
        "base": base_arguments(facts, bank),
        "model": literal(bank or facts.repo_id or FOLDER),
        "name": literal(expert_name(facts)),
        "label": literal(facts.label) if facts.label and clean(facts.label) else None,
        "description": literal(facts.description) if facts.description else None,
    }


def base_arguments(facts: ExpertCardData, bank: str | None) -> str:
    """What `from_pretrained` is given to load the base model, as code."""
    if is_hub_id(facts.base_model) and facts.base_model != BASE_FOLDER:
        revision = facts.base_revision if is_revision(facts.base_revision) else None
        return literal(facts.base_model) + (f", revision={literal(revision)}" if revision else "")
    if facts.base_model == BASE_FOLDER:
        return f"{literal(bank)}, subfolder={literal(BASE_FOLDER)}" if bank else literal(f"{BANK}/{BASE_FOLDER}")
    return literal("path/to/the/base/model")


def expert_name(facts: ExpertCardData) -> str:
    """What the expert can be called in a bank: letters, digits, _ and -."""
    text = re.sub(r"[^A-Za-z0-9_-]+", "-", clean(facts.label or facts.name, 40)).strip("-")
    return text if text and text not in ("others", "base") else "expert"


# -- origin ----------------------------------------------------------------------------------------------------------
def origin_section(origin: Mapping[str, Any]) -> dict[str, Any]:
    """How an expert was made that was not trained."""
    operation = origin.get("operation")
    shown = ("operation", "formula", "statement", "sources", "settings")
    settings = {**{k: v for k, v in origin.items() if k not in shown}, **(origin.get("settings") or {})}
    settings = {k: v for k, v in settings.items() if v is not None and k not in IN_FORMULA}
    sources = list(origin.get("sources") or [])
    return {
        "sentence": OPERATIONS.get(operation or "") or f"Operation: {inline(operation)}.",
        "formula": inline(origin["formula"]) if origin.get("formula") else None,
        "statement": paragraph(clean(origin["statement"], 2000)) if origin.get("statement") else None,
        "sources": [_source_cells(source) for source in sources[:MOST_ROWS]],
        "settings": [(inline(name), inline(value)) for name, value in list(settings.items())[:MOST_ROWS]],
    }


def _source_cells(source: Mapping[str, Any]) -> dict[str, str]:
    known = ("name", "repo_id", "revision", "fingerprint_id", "weight")
    repo_id, revision = source.get("repo_id"), source.get("revision")
    where = inline(repo_id)
    if isinstance(repo_id, str) and is_repo_id(repo_id):
        where = repo_link(repo_id, revision if isinstance(revision, str) else None)
    rest = {name: value for name, value in source.items() if name not in known and value is not None}
    if isinstance(rest.get("origin"), Mapping):  # how the source was made itself
        rest["origin"] = f"{plain(rest['origin'].get('operation'))} {plain(rest['origin'].get('formula'))}".strip()
    return {
        "name": inline(source.get("name")),
        "where": where,
        "fingerprint": inline(source.get("fingerprint_id")),
        "weight": weight_text(source.get("weight")),
        "more": inline(rest) if rest else "",
    }


def weight_text(weight: Any) -> str:
    """A weight, or of weights by group of layers their range."""
    values = list(weight.values()) if isinstance(weight, Mapping) else weight if isinstance(weight, list) else [weight]
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values):
        return inline(weight)
    if len(numbers) == 1:
        return f"{numbers[0]:.4g}"
    return f"{min(numbers):.3g} to {max(numbers):.3g} in {len(numbers)} groups of layers"


# -- limits ----------------------------------------------------------------------------------------------------------
def limits(facts: ExpertCardData) -> list[str]:
    """What the expert cannot do, and what its numbers do not prove."""
    found = cautions(facts.results)
    if len(facts.seeds) == 1 and facts.results:
        found.append("It is one training run with one seed: intervals cover the choice of prompts, not of the seed.")
    if facts.results and any(result.gain_interval is None and not result.chosen_on for result in facts.results):
        found.append("The interval of a gain is not recorded: compare the intervals of base model and expert.")
    if facts.precision and ("4-bit" in facts.precision or "8-bit" in facts.precision):
        found.append(f"It was trained on a base model in {inline(facts.precision)}; other weights answer differently.")
    if not facts.results:
        found.append("How well it works was not measured: evaluate it before you rely on it.")
    return found


def version_of_package(versions: Mapping[str, str]) -> str:
    """The version of peft-svf that made the expert, as it can stand in BibTeX; empty if it is not recorded."""
    version = plain(versions.get("peft-svf"))
    return version if re.fullmatch(r"[0-9A-Za-z.+!-]+", version) else ""
