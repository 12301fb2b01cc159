"""ExpertBank: named experts on one base model, with the labels and descriptions that a dispatcher needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from peft_svf.experts.bank_changes import BankChanges
from peft_svf.experts.bank_config import BASE_LABEL, BankConfig, ExpertBankError, ExpertEntry, check_entries
from peft_svf.experts.bank_loading import bank_folder, load_base, load_expert, processing_of, svf_adapters
from peft_svf.experts.bank_routing import BankRouting
from peft_svf.experts.bank_saving import save_bank
from peft_svf.experts.expert import Expert
from peft_svf.experts.live_facts import facts_of


if TYPE_CHECKING:
    from peft_svf.hub.destination import Pushed

__all__ = ["BASE_LABEL", "ExpertBank", "ExpertBankError", "ExpertEntry"]


class ExpertBank(BankRouting, BankChanges):
    """
    Named experts (PEFT adapters of type SVF) on one base model. `len(bank)` counts them, `"math" in bank` finds one.

    Args:
        model (`PeftModel` or `PreTrainedModel`):
            The base model with its experts as adapters; switched to eval mode. A plain model is a bank without
            experts: every prompt gets the base model.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The tokenizer, or the processor of a vision-language model; by default that of the base model's checkpoint.
        experts (`Mapping[str, ExpertEntry]`, *optional*):
            Adapter name to entry. By default every SVF adapter is an expert whose label is its name.
        instruction (`str`, *optional*):
            The instruction of the prompt dispatcher; by default one is written from the labels and descriptions.
        base_revision (`str`, *optional*): Hub revision of the base model, stored with the bank.
        classifier (`str`, *optional*):
            The adapter that classifies prompts (strategy B of Transformer²). It answers none, so it is no expert.
        dispatcher_options (`Mapping[str, Any]`, *optional*): how a pipeline that was saved as this bank chose experts.
        facts (`Mapping[str, Mapping[str, Any]]`, *optional*):
            What is known of each expert, by name: the content of its `expert.json`. Defaults to what the model knows.

    Raises:
        ExpertBankError: no SVF adapter, an unknown adapter, or a name or label that is reserved or used twice.
    """

    commit: str | None = None
    """The commit that a bank from the Hub was loaded from."""

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        experts: Mapping[str, ExpertEntry] | None = None,
        instruction: str | None = None,
        base_revision: str | None = None,
        classifier: str | None = None,
        dispatcher_options: Mapping[str, Any] | None = None,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        given: Any = model  # or mypy, for which a PeftModel is anything, takes the model for a plain module below
        if not isinstance(given, torch.nn.Module):
            raise ExpertBankError(
                f"A bank is made of a model, not of {model!r}; ExpertBank.from_pretrained loads a folder or Hub id."
            )
        adapters = svf_adapters(model)
        if experts is None:
            experts = {name: ExpertEntry(name) for name in adapters if name != classifier}
        self.experts = dict(experts)
        self.classifier = classifier
        check_entries(self.experts, classifier)
        names = [*self.experts, *([] if classifier is None else [classifier])]
        for name in names:
            if name not in adapters:
                raise ExpertBankError(f"Expert '{name}' is no SVF adapter of the model, which has {adapters}.")
        self.model = model.eval()  # PEFT refuses mixed batches in training mode
        processing: Any = processing_of(model) if tokenizer is None else tokenizer
        self.processor: ProcessorMixin | None = processing if isinstance(processing, ProcessorMixin) else None
        self.tokenizer: PreTrainedTokenizerBase = processing if self.processor is None else processing.tokenizer
        if self.processor is not None and self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self.processor.chat_template  # as it is when both are loaded again
        self.instruction = instruction
        self.base_revision = base_revision
        self.dispatcher_options = dispatcher_options
        self.facts: dict[str, Mapping[str, Any]] = {
            name: facts_of(model, name) if facts is None else dict(facts.get(name, {})) for name in names
        }

    def __len__(self) -> int:
        return len(self.experts)

    def __bool__(self) -> bool:
        return True  # a bank without experts is the base model

    def __contains__(self, name: object) -> bool:
        return name in self.experts

    def __repr__(self) -> str:
        experts = [name if entry.label == name else f"{name} ({entry.label})" for name, entry in self.experts.items()]
        classifier = "" if self.classifier is None else f", classifier {self.classifier}"
        base = getattr(self.base_model.config, "_name_or_path", "") or type(self.base_model).__name__
        count = f"{len(self)} expert{'s' * (len(self) != 1)}"
        return f"ExpertBank({count} on {base!r}: {', '.join(experts) or 'none'}{classifier})"

    def expert(self, name: str) -> Expert:
        """
        An expert, or the classifier, as an object that can be mixed, saved and shared without the bank.

        Its metadata are its facts, with the label and description that it has here.

        Raises:
            ExpertBankError: there is none of this name.
        """
        self._check_known(name, "give")
        entry = self.experts.get(name)
        own = {} if entry is None else {"label": entry.label}
        if entry is not None and entry.description:
            own["description"] = entry.description
        return Expert.from_model(self.model, name, {"name": name, **self.facts.get(name, {}), **own})

    @property
    def labels(self) -> dict[str, str]:
        """Label to expert name, in the order of the bank; the base label is not among them."""
        return {entry.label: name for name, entry in self.experts.items()}

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
            model_kwargs: passed to the `from_pretrained` of the base model (dtype, device_map, ...).

        Raises:
            ExpertBankError: the folder is missing, is no bank, has no experts or a broken config.json, an expert is
                missing, is not SVF, or was trained on another base model.
        """
        folder, commit = bank_folder(folder_or_id, revision, token)
        config = BankConfig.read(folder, is_foreign=commit is not None)
        model, processing, base_revision = load_base(folder, config, token, model_kwargs)
        for name in config.adapters:
            model = load_expert(model, folder / name, name, f"the bank {folder}")
        bank = cls(
            model,
            processing,
            config.experts,
            config.instruction,
            base_revision,
            config.classifier,
            config.dispatcher,
        )
        bank.commit = commit
        return bank

    def save_pretrained(self, folder: str | Path, include_base: bool = False) -> Path:
        """
        Write the bank as a folder that `ExpertBank.from_pretrained` and `transformers.pipeline(model=folder)` load.

        The folder appears at once and complete: everything is written to a sibling folder first. An existing bank is
        replaced; any other folder with content is refused. With `trust_remote_code=True`, the pipeline also loads in a
        process that has not imported peft_svf.

        Args:
            folder (`str` or `Path`): where to write.
            include_base (`bool`, *optional*, defaults to `False`):
                Also write the base model (`<folder>/base`). Otherwise the bank refers to the checkpoint that the base
                model was loaded from.

        Raises:
            ExpertBankError: nothing to save, a merged expert, or a base model without a checkpoint to refer to.
        """
        return save_bank(self, folder, include_base)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Put the bank on the Hub, with its cards; `options` and errors as of [`~peft_svf.hub.push_bank`]."""
        from peft_svf.hub import push_bank

        return push_bank(self, repo_id, **options)
