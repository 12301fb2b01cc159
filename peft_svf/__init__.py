"""Transformer² (arXiv 2501.06252) for the Hugging Face ecosystem. Importing it makes SVF a PEFT method."""

from __future__ import annotations

from importlib.metadata import version

from peft_svf.dispatch import PromptDispatcher
from peft_svf.experts import ExpertBank
from peft_svf.experts.auto import Transformer2Config, Transformer2ForCausalLM, Transformer2ForImageTextToText
from peft_svf.pipelines import Transformer2ImageTextToTextPipeline, Transformer2Pipeline
from peft_svf.registration import register_auto_classes, register_pipelines, register_tuner
from peft_svf.tuner import SVFConfig, SVFModel


# Saved banks import the names with Transformer2 from here: they must stay
__all__ = [
    "ExpertBank",
    "PromptDispatcher",
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
