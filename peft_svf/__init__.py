"""Transformer² (arXiv 2501.06252) for the Hugging Face ecosystem. Importing it makes SVF a PEFT method."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peft_svf.dispatch import ClassifierDispatcher, PromptDispatcher, Route
from peft_svf.experts import Expert, ExpertBank, ExpertEntry
from peft_svf.experts.auto import Transformer2Config, Transformer2ForCausalLM, Transformer2ForImageTextToText
from peft_svf.pipelines import Transformer2ImageTextToTextPipeline, Transformer2Pipeline
from peft_svf.registration import register_auto_classes, register_pipelines, register_push, register_tuner
from peft_svf.tuner import SVFConfig, SVFModel


if TYPE_CHECKING:
    from peft_svf.dispatch.few_shot import FewShotDispatcher
    from peft_svf.hub import push_bank, push_expert

# Saved banks import the names with Transformer2 from here: they must stay
__all__ = [
    "ClassifierDispatcher",
    "Expert",
    "ExpertBank",
    "ExpertEntry",
    "FewShotDispatcher",
    "PromptDispatcher",
    "Route",
    "SVFConfig",
    "SVFModel",
    "Transformer2Config",
    "Transformer2ForCausalLM",
    "Transformer2ForImageTextToText",
    "Transformer2ImageTextToTextPipeline",
    "Transformer2Pipeline",
    "__version__",
    "push_bank",
    "push_expert",
]

_LATER = {
    "FewShotDispatcher": "peft_svf.dispatch.few_shot",  # needs datasets, which takes seconds to import
    "push_bank": "peft_svf.hub",
    "push_expert": "peft_svf.hub",
}

__version__ = version("peft-svf")

register_tuner()
register_auto_classes()
register_pipelines()
register_push()


def __getattr__(name: str) -> Any:
    """What takes long to import, or few programs need, comes when it is asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
