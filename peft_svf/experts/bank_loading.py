"""From folders and Hub ids to a base model with adapters; a failure leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

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

from peft_svf.experts.adapter_files import EXPERT_FILE, pickles_only, read_adapter, read_facts
from peft_svf.experts.bank_config import BASE_FOLDER, VISION_LANGUAGE, BankConfig, ExpertBankError
from peft_svf.experts.download import Download, download, is_hub_id, matching, remember, resolve
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.live_facts import attach_facts
from peft_svf.tuner.rollback import Rollback


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
EXPERT_FILES = (*ADAPTER_FILES, EXPERT_FILE, "README.md")
_PROCESSING_FILES = [  # of tokenizers and processors, at the root of a bank or in its base model's folder
    "*token*.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
]
BANK_FILES = [  # no pickles, no code
    "config.json",
    "README.md",
    *(f"*/{file}" for file in EXPERT_FILES),
    *(f"{folder}{file}" for folder in ("", f"{BASE_FOLDER}/") for file in _PROCESSING_FILES),
    *(f"{BASE_FOLDER}/{file}" for file in ("*config.json", "*.safetensors", "*.safetensors.index.json")),
]


def is_vision_language(model: PreTrainedModel) -> bool:
    """Whether a base model takes images next to texts."""
    return type(model).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def load_base(
    folder: Path, config: BankConfig, token: str | None, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin, str | None]:
    """
    The base model of the bank in `folder`, the tokenizer or processor of the bank or else of the base, and the
    revision of a base model on the Hub: the one that the bank names, or else the commit that was loaded.
    """
    base, hub = _base_of(folder, config, token, model_kwargs.get("cache_dir"))
    if hub and model_kwargs.get("local_files_only"):
        hub["local_files_only"] = True
    has_images = config.architecture == VISION_LANGUAGE
    auto_model = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    try:
        model = auto_model.from_pretrained(base, **{**model_kwargs, **hub})
        own = any((folder / file).is_file() for file in ("tokenizer_config.json", "processor_config.json"))
        source, options = (folder, {}) if own else (base, hub)
        processing = (AutoProcessor if has_images else AutoTokenizer).from_pretrained(source, **options)
    except (OSError, SafetensorError) as error:
        raise ExpertBankError(f"The bank {folder} cannot load its base model {base!r}: {error}") from error
    commit = hub.get("revision")  # transformers keeps none in the model
    if commit is not None:
        remember(base, config.base_revision, commit, model_kwargs.get("cache_dir"))
    return model, processing, config.base_revision or commit


def _base_of(folder: Path, config: BankConfig, token: str | None, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """The folder or Hub id of a bank's base model, and the options that load it."""
    name = config.base_model_name_or_path
    inside = (folder / name).resolve()  # wins over a Hub id of the same name
    if inside.is_dir() and inside.is_relative_to(folder.resolve()):
        return str(inside), {}
    return find_base(name, config.base_revision, token, f"the bank {folder}", cache_dir=cache_dir)


def names_hub_model(name: str | None) -> TypeGuard[str]:
    """Whether a base model can be on the Hub by this name; it is not inside a bank, nor in a folder somewhere."""
    return name is not None and name != BASE_FOLDER and is_hub_id(name, needs_owner=False)


