"""ExpertBank: named experts on one base model, with the labels and descriptions that a dispatcher needs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from peft_svf.experts.bank_config import (
    BASE_LABEL,
    BankConfig,
    ExpertBankError,
    ExpertEntry,
    check_entries,
)
from peft_svf.experts.bank_loading import (
    adapter_types,
    bank_folder,
    expert_folder,
    load_base,
    load_expert,
    processing_of,
    svf_adapters,
)
from peft_svf.experts.bank_saving import save_bank
from peft_svf.experts.route_weights import RouteWeights
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


__all__ = ["BASE_LABEL", "ExpertBank", "ExpertBankError", "ExpertEntry"]

_LAYER = re.compile(r".*?\.\d+(?=\.)")  # of a module's name, up to the number of its layer


class ExpertBank:
    """
    Named experts (PEFT adapters of type SVF) on one base model.

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

    Raises:
        ExpertBankError: no SVF adapter, an unknown adapter, or a name or label that is reserved or used twice.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        experts: Mapping[str, ExpertEntry] | None = None,
        instruction: str | None = None,
        base_revision: str | None = None,
        classifier: str | None = None,
        dispatcher_options: Mapping[str, Any] | None = None,
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
        for name in [*self.experts, *([] if classifier is None else [classifier])]:
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
        neither the active adapter nor anything else of the model is changed. A thread that is started inside does not
        inherit it, so where `generate` runs in one to feed a streamer, enter the route there. Mixtures are exact.

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
            if not hasattr(route, "weights"):
                raise ValueError(f"A route is a Route, an expert's name or a mixture by expert, not {route!r}.")
            return route.experts, route.weights, route.groups, route.residual
        mixture = {name: float(weight) for name, weight in route.items() if name != BASE_LABEL}
        for name in mixture:
            if name != self.classifier:
                self.check_expert(name)
        return tuple(mixture), torch.tensor([list(mixture.values())]), (), True

    def row_groups(self, route: RouteWeights) -> list[list[int]]:
        """
        The rows of a route that `routed` takes in one batch.

        All of them, or those of equal weights, if the route changes modules that cannot tell rows apart (vision
        towers, the experts of a mixture-of-experts model).
        """
        batch = MixedBatch(*self._weights(route))
        layers = (module for module in self.base_model.modules() if isinstance(module, SVFLayer))
        if batch.is_uniform or all(layer.svf_sees_rows or not batch.changes(layer) for layer in layers):
            return [list(range(batch.rows))]
        return batch.equal_rows()

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
            model_kwargs: passed to the `from_pretrained` of the base model (dtype, device_map, ...).

        Raises:
            ExpertBankError: the folder is missing, is no bank, has no experts or a broken config.json, an expert is
                missing, is not SVF, or was trained on another base model.
        """
        folder = bank_folder(folder_or_id, revision, token)
        config = BankConfig.read(folder)
        model, processing = load_base(folder, config, token, model_kwargs)
        for name in config.adapters:
            model = load_expert(model, folder / name, name, f"the bank {folder}")
        return cls(
            model,
            processing,
            config.experts,
            config.instruction,
            config.base_revision,
            config.classifier,
            config.dispatcher,
        )

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

    def add(
        self,
        name: str,
        source: str | Path | None = None,
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
            source (`str` or `Path`, *optional*):
                Folder or Hub id of a saved SVF adapter. By default the adapter called `name` that is in the model
                already.
            label (`str`, *optional*, defaults to `name`): the word that the dispatcher scores.
            description (`str`, *optional*): which prompts it is for, one line.
            revision, token (`str`, *optional*): for a Hub id.

        Raises:
            ExpertBankError: the name or label is reserved or taken, an expert is merged, there is no such adapter, it
                is damaged, not SVF, or was trained on another base model.
        """
        if name in self.experts or name == self.classifier:
            raise ExpertBankError(f"The bank has '{name}' already; remove it first, or choose another name.")
        experts = {**self.experts, name: ExpertEntry(name if label is None else label, description)}
        check_entries(experts, self.classifier)
        self._load(name, source, revision, token)
        self.experts = experts

    def add_classifier(
        self,
        name: str,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Add the adapter that classifies prompts; arguments and errors as for [`~ExpertBank.add`]."""
        if self.classifier is not None:
            raise ExpertBankError(f"The bank has a classifier, '{self.classifier}'; remove it first.")
        check_entries(self.experts, name)
        self._load(name, source, revision, token)
        self.classifier = name

    def remove(self, name: str) -> None:
        """
        Remove an expert, or the classifier, from the bank and its model; not while another thread computes with it.

        Raises:
            ExpertBankError: there is none of this name, or an expert is merged.
        """
        if name not in self.experts and name != self.classifier:
            known = ", ".join(f"'{adapter}'" for adapter in [*self.experts, self.classifier] if adapter)
            raise ExpertBankError(f"The bank has no '{name}' to remove; it has {known or 'no experts'}.")
        self._refuse_merged()
        if len(self.model.peft_config) == 1:
            self.model = self.model.unload()  # no PeftModel computes without an adapter
        else:
            flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT: another adapter is active now
                self.model.delete_adapter(name)
            for parameter, flag in flags:  # PEFT makes that one trainable
                parameter.requires_grad_(flag)
        if name == self.classifier:
            self.classifier = None
        self.experts = {expert: entry for expert, entry in self.experts.items() if expert != name}

    def _load(self, name: str, source: str | Path | None, revision: str | None, token: str | None) -> None:
        """Put the adapter `name` into the model, or make sure that it is there."""
        self._refuse_merged()
        adapters = adapter_types(self.model)
        if source is None:
            if adapters.get(name) != "SVF":
                raise ExpertBankError(
                    f"'{name}' is no SVF adapter of the model, which has {adapters or 'none'}; pass its folder or "
                    "Hub id."
                )
            return
        if name in adapters:
            raise ExpertBankError(
                f"The model has an adapter '{name}' already: call add('{name}') without a source to use it, or "
                "choose another name."
            )
        folder = expert_folder(source, revision, token)
        self.model = load_expert(self.model, folder, name, f"the folder {folder}").eval()

    def _refuse_merged(self) -> None:
        merged = self.model.get_model_status().merged_adapters if isinstance(self.model, PeftModel) else []
        if merged:
            raise ExpertBankError(
                f"{', '.join(merged)} is merged into the base model; call bank.model.unmerge_adapter() first."
            )
