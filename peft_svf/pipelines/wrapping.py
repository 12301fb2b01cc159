"""as_bank: the bank behind whatever a pipeline was given as its model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from peft_svf.experts.adapter_files import read_config
from peft_svf.experts.bank import ExpertBank, ExpertBankError
from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.bank_loading import ADAPTER_FILES, BANK_FILES, EXPERT_FILES, find_base, load_expert
from peft_svf.experts.download import download, is_hub_id
from peft_svf.tuner.names import PEFT_PREFIX


NAMELESS = "default"  # what PEFT calls an adapter that nobody named


def as_bank(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> ExpertBank:
    """
    The bank behind whatever a pipeline was given as its model.

    Args:
        model (`str`, `Path`, `ExpertBank`, `PeftModel` or `PreTrainedModel`):
            A bank's folder or Hub id, the folder of one saved adapter, an `ExpertBank`, a `PeftModel` with SVF
            adapters (each becomes an expert, unless `AutoModelForCausalLM` loaded the model from a bank), or a causal
            language model. A model that transformers put SVF adapters into becomes a `PeftModel` (see
            [`peft_model_around`]).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): replaces the bank's.

    Raises:
        ValueError: not a causal language model.
        ExpertBankError: not a bank, or adapters that are not SVF.
    """
    if isinstance(model, str | Path):
        model = _from_checkpoint(model)
    bank = model if isinstance(model, ExpertBank) else getattr(model, "expert_bank", None)
    if bank is None:
        _check_causal_lm(model)
        return ExpertBank(peft_model_around(model), tokenizer)
    _check_causal_lm(bank.model)
    if tokenizer is not None and tokenizer is not bank.tokenizer:
        bank = copy.copy(bank)
        bank.tokenizer = tokenizer
    return bank


def peft_model_around(model: Any) -> Any:
    """
    The `PeftModel` of a model that transformers put adapters into; any other model as it is.

    `pipeline(task, model=<repository with adapter_config.json>)` and `AutoModelForCausalLM` load the base model and
    inject the adapter into its layers, without a `PeftModel`. PEFT can only build one by injecting the adapter again.
    So the adapters are taken out as state dicts and put in again; the adapted layers stay where they are with their
    singular bases, and nothing is decomposed a second time.

    Args:
        model (`Any`): changed in place; of no use on its own afterwards.

    Raises:
        ExpertBankError: an adapter is not SVF.
    """
    if isinstance(model, PeftModel) or not getattr(model, "_hf_peft_config_loaded", False):
        return model
    configs = dict(model.peft_config)
    types = {name: str(config.peft_type.value) for name, config in configs.items()}
    if set(types.values()) != {"SVF"}:
        raise ExpertBankError(f"The model has adapters that are not SVF ({types}); this pipeline runs SVF adapters.")
    states = {name: _offsets_of(model, name) for name in configs}
    model.delete_adapter(list(configs))
    wrapped: PeftModel | None = None
    for name, config in configs.items():
        if wrapped is None:
            kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
            wrapped = kind(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        set_peft_model_state_dict(wrapped, states[name], adapter_name=name)
    assert wrapped is not None
    return wrapped.requires_grad_(False)


def _offsets_of(model: Any, name: str) -> dict[str, Any]:
    """The checkpoint of one adapter, with the names it has in a `PeftModel`."""
    # The embeddings stay in the model, and "auto" would ask the Hub about them
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"{PEFT_PREFIX}{key}": tensor.clone() for key, tensor in state.items()}


def _from_checkpoint(folder_or_id: str | Path) -> Any:
    """A bank, or the model with the adapter of a repository that holds one adapter at its root."""
    folder = Path(folder_or_id)
    if not folder.is_dir():
        return _from_hub(folder_or_id)
    if not (folder / "config.json").is_file() and find_adapter_config_file(str(folder_or_id)) is not None:
        if _base_of(folder) == BASE_FOLDER and (base := folder.absolute().parent / BASE_FOLDER).is_dir():
            return load_expert(
                AutoModelForCausalLM.from_pretrained(base), folder, NAMELESS, f"the bank {folder.parent}"
            )
        return AutoModelForCausalLM.from_pretrained(str(folder_or_id))
    return ExpertBank.from_pretrained(folder_or_id)


def _from_hub(folder_or_id: str | Path) -> Any:
    """The same from one commit of a repository on the Hub; an expert gets the revision of the base that it names."""
    if not is_hub_id(folder_or_id):
        return ExpertBank.from_pretrained(folder_or_id)  # says what is wrong
    found = download(str(folder_or_id), None, None, [*BANK_FILES, *EXPERT_FILES], "a bank or an expert")
    if (found.folder / "config.json").is_file() or not (found.folder / ADAPTER_FILES[0]).is_file():
        return ExpertBank.from_pretrained(folder_or_id, revision=found.commit)
    where = f"the expert {folder_or_id}"
    config = read_config(found.folder, where)
    base, hub = find_base(config.base_model_name_or_path, config.revision, None, where, is_foreign=True)
    return load_expert(AutoModelForCausalLM.from_pretrained(base, **hub), found.folder, NAMELESS, where)


def _base_of(folder: Path) -> str | None:
    """The base model that an adapter in a local folder names; an expert inside a bank names the folder beside it."""
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def _check_causal_lm(model: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    can_generate = hasattr(inner, "can_generate") and inner.can_generate()
    if not can_generate or inner.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inner).__name__} is not a causal language model; load the checkpoint with AutoModelForCausalLM."
        )
