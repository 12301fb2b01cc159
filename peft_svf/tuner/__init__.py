"""Singular value fine-tuning as PEFT sees it: configuration, layer and model."""

from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.hotswap import hotswap_adapter
from peft_svf.tuner.layer import Linear, SVFLayer
from peft_svf.tuner.model import SVFModel


__all__ = ["Linear", "SVFConfig", "SVFLayer", "SVFModel", "hotswap_adapter"]
