"""From folders and Hub ids to a base model with adapters; a failure leaves the model as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from peft_svf.experts.bank_config import BASE_FOLDER, VISION_LANGUAGE, BankConfig, ExpertBankError
from peft_svf.tuner.adapted import wrapping_modules
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.rollback import Rollback


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_BANK_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickles, no code


def is_vision_language(model: PreTrainedModel) -> bool:
    """Whether a base model takes images next to texts."""
    return type(model).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def load_base(
    folder: Path, config: BankConfig, token: str | None, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """The base model of the bank in `folder`, with the tokenizer or processor of the bank or else of the base."""
    inside = (folder / config.base_model_name_or_path).resolve()  # wins over a Hub id of the same name
    is_inside = inside.is_dir() and inside.is_relative_to(folder.resolve())
    base = str(inside) if is_inside else config.base_model_name_or_path
    hub = {} if Path(base).is_dir() else {"revision": config.base_revision, "token": token}
    has_images = config.architecture == VISION_LANGUAGE
    auto_model = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    try:
        model = auto_model.from_pretrained(base, **hub, **model_kwargs)
        own = any((folder / file).is_file() for file in ("tokenizer_config.json", "processor_config.json"))
        source, options = (folder, {}) if own else (base, hub)
        processing = (AutoProcessor if has_images else AutoTokenizer).from_pretrained(source, **options)
    except (OSError, SafetensorError) as error:
        raise ExpertBankError(f"The bank {folder} cannot load its base model {base!r}: {error}") from error
    return model, processing


def processing_of(model: PeftModel | PreTrainedModel) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or the processor of a vision-language model, of the checkpoint that `model` came from."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    source = str(inner.config._name_or_path)
    kind = AutoProcessor if is_vision_language(inner) else AutoTokenizer
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        name = "processor" if kind is AutoProcessor else "tokenizer"
        raise ExpertBankError(f"No {name} found with the base model ({source!r}); pass {name}=...") from error


def bank_folder(folder_or_id: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder of a bank, downloaded if it is on the Hub."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder.absolute()
    if not _is_hub_id(folder_or_id):
        raise ExpertBankError(f"There is no bank folder {folder_or_id} (and it is no Hub id, user/name).")
    return _download(str(folder_or_id), revision, token, _BANK_FILES, "a bank")


def expert_folder(folder_or_id: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder of one adapter, downloaded if it is on the Hub."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder.absolute()
    if not _is_hub_id(folder_or_id):
        raise ExpertBankError(f"There is no expert in {folder_or_id}: no such folder (and no Hub id, user/name).")
    return _download(str(folder_or_id), revision, token, list(ADAPTER_FILES), "an expert")


def load_expert(model: PreTrainedModel | PeftModel, folder: Path, name: str, where: str) -> PeftModel:
    """
    Load the adapter in `folder` as `name` and return the `PeftModel`; on a failure `model` is as it was.

    Args:
        model (`PreTrainedModel` or `PeftModel`): changed in place.
        folder (`Path`): the adapter's.
        name (`str`): what it is called in the model.
        where (`str`): what messages call the place, like "the bank /experts/bank".

    Raises:
        ExpertBankError: a file is missing or damaged, the adapter is not SVF or belongs to another base model.
    """
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise ExpertBankError(
                f"{where[0].upper()}{where[1:]} is incomplete: {folder.name}/{file} is missing; save it again."
            )
    try:
        kind = json.loads((folder / ADAPTER_FILES[0]).read_text("utf-8"))["peft_type"]
        if kind != "SVF":
            raise ExpertBankError(f"Expert '{name}' of {where} is of type {kind}; a bank holds SVF adapters.")
        with _undone_on_failure(model):
            loaded = _put_into(model, folder, name)
            _check_finite(loaded, name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ExpertBankError(f"Expert '{name}' of {where} cannot be loaded: {error}") from error
    if loaded.peft_config[name].base_model_name_or_path == BASE_FOLDER:
        # within the bank's folder; that means nothing to whoever saves this adapter elsewhere
        loaded.peft_config[name].base_model_name_or_path = loaded.get_base_model().config._name_or_path
    return loaded


def _put_into(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    return model


def _check_finite(model: PeftModel, name: str) -> None:
    for layer in wrapping_modules(model.get_base_model()):
        if isinstance(layer, SVFLayer) and name in layer.svf_offset:
            values = layer.svf_offset[name].get_parameter("weight")
            if not (values.is_meta or torch.isfinite(values).all()):
                raise ValueError(f"'{layer.svf_name}' has offsets that are not finite; train or save the expert again")


@contextmanager
def _undone_on_failure(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """PEFT leaves an adapter whose values it could not load in the model, with random ones."""
    if not isinstance(model, PeftModel):
        before, had = Rollback(model), set(vars(model))
        try:
            yield
        except BaseException:
            before.restore()
            for name in set(vars(model)) - had:
                delattr(model, name)
            raise
        return
    tuner: Any = model.base_model
    before, configs = Rollback(model.get_base_model()), set(model.peft_config)
    targets = list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)
    try:
        yield
    except BaseException:
        before.restore()
        for name in set(model.peft_config) - configs:
            del model.peft_config[name]
        tuner.targeted_module_names, tuner.targeted_parameter_names = targets
        raise


def _is_hub_id(folder_or_id: str | Path) -> bool:
    return isinstance(folder_or_id, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_id) is not None


def _download(repository: str, revision: str | None, token: str | None, patterns: list[str], what: str) -> Path:
    from huggingface_hub import snapshot_download

    try:  # one commit, then local files only
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ExpertBankError(
            f"{repository} is neither a folder here nor {what} that can be downloaded: {error}"
        ) from error


def adapter_types(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """The adapters of a model by name, and of which type they are."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: str(config.peft_type.value) for name, config in model.peft_config.items()}


def svf_adapters(model: PreTrainedModel | PeftModel) -> list[str]:
    """The SVF adapters of a model; raises an `ExpertBankError` if it has only others."""
    types = adapter_types(model)
    adapters = [name for name, kind in types.items() if kind == "SVF"]
    if isinstance(model, PeftModel) and not adapters:
        raise ExpertBankError(f"The PeftModel has no SVF adapter (it has {types}); train one with SVFConfig.")
    return adapters