def find_base(
    name: str | None,
    revision: str | None,
    token: str | None,
    where: str,
    is_foreign: bool = False,
    cache_dir: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """
    The base model that an expert or bank names, and the options that load it: none for a folder, which those that are
    foreign, from the Hub, cannot name; the newest commit if no revision is named.

    Raises:
        HubError: it is on the Hub, which does not have it or does not show it.
        ExpertBankError: it is not named, or lies in the bank that an expert was taken from.
    """
    if name and not is_foreign and Path(name).is_dir():
        return name, {}
    if not names_hub_model(name):
        raise ExpertBankError(f"T{where[1:]} cannot load its base model {name!r}: there is no such folder.")
    commit, is_reachable = resolve(name, revision, token, f"the base model of {where}", cache_dir)
    return name, {"revision": commit or revision, "token": token, "local_files_only": not is_reachable}


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


def bank_folder(folder_or_id: str | Path, revision: str | None, token: str | None) -> tuple[Path, str | None]:
    """The folder of a bank and, if it is on the Hub, its commit."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder.absolute(), None
    if not is_hub_id(folder_or_id):
        raise ExpertBankError(f"There is no bank folder {folder_or_id} (and it is no Hub id, user/name).")
    found = download(str(folder_or_id), revision, token, BANK_FILES, "a bank")
    for name in matching(found.files, ADAPTER_FILES[0]):
        _check_pickles(found, PurePosixPath(name), f"expert '{name}' of the bank {found.repo_id}")
    if found.files and "config.json" not in found.files:
        raise ExpertBankError(f"{found.repo_id} is not a bank: it has no config.json.{_what_it_has(found)}")
    return found.folder, found.commit


def expert_folder(
    folder_or_id: str | Path, revision: str | None, token: str | None, subfolder: str | None = None
) -> Path:
    """The folder of one adapter, downloaded if it is on the Hub; `subfolder` is where a bank has it."""
    within = PurePosixPath(subfolder or "")
    if within.is_absolute() or ".." in within.parts:
        raise ExpertError(f"subfolder='{subfolder}' leads out of {folder_or_id}; it is the name of a folder in it.")
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder.absolute() / within
    if not is_hub_id(folder_or_id):
        raise ExpertBankError(f"There is no expert in {folder_or_id}: no such folder (and no Hub id, user/name).")
    wanted = [str(within / file) for file in EXPERT_FILES]
    found = download(str(folder_or_id), revision, token, wanted, "an expert")
    where = f"{found.repo_id}/{within}" if within.parts else found.repo_id
    _check_pickles(found, within, f"the expert {where}")
    if found.files and wanted[0] not in found.files:
        raise ExpertError(f"{where} is no expert: it has no {ADAPTER_FILES[0]}.{_what_it_has(found)}")
    return found.folder / within


def _check_pickles(found: Download, within: PurePosixPath, where: str) -> None:
    """Pickles are not downloaded, so what the repository has is asked."""
    paths = [PurePosixPath(name) for name in found.files]
    pickles = pickles_only([path.name for path in paths if path.parent == within], where)
    if pickles is not None:
        raise pickles


def _what_it_has(found: Download) -> str:
    """What to load from a repository instead, for the end of a message."""
    if ADAPTER_FILES[0] in found.files:
        return f" It is an expert: Expert.from_pretrained('{found.repo_id}'), or bank.add(name, '{found.repo_id}')."
    experts = matching(found.files, ADAPTER_FILES[0])
    if experts:
        return f" It has experts in folders: pass subfolder={' or '.join(repr(name) for name in experts[:5])}."
    return " Check the name."


def load_expert(model: PreTrainedModel | PeftModel, folder: Path, name: str, where: str) -> PeftModel:
    """
    Load the adapter in `folder` as `name`, with its facts, and return the `PeftModel`; on a failure `model` is as it
    was.

    Args:
        model (`PreTrainedModel` or `PeftModel`): changed in place.
        folder (`Path`): the adapter's.
        name (`str`): what it is called in the model.
        where (`str`): what messages call the place, like "the bank /experts/bank".

    Raises:
        ExpertBankError: a file is missing or damaged, the adapter is not SVF or belongs to another base model.
        ExpertError: `expert.json` is damaged.
    """
    _check_files(folder, name, where)
    facts = read_facts(folder, f"expert '{name}' of {where}")
    try:
        with _undone_on_failure(model):
            loaded = _put_into(model, folder, name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ExpertBankError(f"Expert '{name}' of {where} cannot be loaded: {error}") from error
    if loaded.peft_config[name].base_model_name_or_path == BASE_FOLDER:
        # within the bank's folder; that means nothing to whoever saves this adapter elsewhere
        loaded.peft_config[name].base_model_name_or_path = loaded.get_base_model().config._name_or_path
    attach_facts(loaded, name, facts)
    return loaded


def _check_files(folder: Path, name: str, where: str) -> None:
    """Refuse what `read_adapter` does, before PEFT reads it."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    for file in ADAPTER_FILES:
        if file not in names and pickles_only(names, where) is None:
            raise ExpertBankError(
                f"{where[0].upper()}{where[1:]} is incomplete: {folder.name}/{file} is missing; save it again."
            )
    try:
        read_adapter(folder, f"'{name}'")
    except ExpertError as error:
        raise ExpertBankError(f"Expert '{name}' of {where} cannot be loaded: {error}") from error


def _put_into(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    return model


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
