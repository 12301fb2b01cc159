"""What a bank's folder says of itself: config.json, read and checked or written, and the stubs beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_svf.experts.adapter_files import read_json
from peft_svf.experts.errors import ExpertError


MODEL_TYPE = "transformer2"
BASE_LABEL = "others"  # what unsure and foreign prompts get: the base model
BASE_FOLDER = "base"
LANGUAGE, VISION_LANGUAGE = "Transformer2ForCausalLM", "Transformer2ForImageTextToText"  # architectures of config.json
_LARGEST_CONFIG = 16 * 2**20  # bytes
_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # also without an owner, like "gpt2"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # a folder name and a PyTorch module name, never a path
_PIPELINES = {
    LANGUAGE: ("transformer2-generation", "Transformer2Pipeline", "AutoModelForCausalLM", "text"),
    VISION_LANGUAGE: (
        "transformer2-image-text-to-text",
        "Transformer2ImageTextToTextPipeline",
        "AutoModelForImageTextToText",
        "multimodal",
    ),
}


class ExpertBankError(ExpertError):
    """A folder or model that cannot serve as a bank."""


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


@dataclass(frozen=True)
class BankConfig:
    """
    The config.json of a bank.

    Args:
        base_model_name_or_path (`str`): Hub id or folder of the base model; `"base"` if it is in the bank.
        experts (`Mapping[str, ExpertEntry]`): by folder name; at least one.
        base_revision (`str`, *optional*): revision of a base model on the Hub.
        instruction (`str`, *optional*): of the prompt dispatcher.
        classifier (`str`, *optional*): folder name of the adapter that classifies prompts.
        dispatcher (`Mapping[str, Any]`, *optional*): how a pipeline that was saved chose its experts.
        architecture (`str`, *optional*, defaults to `LANGUAGE`): kind of base model.
    """

    base_model_name_or_path: str
    experts: Mapping[str, ExpertEntry]
    base_revision: str | None = None
    instruction: str | None = None
    classifier: str | None = None
    dispatcher: Mapping[str, Any] | None = None
    architecture: str = LANGUAGE

    @property
    def adapters(self) -> list[str]:
        """All folders with adapters."""
        return [*self.experts, *([] if self.classifier is None else [self.classifier])]

    @classmethod
    def read(cls, folder: Path, is_foreign: bool = False) -> BankConfig:
        """
        Read and check `<folder>/config.json`.

        Args:
            folder (`Path`): The bank's.
            is_foreign (`bool`, *optional*, defaults to `False`):
                Whether it comes from the Hub; then its base model is on the Hub too, or inside the bank.

        Raises:
            ExpertBankError: It is no bank, or damaged; the message names the file and the fault.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ExpertBankError(f"{folder} is not a bank: it has no config.json. Write one with save_pretrained.")
        try:
            if path.stat().st_size > _LARGEST_CONFIG:
                raise ExpertBankError(f"{path} is larger than {_LARGEST_CONFIG:,} bytes, which no bank needs.")
            config = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ExpertBankError(f"{path} is not valid JSON ({error}); save the bank again.") from error
        if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
            cached = folder.parent.parent.name.split("--")  # a snapshot in the Hub's cache
            name = "/".join(cached[1:]) if is_foreign and cached[0] == "models" else folder
            raise ExpertBankError(f'{name} is not a bank: config.json does not say "model_type": "{MODEL_TYPE}".')
        if not isinstance(config.get("base_model_name_or_path"), str):
            raise ExpertBankError(f"{path} has no base_model_name_or_path (a string).")
        _check_base(config["base_model_name_or_path"], path, is_foreign)
        for name in ("base_revision", "instruction", "classifier"):
            if not isinstance(config.get(name), str | None):
                raise ExpertBankError(f"{path}: {name} must be a string or null.")
        if not isinstance(config.get("dispatcher"), dict | None):
            raise ExpertBankError(f"{path}: dispatcher must be an object or null.")
        architectures = config.get("architectures") or [LANGUAGE]
        if not isinstance(architectures, list) or architectures[0] not in [*_PIPELINES]:  # it may be no text
            raise ExpertBankError(f"{path}: architectures must be one of {', '.join(_PIPELINES)}.")
        experts = _read_experts(config.get("experts"), path)
        check_entries(experts, config.get("classifier"))
        given = {name: config.get(name) for name in ("base_revision", "instruction", "classifier", "dispatcher")}
        return cls(config["base_model_name_or_path"], experts, **given, architecture=architectures[0])

    def write(self, folder: Path) -> None:
        """Write config.json, and the two stubs that it names to readers which have not imported peft_svf."""
        task, pipeline, auto_model, kind = _PIPELINES[self.architecture]
        content: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "architectures": [self.architecture],
            "auto_map": {
                "AutoConfig": "modeling_transformer2.Transformer2Config",
                auto_model: f"modeling_transformer2.{self.architecture}",
            },
            "custom_pipelines": {task: {"impl": f"transformer2.{pipeline}", "pt": [auto_model], "type": kind}},
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_revision": self.base_revision,
            "experts": {name: asdict(entry) for name, entry in self.experts.items()},
            "classifier": self.classifier,
            "instruction": self.instruction,
            "dispatcher": self.dispatcher,
        }
        (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for file, names in (
            ("modeling_transformer2.py", f"{self.architecture}, Transformer2Config"),
            ("transformer2.py", pipeline),
        ):
            (folder / file).write_text(_STUB.format(names=names), "utf-8")


# transformers copies a stub into a package of its own and imports it from there: it must define and register nothing
_STUB = '''"""This folder is a bank of experts; the package peft-svf (pip install peft-svf) loads it."""

from peft_svf import {names}  # noqa: F401
'''


def check_entries(experts: Mapping[str, ExpertEntry], classifier: str | None = None) -> None:
    """Raise an `ExpertBankError` if experts cannot have these names and labels beside one another."""
    for name, entry in experts.items():
        texts = (entry.label, entry.description) if isinstance(entry, ExpertEntry) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise ExpertBankError(
                f"Expert '{name}' needs ExpertEntry(label, description), both texts; it has {entry!r}."
            )
    labels = [entry.label for entry in experts.values()]
    for name in [*experts, *([] if classifier is None else [classifier])]:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (BASE_LABEL, BASE_FOLDER):
            raise ExpertBankError(
                f"'{name}' cannot name an expert: use letters, digits, _ and -, and neither '{BASE_LABEL}' nor "
                f"'{BASE_FOLDER}', which mean the base model."
            )
    if classifier in experts:
        raise ExpertBankError(f"'{classifier}' is the classifier and an expert; one adapter cannot be both.")
    for name, entry in experts.items():
        if not entry.label.strip() or entry.label == BASE_LABEL or labels.count(entry.label) > 1:
            raise ExpertBankError(
                f"Expert '{name}' has the label '{entry.label}'; a label is unique, not empty and not '{BASE_LABEL}'."
            )


def is_bank(folder: Path, where: str) -> bool:
    """Whether the config.json in a folder says that it is a bank's; an `ExpertError` if that file is damaged."""
    path = folder / "config.json"
    return path.is_file() and read_json(path, where, _LARGEST_CONFIG).get("model_type") == MODEL_TYPE


def check_replaceable(folder: Path) -> None:
    """Raise an `ExpertBankError` if a bank saved to `folder` would replace something that is not a bank."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_whole(folder))):
        raise ExpertBankError(f"{folder} exists and is not a bank; choose a new folder.")


def _check_base(name: str, path: Path, is_foreign: bool) -> None:
    """A base model is in the bank, on the Hub or, in a bank that was made here, in a folder with its whole path."""
    if name == BASE_FOLDER or _MODEL_ID.fullmatch(name) or (Path(name).is_absolute() and not is_foreign):
        return
    if is_foreign and not _leads_up(name):
        raise ExpertBankError(
            f"{path.parent} has its base model in {name!r}, a folder of the computer that it was made on. Ask for it "
            "to be pushed with push_bank, which names a model on the Hub or includes it."
        )
    raise ExpertBankError(f"{path}: base_model_name_or_path {name!r} is neither a Hub id nor '{BASE_FOLDER}'.")


def _leads_up(name: str) -> bool:
    return ".." in name.replace("\\", "/").split("/")


def _read_experts(experts: Any, path: Path) -> dict[str, ExpertEntry]:
    if not isinstance(experts, dict) or not experts:
        raise ExpertBankError(f"{path} names no experts; a bank has at least one.")
    for name, entry in experts.items():
        values = [entry.get("label"), entry.get("description", "")] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise ExpertBankError(f"{path}: expert '{name}' needs a label and may have a description (both strings).")
    return {name: ExpertEntry(entry["label"], entry.get("description", "")) for name, entry in experts.items()}


def _is_whole(folder: Path) -> bool:
    try:
        BankConfig.read(folder)
    except ExpertBankError:
        return False
    return True
