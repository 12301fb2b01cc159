"""How a bank changes: experts added, removed, renamed and described while it is in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_svf.experts.adapter_files import read_facts
from peft_svf.experts.bank_adapters import remove_adapter, rename_adapter
from peft_svf.experts.bank_config import ExpertBankError, ExpertEntry, check_entries
from peft_svf.experts.bank_loading import adapter_types, expert_folder, load_expert
from peft_svf.experts.expert import Expert
from peft_svf.experts.live_facts import facts_of


class BankChanges:
    """The part of [`~peft_svf.experts.bank.ExpertBank`] that lets experts come and go."""

    model: Any  # PeftModel or PreTrainedModel
    experts: dict[str, ExpertEntry]
    classifier: str | None
    facts: dict[str, Mapping[str, Any]]

    def add(
        self,
        name: str,
        source: str | Path | Expert | None = None,
        label: str | None = None,
        description: str = "",
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """
        Add an expert; dispatchers and pipelines of this bank know it from their next call on.

        Not while another thread computes with the bank. On an error, the bank is as it was.

        Args:
            name (`str`): of the expert, and of its folder when the bank is saved.
            source (`str`, `Path` or [`Expert`], *optional*):
                Folder or Hub id of a saved SVF adapter, or an expert. By default the adapter called `name` that is in
                the model already.
            label (`str`, *optional*):
                The word that the dispatcher scores. Defaults to what the expert's facts say, else to `name`.
            description (`str`, *optional*): Which prompts it is for, one line. Defaults to what its facts say.
            revision, token (`str`, *optional*): for a Hub id.

        Raises:
            ExpertBankError: the name or label is reserved or taken, an expert is merged, there is no such adapter, it
                is damaged, not SVF, or was trained on another base model.
        """
        if name in self.experts or name == self.classifier:
            raise ExpertBankError(f"The bank has '{name}' already; remove it first, or choose another name.")
        check_entries({name: ExpertEntry(name if label is None else label, description)}, self.classifier)
        self._check_room(name, source is not None)
        place, facts = (None, facts_of(self.model, name)) if source is None else _found(source, revision, token)
        experts = {**self.experts, name: entry_of(name, label, description, facts)}
        check_entries(experts, self.classifier)
        self._load(name, place)
        self.facts = {**self.facts, name: facts}
        self.experts = experts

    def add_classifier(
        self,
        name: str,
        source: str | Path | Expert | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Add the adapter that classifies prompts; arguments and errors as for [`~ExpertBank.add`]."""
        if self.classifier is not None:
            raise ExpertBankError(f"The bank has a classifier, '{self.classifier}'; remove it first.")
        check_entries(self.experts, name)
        self._check_room(name, source is not None)
        place, facts = (None, facts_of(self.model, name)) if source is None else _found(source, revision, token)
        self._load(name, place)
        self.facts = {**self.facts, name: facts}
        self.classifier = name

    def rename(self, name: str, new_name: str, label: str | None = None) -> None:
        """
        Rename an expert, or the classifier; dispatchers and pipelines of this bank know it from their next call on.

        Not while another thread computes with the bank, or an optimizer trains it: the offsets are in new tensors
        afterwards. Routes that were made before name the old one. On an error, the bank is as it was.

        Args:
            name (`str`): The expert.
            new_name (`str`): Its name, and that of its folder when the bank is saved, from now on.
            label (`str`, *optional*): A new label; it keeps the one that it has if not given.

        Raises:
            ExpertBankError: there is none of this name, or the new name or label is reserved or taken, or an expert is
                merged.
        """
        self._check_known(name, "rename")
        if name == new_name and name in self.experts:
            self.describe(name, label)
            return
        if new_name in self.experts or new_name == self.classifier:
            raise ExpertBankError(f"The bank has '{new_name}' already; remove it first, or choose another name.")
        classifier = new_name if name == self.classifier else self.classifier
        if name == self.classifier and label is not None:
            raise ExpertBankError(f"'{name}' is the classifier, which has no label.")
        experts = renamed_entries(self.experts, name, new_name, label)
        check_entries(experts, classifier)
        self._check_room(new_name, True)
        rename_adapter(self.model, name, new_name)
        self.facts = {new_name if expert == name else expert: facts for expert, facts in self.facts.items()}
        self.classifier = classifier
        self.experts = experts

    def describe(self, name: str, label: str | None = None, description: str | None = None) -> None:
        """
        Give an expert another label or description, or both; what is not given stays.

        Raises:
            ExpertBankError: there is no expert of this name, or the label is reserved or taken.
        """
        if name not in self.experts:
            self._check_known(name, "describe")
            raise ExpertBankError(f"'{name}' is the classifier, which has no label.")
        given = {key: value for key, value in (("label", label), ("description", description)) if value is not None}
        experts = {**self.experts, name: replace(self.experts[name], **given)}
        check_entries(experts, self.classifier)
        self.experts = experts

    def remove(self, name: str) -> None:
        """
        Remove an expert, or the classifier, from the bank and its model; not while another thread computes with it.

        Raises:
            ExpertBankError: there is none of this name, or an expert is merged.
        """
        self._check_known(name, "remove")
        self._refuse_merged()
        self.model = remove_adapter(self.model, name)
        if name == self.classifier:
            self.classifier = None
        self.facts = {expert: facts for expert, facts in self.facts.items() if expert != name}
        self.experts = {expert: entry for expert, entry in self.experts.items() if expert != name}

    def _check_known(self, name: str, action: str) -> None:
        if name not in self.experts and (name != self.classifier or name is None):
            known = ", ".join(f"'{adapter}'" for adapter in [*self.experts, self.classifier] if adapter)
            raise ExpertBankError(f"The bank has no '{name}' to {action}; it has {known or 'no experts'}.")

    def _check_room(self, name: str, is_new: bool) -> None:
        """Raise an `ExpertBankError` unless the model can take a new adapter `name`, or has it already."""
        self._refuse_merged()
        adapters = adapter_types(self.model)
        if is_new and name in adapters:
            raise ExpertBankError(
                f"The model has an adapter '{name}' already: call add('{name}') without a source to use it, or "
                "choose another name."
            )
        if not is_new and adapters.get(name) != "SVF":
            raise ExpertBankError(
                f"'{name}' is no SVF adapter of the model, which has {adapters or 'none'}; pass its folder or Hub id."
            )

    def _load(self, name: str, place: Path | Expert | None) -> None:
        if isinstance(place, Expert):
            self.model = place.put_into(self.model, name).eval()
        elif place is not None:
            self.model = load_expert(self.model, place, name, f"the folder {place}").eval()

    def _refuse_merged(self) -> None:
        merged = self.model.get_model_status().merged_adapters if isinstance(self.model, PeftModel) else []
        if merged:
            raise ExpertBankError(
                f"{', '.join(merged)} is merged into the base model; call bank.model.unmerge_adapter() first."
            )


def _found(
    source: str | Path | Expert, revision: str | None, token: str | None
) -> tuple[Path | Expert, dict[str, Any]]:
    """The folder of an expert, or the expert itself, and its facts."""
    if isinstance(source, Expert):
        return source, dict(source.metadata)
    folder = expert_folder(source, revision, token)
    return folder, read_facts(folder, f"the expert {source}")


def entry_of(name: str, label: str | None, description: str, facts: Mapping[str, Any]) -> ExpertEntry:
    """The entry of a new expert: what is given, else what its facts say, else its name."""
    known = {key: value for key in ("label", "description") if isinstance(value := facts.get(key), str)}
    default = known.get("label", "").strip() or name
    return ExpertEntry(default if label is None else label, description or known.get("description", ""))


def renamed_entries(
    experts: Mapping[str, ExpertEntry], name: str, new_name: str, label: str | None
) -> dict[str, ExpertEntry]:
    """The entries of a bank in their order, one of them under another name and, if one is given, another label."""
    entries = dict(experts)
    if name in entries and label is not None:
        entries[name] = replace(entries[name], label=label)
    return {new_name if expert == name else expert: entry for expert, entry in entries.items()}
