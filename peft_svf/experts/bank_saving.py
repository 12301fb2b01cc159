"""From a bank to the folder that `ExpertBank.from_pretrained` and `transformers.pipeline` load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peft_svf.experts.bank_config import (
    BASE_FOLDER,
    LANGUAGE,
    VISION_LANGUAGE,
    BankConfig,
    ExpertBankError,
    check_replaceable,
)
from peft_svf.experts.base_state import plain_state_dict
from peft_svf.experts.expert import write_facts
from peft_svf.experts.files import make_readable, replaced_folder


if TYPE_CHECKING:
    from peft_svf.experts.bank import ExpertBank


def save_bank(bank: ExpertBank, folder: str | Path, include_base: bool, reference: str | None = None) -> Path:
    """See [`ExpertBank.save_pretrained`]; with `reference`, the saved bank calls its base model so."""
    target = Path(folder).absolute()
    if not bank.experts:
        raise ExpertBankError("The bank has no experts to save; add an SVF adapter to its model first.")
    if bank.model.get_model_status().merged_adapters:
        raise ExpertBankError("An expert is merged into the base model; call unmerge_adapter() before saving.")
    check_replaceable(target)
    base = BASE_FOLDER if include_base else reference or base_reference(bank, target)
    config = BankConfig(
        base_model_name_or_path=base,
        experts=bank.experts,
        base_revision=None if include_base or Path(base).is_dir() else bank.base_revision,
        instruction=bank.instruction,
        classifier=bank.classifier,
        dispatcher=bank.dispatcher_options,
        architecture=LANGUAGE if bank.processor is None else VISION_LANGUAGE,
    )
    processing = bank.tokenizer if bank.processor is None else bank.processor
    with replaced_folder(target) as staging:
        for name in config.adapters:
            _save_adapter(bank, staging, name, config)
        if include_base:
            _save_base(bank, staging / BASE_FOLDER)
        processing.save_pretrained(staging / BASE_FOLDER if include_base else staging)
        config.write(staging)
        make_readable(staging)
    return target


def base_reference(bank: ExpertBank, target: Path) -> str:
    """
    What a bank in `target` can call its base model, if that is not saved with it.

    Raises:
        ExpertBankError: nothing, as the base model has no checkpoint that outlives the saving.
    """
    base = str(bank.base_model.config._name_or_path)
    remedy = "pass include_base=True to store the base model in the bank."
    if not base:
        raise ExpertBankError(f"The base model was not loaded from a checkpoint; {remedy}")
    path = Path(base).absolute()
    if path.is_relative_to(target):
        raise ExpertBankError(f"The base model lies inside {target}, which would be replaced; {remedy}")
    return str(path) if path.is_dir() else base


def _save_adapter(bank: ExpertBank, staging: Path, name: str, bank_config: BankConfig) -> None:
    # PEFT writes the adapter "default" at the root of the folder it is given and every other in a subfolder
    root = staging / name if name == "default" else staging
    bank.model.save_pretrained(root, selected_adapters=[name], save_embedding_layers=False)
    (root / "README.md").unlink()  # PEFT's stock card
    path = staging / name / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = bank_config.base_model_name_or_path
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if bank.facts.get(name):
        write_facts(staging / name, bank.facts[name])


def _save_base(bank: ExpertBank, folder: Path) -> None:
    """Write the base checkpoint with the parameter names it had before the adapters were injected."""
    bank.base_model.save_pretrained(folder, state_dict=plain_state_dict(bank.base_model))
