"""Loading what the commands work with: base models, in any precision, and their tokenizers or processors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, ProcessorMixin

from peft_svf.answering import Processor, image_column


@dataclass(frozen=True)
class BaseModel:
    """
    Which base model, and how to load it.

    Args:
        name (`str`): A folder, or an id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`): Name of a dtype; `"auto"` is that of the checkpoint.
        load_in_4bit, load_in_8bit (`bool`, *optional*, defaults to `False`): Quantize with bitsandbytes.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the checkpoint.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    trust_remote_code: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantized on loading."""
        return self.load_in_4bit or self.load_in_8bit

    def check(self) -> None:
        """Raise a `ValueError` if a package is missing, or if there is no such model."""
        if self.is_quantized and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "loading in 4 or 8 bits needs bitsandbytes, which is not installed: pip install "
                "'peft-svf[quantization]'"
            )
        try:
            self._config()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"there is no base model {self.name!r}: it is no folder with a checkpoint here, and did not come from "
                f"the Hub ({' '.join(str(error).split())})"
            ) from error

    def check_layers(self, layers: Sequence[int] | None) -> None:
        """Raise a `ValueError` for the index of a layer that the model does not have, which PEFT would ignore."""
        count = getattr(self._config().get_text_config(), "num_hidden_layers", None)
        if layers and count is not None and (wrong := [i for i in layers if not 0 <= i < count]):
            raise ValueError(f"--layers: the model has no layer {wrong[0]}; its layers are 0 to {count - 1}")

    def load(self) -> Any:
        """The model: a causal language model, or the vision-language model that the checkpoint is."""
        architecture = getattr(transformers, (self._config().architectures or [""])[0], None)
        generates = architecture is not None and callable(getattr(architecture, "generate", None))
        loader: Any = architecture if generates else AutoModelForCausalLM
        options = self._quantization() if self.is_quantized else {}
        return loader.from_pretrained(self.name, dtype=self.dtype, **self._origin(), **options)

    def load_processor(self) -> Processor:
        """The checkpoint's processor, or its tokenizer if it has no processor."""
        return AutoProcessor.from_pretrained(self.name, padding_side="left", truncation_side="left", **self._origin())

    def _config(self) -> Any:
        return AutoConfig.from_pretrained(self.name, **self._origin())

    def _origin(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _quantization(self) -> dict[str, Any]:
        compute = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
        config = BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        return {"quantization_config": config, "device_map": {"": PartialState().device}}


def check_adapter(name: str) -> None:
    """Raise a `ValueError` for what is no adapter here and cannot be one on the Hub, which would be asked for long."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{name} holds no adapter: there is no {ADAPTER_CONFIG} in it")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no adapter {name!r}: it is no folder here, and no id on the Hub (OWNER/NAME)")


def for_rows(processor: Processor, columns: list[str]) -> Processor:
    """The processor if rows have images, else its tokenizer, which text alone needs."""
    has_images = image_column(columns) is not None
    if has_images and not isinstance(processor, ProcessorMixin):
        raise ValueError(
            "the task has images, but the model has no processor for them: choose a vision-language model"
        )
    if has_images or not isinstance(processor, ProcessorMixin):
        return processor
    tokenizer: Any = processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return tokenizer
