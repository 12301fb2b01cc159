"""Transformer² (arXiv 2501.06252) for the Hugging Face ecosystem. Importing it makes SVF a PEFT method."""

from __future__ import annotations

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
]

__version__ = version("peft-svf")

register_tuner()
register_auto_classes()
register_pipelines()
register_push()


def __getattr__(name: str) -> Any:
    """`FewShotDispatcher` comes when it is asked for: it needs datasets, which takes seconds to import."""
    if name == "FewShotDispatcher":
        from peft_svf.dispatch.few_shot import FewShotDispatcher

        return FewShotDispatcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
