"""A mixture as an ordinary expert on disk: one adapter with its offsets, and the record of how it was found."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_svf.answering import Processes
from peft_svf.dispatch.few_shot.examples import ADAPTATION_FILE
from peft_svf.dispatch.route import Route
from peft_svf.experts.bank import BASE_LABEL, ExpertBank
from peft_svf.experts.expert import write_facts
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


def save_expert(
    bank: ExpertBank, route: Route, record: Mapping[str, Any], folder: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """
    Write an expert and its record at once; the main process writes, and the others wait until the folder is there.

    Args:
        bank (`ExpertBank`), route ([`Route`]): As for [`save_mixture`].
        record (`Mapping[str, Any]`): What `adaptation.json` says, of JSON types.
        folder (`Path`): Absolute; an earlier expert of a few-shot search there is replaced.
        facts (`Mapping[str, Any]`, *optional*): The content of `expert.json`, from which a card can be made.

    Raises:
        ValueError: The folder holds something else.
    """
    processes = Processes.launched()
    problem: list[str] = []
    if processes.is_main:
        if not _is_replaceable(folder):
            problem = [f"{folder} exists and is no expert of a few-shot search; choose a new folder."]
        else:
            with replaced_folder(folder) as staging:
                save_mixture(bank, route, staging)
                text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
                (staging / ADAPTATION_FILE).write_text(text, "utf-8")
                if facts:
                    write_facts(staging, facts)
                make_readable(staging)
    if problem := processes.gather(problem):
        raise ValueError(problem[0])


def expert_facts(bank: ExpertBank, record: Mapping[str, Any], name: str, task: object = None) -> dict[str, Any]:
    """
    What the record of a search says for the card of its expert.

    Args:
        bank (`ExpertBank`): Of the experts that were mixed.
        record (`Mapping[str, Any]`): The content of `adaptation.json`.
        name (`str`): Of the expert.
        task (`object`, *optional*): What the examples are of, if it has a `name`, `label` or `description`.

    Returns:
        `dict[str, Any]`: Fields of [`~peft_svf.hub_cards.ExpertCardData`], of JSON types. The success on the examples
        is marked as that on the prompts which the mixture was chosen by; it has no interval, which would mean nothing.
    """
    alone, found = record["references"], record["fitness"]
    known: Mapping[str, Mapping[str, Any]] = getattr(bank, "facts", {})
    sources = [
        {
            "name": expert,
            **{key: known[expert][key] for key in ("repo_id",) if key in known.get(expert, {})},
            "weight": _weight_of(record["weights"], record["groups"], expert),
            "success on the examples": alone[expert]["success"],
        }
        for expert in record["experts"]
    ]
    result = {
        "task": f"{getattr(task, 'name', 'the task')}, the examples of the search",
        "n": record["examples"],
        "base": alone[BASE_LABEL]["success"],
        "expert": found["success"],
        "chosen_on": True,
    }
    told = {key: getattr(task, key, None) or None for key in ("label", "description")}
    rest = "the base model (z = 1) has the weight 1 − Σ αₖ" if record["residual"] else "the base model has no weight"
    origin = {
        "operation": "adapt",
        "formula": f"z' = Σ αₖ zₖ; {rest}",
        "statement": record["statement"],
        "sources": sources,
        "settings": {
            "configuration": record["configuration"],
            "examples": record["examples"],
            "reward": record["reward"],
            "generations": len(record["generations"]),
            "stopped": record["stopped"],
            **record["settings"],
        },
    }
    facts = {"name": name, **told, "results": [result], "origin": origin}
    return {key: value for key, value in facts.items() if value is not None}


def _weight_of(weights: Mapping[str, Any], groups: Sequence[str], expert: str) -> Any:
    return {group: weights[group][expert] for group in groups} if groups else weights[expert]


def _is_replaceable(folder: Path) -> bool:
    if not folder.exists():
        return True
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / ADAPTATION_FILE).is_file())


@torch.no_grad()
def save_mixture(bank: ExpertBank, route: Route, folder: Path) -> None:
    """
    Write what a route computes as an adapter of type SVF, exactly, for `PeftModel.from_pretrained(base, folder)`.

    Args:
        bank (`ExpertBank`): The bank of the route's experts; as it was before, afterwards.
        route ([`Route`]): One row.
        folder (`Path`): An existing folder; it gets `adapter_config.json` and `adapter_model.safetensors`.
    """
    batch = MixedBatch(route.experts, route.weights[:1], route.groups, route.residual, every_row=True)
    surplus = route.weights[:1].sum(-1) - 1
    moves_all = not route.residual and bool((surplus.abs() > 1e-6).any())  # components that no expert trains, too
    name = f"mixture_{uuid.uuid4().hex}"
    tuner: Any = bank.model.base_model
    layers = [module for module in tuner.modules() if isinstance(module, SVFLayer)]
    offsets = {layer: batch.offsets(layer) for layer in layers}
    # Any mixture of the experts has the shapes; 2 is one of those that move all components
    weights = [2.0 if moves_all else 1.0] + [0.0] * (len(route.experts) - 1)
    tuner.add_weighted_adapter(list(route.experts), weights, name, residual=not moves_all)
    try:
        for layer, mixture in offsets.items():
            if name in layer.svf_offset:
                own = layer.svf_offset[name].get_parameter("weight").data.zero_()  # (..., k)
                if mixture is not None:
                    own[..., : mixture.shape[-1]] = mixture[0]
        bank.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    finally:
        bank.model.delete_adapter(name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name / file).rename(folder / file)
    (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's stock card
    _complete_config(folder / "adapter_config.json", str(bank.base_model.config._name_or_path))


def _complete_config(path: Path, base: str) -> None:
    """Name the checkpoint of the base model here, not what an expert's own file said; the same file every time."""
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = str(Path(base).absolute()) if Path(base).is_dir() else base or None
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set before
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
