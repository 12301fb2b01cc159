"""transformers pipelines that adapt themselves to each prompt."""

from peft_svf.pipelines.text_generation import Transformer2Pipeline


__all__ = ["Transformer2Pipeline"]
