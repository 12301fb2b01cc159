"""The bank as a checkpoint that transformers' Auto classes load (model type "transformer2")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig

from peft_svf.experts.bank import ExpertBank
from peft_svf.experts.bank_config import MODEL_TYPE


_ABOUT_THE_BANK = (  # not about the base model
    "config",
    "trust_remote_code",
    "code_revision",
    "adapter_kwargs",
    "_commit_hash",
    "_from_pipeline",
    "_from_auto",
)


class Transformer2Config(PreTrainedConfig):
    """A bank's config.json as transformers reads it: base_model_name_or_path, base_revision, experts, instruction."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        pipelines = _TaskNames(config_dict.get("custom_pipelines", {}))
        return super().from_dict({**config_dict, "custom_pipelines": pipelines}, **kwargs)


class _TaskNames(dict):
    """
    The `custom_pipelines` of a bank, for a process in which its pipelines are registered.

    `pipeline()` reads the task from the keys, if none was given. Then it asks whether the task is among them, and if
    so wants `trust_remote_code=True` and takes the pipeline from the code in the folder. Here the answer is no.
    """

    def __contains__(self, task: object) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> _TaskNames:
        return _TaskNames(self)


class Transformer2ForCausalLM:
    """What `AutoModelForCausalLM.from_pretrained(<bank>)` resolves to: loads the bank and returns its PeftModel."""

    config_class = Transformer2Config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> PeftModel:
        """
        Load a bank; `expert_bank` on the returned `PeftModel` is the `ExpertBank`.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): the bank's folder or Hub id.
            kwargs: revision and token of the bank; the rest goes to the base model's `from_pretrained`.

        Raises:
            ExpertBankError: see [`ExpertBank.from_pretrained`].
        """
        for name in _ABOUT_THE_BANK:
            kwargs.pop(name, None)
        revision = kwargs.pop("revision", None)
        revision = None if revision is None else str(getattr(revision, "resolved", revision))
        bank = ExpertBank.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        bank.model.expert_bank = bank
        return bank.model


class Transformer2ForImageTextToText(Transformer2ForCausalLM):
    """The same for banks of vision-language models and `AutoModelForImageTextToText`."""
