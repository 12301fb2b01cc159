"""An expert in a folder exactly as it shall be on the Hub: base model by id and commit, facts, card, nothing local."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

from peft_svf.experts.adapter_files import EXPERT_FILE, read_adapter, read_config, read_facts
from peft_svf.experts.errors import ExpertError, HubError
from peft_svf.experts.expert import write_facts
from peft_svf.experts.files import make_readable
from peft_svf.hub.base_reference import BaseReference, on_hub
from peft_svf.hub.facts import local_places
from peft_svf.hub_cards.card_files import CARD


_READABLE = (".json", ".md", ".yaml", ".txt", ".jinja", ".py")
_SETS = ("target_modules", "exclude_modules")  # written in another order by every process


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy what has one of these names in `source`, and nothing else that lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in patterns:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def finish_expert(
    folder: Path, base: BaseReference, facts: dict[str, Any], what: str, local_base: str | None = None
) -> None:
    """
    Complete a staged expert: its config refers to `base`, its facts are `facts`, its card says so; then read it back.

    Args:
        folder (`Path`): Has `adapter_config.json` and `adapter_model.safetensors`; changed in place.
        base ([`BaseReference`]): The base model.
        facts (`dict[str, Any]`): The content of expert.json.
        what (`str`): The expert, for messages.
        local_base (`str`, *optional*): Where this machine has the base model.

    Raises:
        ExpertError: What would be pushed is damaged, has no fingerprint, or names a folder of this machine.
    """
    from peft_svf.hub_cards import write_expert_card  # not before it is needed: it can draw

    refer_to(folder, base, what, local_base)
    write_facts(folder, facts)
    check_expert(folder, what)
    write_expert_card(folder)


def check_expert(folder: Path, what: str) -> None:
    """Read a staged or downloaded expert as loading does; raises an `ExpertError` for what is damaged or missing."""
    config, _, _ = read_adapter(folder, what)
    if not config.base_fingerprint:
        raise ExpertError(
            f"{what} has no fingerprint of its base model, so nobody could tell whether it fits theirs; load it onto "
            "its base model and save it again with this version (model.save_pretrained)."
        )
    if not config.base_model_name_or_path:
        raise ExpertError(f"{what} does not say which base model it belongs to; save it again.")
    read_facts(folder, what)


def refer_to(folder: Path, base: BaseReference, what: str, local_base: str | None = None) -> None:
    """Let the config of a staged adapter name its base model as others can load it; for inference, with a task."""
    path = folder / CONFIG_NAME
    read_config(folder, what).save_pretrained(str(folder))  # with every field of this version
    config = json.loads(path.read_text("utf-8"))
    config["basis_source"] = _published_source(config, base, what, local_base)
    config["base_model_name_or_path"], config["revision"] = base.model, base.revision
    config["inference_mode"] = True
    # without a task PEFT guesses a class from `auto_mapping`, for which it imports modules by name
    config["task_type"], config["auto_mapping"] = config.get("task_type") or "CAUSAL_LM", None
    for name in _SETS:
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def seal(folder: Path, tags: Sequence[str] = (), also: Sequence[str] = ()) -> None:
    """
    The last steps before an upload: the user's tags on the card, readable files, and no name of this machine in them.

    Args:
        folder (`Path`): Everything that is staged.
        tags (`Sequence[str]`, *optional*): Added to the card's.
        also (`Sequence[str]`, *optional*): Folders of this machine to look for besides home, temporary and current.

    Raises:
        HubError: A file names one of these folders.
    """
    if tags:
        card = ModelCard.load(folder / CARD)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(folder / CARD)
    make_readable(folder)
    places = [*local_places(), *(place for place in also if len(Path(place).parts) > 2)]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _READABLE:
            text = path.read_text("utf-8", "replace")
            for place in places:
                if place in text or json.dumps(place)[1:-1] in text:
                    raise HubError(
                        f"{path.relative_to(folder)} would tell everybody about a folder of this machine, {place}; "
                        f"take it out of the expert ({EXPERT_FILE}, or `facts`) or of the tokenizer, and push again."
                    )


def _published_source(config: dict[str, Any], base: BaseReference, what: str, local_base: str | None) -> str | None:
    """The unquantized checkpoint that the singular bases came from, as others can find it."""
    source = config.get("basis_source")
    if source is None:
        return None
    if source in (local_base, config.get("base_model_name_or_path")):
        return base.model
    found = on_hub(source)
    if found is not None:
        return found.model
    if config.get("save_basis"):
        return None  # the bases come with the expert
    raise HubError(
        f"The singular bases of {what} came from the local folder '{source}' (basis_source), which means nothing to "
        f"others; push that checkpoint to the Hub, write its id as basis_source into {CONFIG_NAME} (or the model's "
        "peft_config), and push again."
    )
