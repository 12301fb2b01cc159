"""ExpertBank: named experts on one base model, with the labels and descriptions that a dispatcher needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


MODEL_TYPE = "transformer2"
BASE_LABEL = "others"  # what unsure and foreign prompts get: the base model
BASE_FOLDER = "base"
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # of a module's name, up to the number of its layer
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # a folder name and a PyTorch module name, never a path


class RouteWeights(Protocol):
    """What a bank needs to know of a [`~peft_svf.dispatch.Route`]."""

    weights: torch.Tensor  # (B, K) or (B, G, K)
    experts: tuple[str, ...]
    groups: tuple[str, ...]
    residual: bool


class ExpertBankError(Exception):
    """
    A folder or model that cannot serve as a bank.

    Deliberately not a `ValueError`: `transformers.pipeline` catches OSError, ValueError, TypeError and RuntimeError
    while it loads a model, tries again in float32 and buries the message under two tracebacks.
    """


@dataclass(frozen=True)
class ExpertEntry:
    """
    What a dispatcher knows of one expert.

    Args:
        label (`str`): the word the dispatcher scores for this expert, unique in the bank.
        description (`str`, *optional*, defaults to `""`): which prompts the expert is for, one line.
    """

    label: str
    description: str = ""


class ExpertBank:
    """
    Named experts (PEFT adapters of type SVF) on one base model.

    Args:
        model (`PeftModel` or `PreTrainedModel`):
            The base model with its experts as adapters; switched to eval mode. A plain model is a bank without
            experts: every prompt gets the base model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): defaults to the tokenizer of the base model's checkpoint.
        experts (`Mapping[str, ExpertEntry]`, *optional*):
            Adapter name to entry. By default every SVF adapter is an expert whose label is its name.
        instruction (`str`, *optional*):
            The instruction of the prompt dispatcher; by default one is written from the labels and descriptions.
        base_revision (`str`, *optional*): Hub revision of the base model, stored with the bank.
        classifier (`str`, *optional*):
            The adapter that classifies prompts (strategy B of Transformer²). It answers none, so it is no expert.

    Raises:
        ExpertBankError: no SVF adapter, an unknown adapter, or a name or label that is reserved or used twice.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        experts: Mapping[str, ExpertEntry] | None = None,
        instruction: str | None = None,
        base_revision: str | None = None,
        classifier: str | None = None,
    ) -> None:
        adapters = _svf_adapters(model)
        if experts is None:
            experts = {name: ExpertEntry(name) for name in adapters if name != classifier}
        self.experts = dict(experts)
        self.classifier = classifier
        _check_entries(self.experts)
        for name in [*self.experts, *([] if classifier is None else [classifier])]:
            if name not in adapters:
                raise ExpertBankError(f"Expert '{name}' is no SVF adapter of the model, which has {adapters}.")
        self.model = model.eval()  # PEFT refuses mixed batches in training mode
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
        self.instruction = instruction
        self.base_revision = base_revision

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model, adapters injected; without `base_only` it computes under the active adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def labels(self) -> dict[str, str]:
        """Label to expert name, in the order of the bank; the base label is not among them."""
        return {entry.label: name for name, entry in self.experts.items()}

    def check_expert(self, name: str) -> str:
        """Return `name` if it is an expert or the base label, else raise a `ValueError` that lists the known ones."""
        if not isinstance(name, str) or (name != BASE_LABEL and name not in self.experts):
            known = ", ".join(f"'{expert}'" for expert in [*self.experts, BASE_LABEL])
            raise ValueError(f"Unknown expert {name!r}; this bank knows {known} ('{BASE_LABEL}' is the base model).")
        return name

    @contextmanager
    def routed(self, route: RouteWeights | str | Mapping[str, float]) -> Iterator[PeftModel | PreTrainedModel]:
        """
        Compute under a route: `with bank.routed(route): bank.model.generate(**batch)`.

        The route belongs to the thread that enters it: other threads that use the same bank do not see it, and
        neither the active adapter nor anything else of the model is changed. Mixtures are exact. Generation with
        beams or several returned sequences goes through `bank.model`, not `bank.base_model`.

        Args:
            route (`Route`, `str` or `Mapping[str, float]`):
                A [`~peft_svf.dispatch.Route`] with one row for each row of the batch; or, for any number of rows, an
                expert's name, `"others"` for the base model, or a mixture like `{"math": 0.7, "code": 0.3}`.

        Raises:
            ValueError: an unknown expert, a batch of other rows than the route, a merged expert.
        """
        experts, weights, groups, residual = self._weights(route)
        if not isinstance(self.model, PeftModel):
            if weights.any():
                raise ValueError(f"This bank has no experts, so it cannot be routed to {experts}.")
            yield self.model
            return
        every_row = isinstance(route, str | Mapping)
        with self.model.base_model.routed(MixedBatch(experts, weights, groups, residual, every_row)):
            yield self.model

    def _weights(
        self, route: RouteWeights | str | Mapping[str, float]
    ) -> tuple[tuple[str, ...], torch.Tensor, tuple[str, ...], bool]:
        if isinstance(route, str):
            route = {route: 1.0}
        if not isinstance(route, Mapping):
            return route.experts, route.weights, route.groups, route.residual
        mixture = {name: float(weight) for name, weight in route.items() if name != BASE_LABEL}
        for name in mixture:
            if name != self.classifier:
                self.check_expert(name)
        return tuple(mixture), torch.tensor([list(mixture.values())]), (), True

    @contextmanager
    def base_only(self) -> Iterator[PreTrainedModel]:
        """Compute with the base model's own weights, in this thread; the active adapter is not touched."""
        with self.routed(BASE_LABEL):
            yield self.base_model

    def matrix_groups(self) -> tuple[str, ...]:
        """The names of all adapted matrices: groups for mixture weights of each matrix."""
        if not isinstance(self.model, PeftModel):
            return ()
        layers = [module for module in self.base_model.modules() if isinstance(module, SVFLayer)]
        return tuple(dict.fromkeys(layer.svf_name for layer in layers))

    def layer_groups(self) -> tuple[str, ...]:
        """The layers of the model, like "model.layers.3", and the names of adapted matrices outside of them."""
        matches = [(_LAYER.match(name), name) for name in self.matrix_groups()]
        return tuple(dict.fromkeys(match[0] if match else name for match, name in matches))

    @classmethod
    def from_pretrained(
        cls, folder_or_id: str | Path, *, revision: str | None = None, token: str | None = None, **model_kwargs: Any
    ) -> ExpertBank:
        """
        Load a bank; a local folder is loaded without any request to the Hub if it holds its base model.

        Args:
            folder_or_id (`str` or `Path`): a folder written by `save_pretrained`, or a Hub id.
            revision (`str`, *optional*): branch, tag or commit of the bank, for a Hub id.
            token (`str`, *optional*): Hub token.
            model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` for the base model (dtype, device_map, ...).

        Raises:
            ExpertBankError: the folder is missing, is no bank, has no experts or a broken config.json, an expert is
                missing, is not SVF, or was trained on another base model.
        """
        folder = _local_folder(folder_or_id, revision, token)
        config = read_bank_config(folder)
        base = _resolve_base(folder, config["base_model_name_or_path"])
        hub = {} if Path(base).is_dir() else {"revision": config.get("base_revision"), "token": token}
        try:
            model = AutoModelForCausalLM.from_pretrained(base, **hub, **model_kwargs)
            tokenizer = AutoTokenizer.from_pretrained(base, **hub)
        except (OSError, SafetensorError) as error:
            raise ExpertBankError(f"The bank {folder} cannot load its base model {base!r}: {error}") from error
        for name in config["experts"]:
            model = _load_expert(model, folder, name)
        experts = {
            name: ExpertEntry(entry["label"], entry.get("description", ""))
            for name, entry in config["experts"].items()
        }
        return cls(model, tokenizer, experts, config.get("instruction"), config.get("base_revision"))

    def save_pretrained(self, folder: str | Path, include_base: bool = False) -> Path:
        """
        Write the bank as a folder that `ExpertBank.from_pretrained` and `pipeline("transformer2-generation")` load.

        The folder appears at once and complete: everything is written to a sibling folder first. An existing bank is
        replaced; any other folder with content is refused.

        Args:
            folder (`str` or `Path`): where to write.
            include_base (`bool`, *optional*, defaults to `False`):
                Also write base model and tokenizer (`<folder>/base`). Otherwise the bank refers to the checkpoint that
                the base model was loaded from.

        Raises:
            ExpertBankError: nothing to save, a merged expert, or a base model without a checkpoint to refer to.
        """
        target = Path(folder).absolute()
        if not self.experts:
            raise ExpertBankError("The bank has no experts to save; add an SVF adapter to its model first.")
        if self.model.get_model_status().merged_adapters:
            raise ExpertBankError("An expert is merged into the base model; call unmerge_adapter() before saving.")
        check_replaceable(target)
        base = BASE_FOLDER if include_base else self._base_reference(target)
        with replaced_folder(target) as staging:
            for name in self.experts:
                self._save_expert(staging, name, base)
            if include_base:
                self._save_base(staging / BASE_FOLDER)
            config = {
                "model_type": MODEL_TYPE,
                "architectures": ["Transformer2ForCausalLM"],
                "base_model_name_or_path": base,
                "base_revision": None if include_base else self.base_revision,
                "experts": {
                    name: {"label": entry.label, "description": entry.description}
                    for name, entry in self.experts.items()
                },
                "instruction": self.instruction,
            }
            (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            make_readable(staging)
        return target

    def _base_reference(self, target: Path) -> str:
        base = str(self.base_model.config._name_or_path)
        remedy = "pass include_base=True to store the base model in the bank."
        if not base:
            raise ExpertBankError(f"The base model was not loaded from a checkpoint; {remedy}")
        path = Path(base).absolute()
        if path.is_relative_to(target):
            raise ExpertBankError(f"The base model lies inside {target}, which would be replaced; {remedy}")
        return str(path) if path.is_dir() else base

    def _save_expert(self, staging: Path, name: str, base: str) -> None:
        # PEFT writes the adapter "default" at the root of the folder it is given and every other in a subfolder
        root = staging / name if name == "default" else staging
        self.model.save_pretrained(root, selected_adapters=[name], save_embedding_layers=False)
        (root / "README.md").unlink()  # PEFT's stock card
        path = staging / name / "adapter_config.json"
        config = json.loads(path.read_text("utf-8"))
        config["base_model_name_or_path"] = base
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

    def _save_base(self, folder: Path) -> None:
        """Write the base checkpoint with the parameter names it had before the adapters were injected."""
        model = self.base_model
        state = {}
        for key, tensor in model.state_dict().items():
            if ".svf_" not in key:
                state[key.replace(".base_layer.", ".")] = tensor
        model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def check_replaceable(folder: Path) -> None:
    """Raise an `ExpertBankError` if a bank saved to `folder` would replace something that is not a bank."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_bank(folder))):
        raise ExpertBankError(f"{folder} exists and is not a bank; choose a new folder.")


def read_bank_config(folder: Path) -> dict[str, Any]:
    """Read and check `<folder>/config.json`; raises `ExpertBankError` that names the file and the fault."""
    path = folder / "config.json"
    if not path.is_file():
        raise ExpertBankError(f"{folder} is not a bank: it has no config.json. Write one with save_pretrained.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ExpertBankError(f"{path} is not valid JSON ({error}); save the bank again.") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise ExpertBankError(f'{folder} is not a bank: config.json does not say "model_type": "{MODEL_TYPE}".')
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ExpertBankError(f"{path} has no base_model_name_or_path (a string).")
    experts = config.get("experts")
    if not isinstance(experts, dict) or not experts:
        raise ExpertBankError(f"{path} names no experts; a bank has at least one.")
    for name, entry in experts.items():
        values = [entry.get("label"), entry.get("description", "")] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise ExpertBankError(f"{path}: expert '{name}' needs a label and may have a description (both strings).")
    if not isinstance(config.get("instruction"), str | None):
        raise ExpertBankError(f"{path}: instruction must be a string or null.")
    _check_entries({name: ExpertEntry(entry["label"]) for name, entry in experts.items()})
    return config


def _check_entries(experts: Mapping[str, ExpertEntry]) -> None:
    labels = [entry.label for entry in experts.values()]
    for name, entry in experts.items():
        if not _NAME.fullmatch(name) or name in (BASE_LABEL, BASE_FOLDER):
            raise ExpertBankError(
                f"'{name}' cannot name an expert: use letters, digits, _ and -, and neither '{BASE_LABEL}' nor "
                f"'{BASE_FOLDER}', which mean the base model."
            )
        if not entry.label.strip() or entry.label == BASE_LABEL or labels.count(entry.label) > 1:
            raise ExpertBankError(
                f"Expert '{name}' has the label '{entry.label}'; a label is unique, not empty and not '{BASE_LABEL}'."
            )


def _svf_adapters(model: torch.nn.Module) -> list[str]:
    if not isinstance(model, PeftModel):
        return []
    types = {name: str(config.peft_type.value) for name, config in model.peft_config.items()}
    adapters = [name for name, kind in types.items() if kind == "SVF"]
    if not adapters:
        raise ExpertBankError(f"The PeftModel has no SVF adapter (it has {types}); train one with SVFConfig.")
    return adapters


def _tokenizer_of(model: PeftModel | PreTrainedModel) -> PreTrainedTokenizerBase:
    base = str(model.config._name_or_path)
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ExpertBankError(f"No tokenizer found with the base model ({base!r}); pass tokenizer=...") from error


def _is_bank(folder: Path) -> bool:
    try:
        read_bank_config(folder)
    except ExpertBankError:
        return False
    return True


def _local_folder(folder_or_id: str | Path, revision: str | None, token: str | None) -> Path:
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder.absolute()
    if isinstance(folder_or_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_id):
        raise ExpertBankError(f"There is no bank folder {folder_or_id} (and it is no Hub id, user/name).")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickles, no code
    try:
        return Path(snapshot_download(folder_or_id, revision=revision, token=token, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        message = f"{folder_or_id} is neither a folder here nor a bank that can be downloaded: {error}"
        raise ExpertBankError(message) from error


def _resolve_base(folder: Path, base: str) -> str:
    """A base inside the bank folder (relative path) wins over a Hub id."""
    inside = (folder / base).resolve()
    return str(inside) if inside.is_dir() and inside.is_relative_to(folder.resolve()) else base


def _load_expert(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    path = folder / name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / file).is_file():
            raise ExpertBankError(f"The bank {folder} is incomplete: {name}/{file} is missing; save the bank again.")
    try:
        kind = json.loads((path / "adapter_config.json").read_text("utf-8"))["peft_type"]
        if kind != "SVF":
            raise ExpertBankError(
                f"Expert '{name}' of the bank {folder} is of type {kind}; a bank holds SVF adapters."
            )
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(path), adapter_name=name, is_trainable=False)
        model.load_adapter(str(path), adapter_name=name, is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ExpertBankError(f"Expert '{name}' of the bank {folder} cannot be loaded: {error}") from error
    return model
