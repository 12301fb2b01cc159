"""ClassifierDispatcher: a trained classification expert says which expert answers (Transformer², section 3.2, B)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_svf.dispatch.adapter_state import AdapterState
from peft_svf.dispatch.prompt import PromptDispatcher
from peft_svf.experts.bank import ExpertBank, ExpertBankError
from peft_svf.experts.bank_loading import load_expert
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.mixed_batch import MixedBatch


class ClassifierDispatcher(PromptDispatcher):
    """
    Routes like [`PromptDispatcher`], under an expert that was trained to classify (arXiv 2501.06252, section 3.2,
    strategy B): an SVF adapter of the bank's model that answers no prompts itself.

    Its instruction prefix has a cache of its own, which is computed anew when the values of the expert have changed:
    it may be trained or hot-swapped while the dispatcher lives, though not during a call.

    Args:
        bank (`ExpertBank`): the experts to choose from.
        classifier (`str` or `Path`, *optional*):
            The name of an SVF adapter in the bank's model, or the folder of one, which is loaded into the model.
            Defaults to the bank's classification expert, whichever that is at the time of a call.
        margin, instruction, calibrate, mode, top_k, temperature: as for [`PromptDispatcher`]. The instruction must be
            the one that the expert was trained with.

    Raises:
        ValueError: the bank has no classification expert, or there is no such adapter or folder, or it is no SVF
            adapter of this base model; an option outside its range.
    """

    def __init__(
        self,
        bank: ExpertBank,
        classifier: str | Path | None = None,
        margin: float = 0.0,
        instruction: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(bank, margin, instruction, **options)  # first: wrong options leave nothing loaded
        if not isinstance(bank.model, PeftModel):
            raise ValueError("The bank has no experts, and so no classification expert: there is nothing to choose.")
        self._given = None if classifier is None else find_classifier(bank.model, classifier)
        self._state = AdapterState(bank.model, self.classifier)

    @property
    def classifier(self) -> str:
        """The name of the classification expert in the bank's model."""
        name = self._given or self.bank.classifier
        if name is None:
            raise ValueError(
                "The bank has no classification expert; pass classifier=... (an adapter of its model, or a folder), "
                "or use PromptDispatcher(bank)."
            )
        return name

    @contextmanager
    def _weights_for_scoring(self) -> Iterator[Hashable]:
        name, state = self.classifier, self._state
        if state.adapter != name:
            state = self._state = AdapterState(self.bank.model, name)
        version = name, state.version()
        with self.bank.model.base_model.routed(MixedBatch((name,), torch.ones(1, 1), every_row=True)):
            yield version


def find_classifier(model: PeftModel, name_or_folder: str | Path) -> str:
    """
    The name of an adapter in `model`, loaded from a folder if it is one.

    Raises:
        ValueError: neither an adapter nor a folder of one; not SVF; trained on another base model. Nothing is loaded.
    """
    if isinstance(name_or_folder, str) and name_or_folder in model.peft_config:
        kind = model.peft_config[name_or_folder]
        if not isinstance(kind, SVFConfig):
            raise ValueError(
                f"The adapter '{name_or_folder}' is of type {kind.peft_type}; a classifier is of type SVF."
            )
        return name_or_folder
    path = Path(name_or_folder) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"The classifier {str(name_or_folder)!r} is neither an adapter of the model, which has "
            f"{', '.join(model.peft_config)}, nor a folder with an adapter_config.json."
        )
    return _load(model, path.parent)


def _load(model: PeftModel, folder: Path) -> str:
    names = itertools.chain(["classifier"], (f"classifier_{number}" for number in itertools.count(2)))
    name = next(free for free in names if free not in model.peft_config)
    try:
        load_expert(model, folder, name, f"the folder {folder}")
    except ExpertBankError as error:
        raise ValueError(f"There is no classifier in {folder}: {error}") from error
    return name
