"""Vision-language models: which part of them is adapted, and what their forward takes besides tokens."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel


logger = logging.getLogger(__name__)

# What TRL passes on from a processor (`GRPOTrainer._generate_and_score_completions`), by what its rows are.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
# Named by processors, but not needed for images: other modalities, and counts that models can do without.
NOT_NEEDED = re.compile(r"input_ids|attention_mask|batch_num_images|.*(video|audio|second_per_grid|input_features).*")


# -- the language model only ------------------------------------------------------------------------------------------
def adapt_language_model_only(
    peft_config: PeftConfig | None, model: str | nn.Module, model_init_kwargs: dict[str, Any]
) -> PeftConfig | None:
    """
    A copy of `peft_config` in which "all-linear" means all linear layers of the language model.

    PEFT's "all-linear" takes those of the vision tower and the projector of a vision-language model as well. A list of
    modules, a regular expression, and models without other parts are left as they are.

    Args:
        peft_config (`PeftConfig`, *optional*): What to train; PEFT will write into the copy.
        model (`str` or `nn.Module`): The model or its path, of which only the configuration is read.
        model_init_kwargs (`dict[str, Any]`): Arguments to load a path with; `trust_remote_code` and `revision` count.

    Returns:
        `PeftConfig`: The copy, with `exclude_modules` extended.
    """
    config: Any = copy.deepcopy(peft_config)
    if getattr(config, "target_modules", None) != "all-linear" or not hasattr(config, "exclude_modules"):
        return config
    outside = modules_outside_language_model(_on_meta_device(model, model_init_kwargs))
    if outside:
        ours = rf"(?:{'|'.join(map(re.escape, outside))})(?:\..+)?"
        config.exclude_modules = "|".join([*_as_expressions(config.exclude_modules), ours])
        logger.info(
            'Only the language model is adapted, not %s. Name modules in `target_modules` instead of "all-linear" to '
            "adapt others.",
            ", ".join(f"`{name}`" for name in outside),
        )
    return config


def modules_outside_language_model(model: nn.Module | None) -> list[str]:
    """Names of the modules of `model` that are neither in its language model nor its output layer, without children.

    Empty for a model that has no modality but text.
    """
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return []
    names = {module: name for name, module in model.named_modules()}
    inside = [names[module] for module in (model.get_decoder(), model.get_output_embeddings()) if names.get(module)]
    if not inside:  # one stack of layers for all modalities
        return []
    outside: list[str] = []
    for name, module in model.named_modules():
        leads_inside = any(f"{path}.".startswith(f"{name}.") for path in inside) or not name
        covered = any(f"{name}.".startswith(f"{path}.") for path in (*inside, *outside))
        if not leads_inside and not covered and any(True for _ in module.parameters()):
            outside.append(name)
    return outside


def _on_meta_device(model: str | nn.Module, model_init_kwargs: dict[str, Any]) -> nn.Module | None:
    """The modules of a checkpoint, without its weights; None if it is text only."""
    if not isinstance(model, str):
        return model
    trusted = {key: model_init_kwargs[key] for key in ("trust_remote_code", "revision") if key in model_init_kwargs}
    config = AutoConfig.from_pretrained(model, **trusted)
    if config.get_text_config() is config:
        return None
    architecture: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture._from_config(config)
        trusted.pop("revision", None)
        return AutoModelForImageTextToText.from_config(config, **trusted)


def _as_expressions(exclude_modules: Any) -> list[str]:
    """The modules that the user excludes, names or endings or a regular expression, as regular expressions."""
    if not exclude_modules:
        return []
    if isinstance(exclude_modules, str):
        return [f"(?:{exclude_modules})"]
    return [rf"(?:.+\.)?{re.escape(name)}" for name in sorted(exclude_modules)]


# -- inputs -----------------------------------------------------------------------------------------------------------
def multimodal_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the forward of a vision-language model takes besides tokens, from one micro-batch of TRL's."""
    images = [name for name in IMAGE_INPUTS if inputs.get(name) is not None]
    if "pixel_values" in inputs and not any(inputs.get("num_images", [1])):  # rows of text only
        images = []
    return {name: inputs[name] for name in (*images, *(name for name in TOKEN_INPUTS if name in inputs))}


def check_processor(processor: Any, model: nn.Module) -> None:
    """Raise if `processor` gives, or `model` needs, what TRL does not pass on.

    Raises:
        ValueError: Names the inputs that would be lost.
    """
    config: Any = model.config
    if getattr(config, "image_token_id", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no image token in its configuration, but `processing_class` is a "
            f"{type(processor).__name__}: pass the tokenizer of the model."
        )
    taken = {*inspect.signature(type(model).forward).parameters}
    lost = [
        name
        for name in processor.model_input_names
        if name in taken and name not in (*IMAGE_INPUTS, *TOKEN_INPUTS) and not NOT_NEEDED.fullmatch(name)
    ]
    if lost:
        raise ValueError(
            f"{type(model).__name__} takes {', '.join(f'`{name}`' for name in lost)} with its images, which TRL's "
            "GRPOTrainer does not pass on: SVFPolicyGradientTrainer supports this model with its tokenizer only."
        )


class ImagePrompts:
    """Mixin for subclasses of [`~trl.GRPOTrainer`]: rows with and without images in one batch."""

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_vlm:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        with _padding_left(self._tokenizer):
            output = super()._generate_and_score_completions(_images_as_lists(inputs))  # type: ignore[misc]
        if _has_a_row_per_answer(output):
            output["num_images"] = [1] * len(output["pixel_values"])
        return output

    def _generate(self: Any, prompts: list[Any]) -> Any:
        """Processors take an empty list for a row without images, not TRL's None."""
        output = super()._generate(prompts)  # type: ignore[misc]
        images = output[-2]
        if self._is_vlm and isinstance(images, list) and any(images) and None in images:
            output = (*output[:-2], [row or [] for row in images], output[-1])
        return output


@contextlib.contextmanager
def _padding_left(tokenizer: Any) -> Iterator[None]:
    """TRL pads prompts on the left, but the types of their tokens as the tokenizer says."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _images_as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose images TRL can count, also where there is none."""
    if all(row.get("image") is not None or row.get("images") for row in rows):
        return rows
    if "images" in rows[0]:
        return [{**row, "images": row.get("images") or []} for row in rows]
    if "image" in rows[0]:
        return [{**row, "images": [] if row.get("image") is None else [row["image"]]} for row in rows]
    return rows


def _has_a_row_per_answer(output: dict[str, Any]) -> bool:
    """Whether pixels are padded to one row per answer (Idefics), which TRL splits by the number of images if the sums
    happen to be equal."""
    padded = "pixel_attention_mask" in output and "spatial_shapes" not in output and "num_images" in output
    return padded and len(output["pixel_values"]) == len(output["prompt_ids"])
