"""transformers pipelines that adapt themselves to each prompt."""

from peft_svf.pipelines.image_text_to_text import Transformer2ImageTextToTextPipeline
from peft_svf.pipelines.text_generation import Transformer2Pipeline


__all__ = ["Transformer2ImageTextToTextPipeline", "Transformer2Pipeline"]
