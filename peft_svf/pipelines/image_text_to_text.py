"""Transformer2ImageTextToTextPipeline: texts about images, each answered by the expert that it needs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from transformers import AutoProcessor, GenerationConfig
from transformers.pipelines.base import Pipeline
from transformers.utils.chat_template_utils import Chat

from peft_svf.dispatch.route import Prompt
from peft_svf.experts.bank import ExpertBank
from peft_svf.pipelines.image_batches import BatchedImageTextToTextPipeline, ImageQuestion
from peft_svf.pipelines.requests import check_inputs
from peft_svf.pipelines.routing import TOKENIZING, RoutingMixin
from peft_svf.pipelines.wrapping import as_bank


# Qwen2-VL and its kin keep the positions of the running generation on the model: one at a time
_POSITIONS = threading.RLock()


class Transformer2ImageTextToTextPipeline(RoutingMixin, BatchedImageTextToTextPipeline):  # type: ignore[misc]
    """
    transformers' image-text-to-text pipeline with the self-adaptation of Transformer² (arXiv 2501.06252, section 3.2;
    its vision-language experiments are in section 4.2).

    First pass: a dispatcher reads the text of each prompt, without the images, and chooses an expert. Second pass: the
    whole batch is generated at once, each row with its images under its own expert. Prompts with and without images
    fit into one batch. What [`Transformer2Pipeline`] says about records, defaults and generation arguments holds here
    too; `input_text` of a record is the prompt.

    A vision tower sees images and not rows: leave it out of the training with `SVFConfig(exclude_modules=...)`, or
    each expert of a batch needs a `generate` of its own.

    Args:
        model (`str`, `ExpertBank`, `PeftModel` or `PreTrainedModel`):
            A bank's folder or Hub id, a bank, a `PeftModel` with SVF adapters or a vision-language model.
        processor (`ProcessorMixin` or `str`, *optional*): defaults to the bank's.
        dispatcher (`Dispatcher`, *optional*): defaults to `PromptDispatcher(bank)`.
        kwargs: as for `ImageTextToTextPipeline`, and `expert`, the expert of every call that names no other.

    Raises:
        ValueError: no processor for images. On a call: an unknown argument, and see [`Transformer2Pipeline`].
        ExpertBankError: the model is not a bank, or an expert does not belong to its base.

    Example:

    ```python
    >>> import peft_svf
    >>> from transformers import pipeline

    >>> pipe = pipeline("transformer2-image-text-to-text", model="user/bank")
    >>> pipe("chart.png", text="How much did sales grow?")
    >>> pipe([{"images": "chart.png", "text": "What is the title?", "expert": "reading"}, {"text": "7 + 5 = ?"}])
    ```
    """

    _load_processor: Any = False  # the bank has it
    _default_generation_config = GenerationConfig(max_new_tokens=256, do_sample=False)

    def __init__(self, model: Any, processor: Any = None, dispatcher: Any = None, **kwargs: Any) -> None:
        if kwargs.pop("tokenizer", None) is not None:
            raise ValueError("Pass processor=... instead of tokenizer=...: a prompt may have images.")
        if isinstance(processor, str):
            processor = AutoProcessor.from_pretrained(processor)
        bank = self._as_bank(model, processor)
        super().__init__(bank, dispatcher=dispatcher, processor=bank.processor, **kwargs)

    def _as_bank(self, model: Any, tokenizer: Any) -> ExpertBank:
        bank: Any = as_bank(model, tokenizer)
        if tokenizer is not None and bank.tokenizer is tokenizer:  # a bank that was given another processor
            bank.tokenizer, bank.processor = tokenizer.tokenizer, tokenizer
        if bank.processor is None:
            raise ValueError("The model has no processor for images; pass processor=..., or use Transformer2Pipeline.")
        checked: ExpertBank = bank
        return checked

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Answer one or several prompts.

        Args:
            images (image, prompt, or a list of them, *optional*):
                With `text`, what it is about: a `PIL.Image`, URL or path, or a list of images for one text, or one
                image (or list of images) for each of several texts. Without `text`, the prompts.
            text (`str`, chat, `dict`, or a list, dataset or generator of them, *optional*):
                A prompt. A dict is `{"text": ..., "images": ..., "expert": ...}` or
                `{"messages": ..., "expert": ...}`; images and expert are optional. Chats carry their images in their
                messages.
            expert (`str`, *optional*): pin the expert of all prompts, "others" for the base model; no first pass then.
            kwargs: as for `ImageTextToTextPipeline`, and all arguments of `generate`.

        Returns:
            A list of records for one prompt (one for each returned sequence), a list of such lists for several.
        """
        # transformers' own __call__ takes dicts for messages of a chat; what else it does is done in `preprocess`
        return Pipeline.__call__(self, _read_call(images, text), **kwargs)

    def _read_request(self, inputs: Any) -> tuple[Any, Any]:
        prompt, pinned = super()._read_request(inputs)
        images = inputs.get("images") if isinstance(inputs, Mapping) else None
        if images is None:
            return prompt, pinned
        if isinstance(prompt, Chat):
            raise ValueError("A chat holds its images in its messages; pass 'images' only with a 'text'.")
        return ImageQuestion(prompt, images), pinned

    def _question(self, prompt: Any) -> Prompt:
        return prompt.text if isinstance(prompt, ImageQuestion) else super()._question(prompt)

    def _process(self, *args: Any) -> Any:
        with TOKENIZING:
            return super()._process(*args)

    def _generate(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        model = self.bank.base_model
        keeps_positions = any(hasattr(part, "rope_deltas") for part in (model, getattr(model, "model", None)))
        with _POSITIONS if keeps_positions else nullcontext():
            return super()._generate(model_inputs, **generate_kwargs)


def _read_call(images: Any, text: Any) -> Any:
    if images is None and text is None:
        raise ValueError("There is nothing to answer: pass a text, images with a text, or a chat.")
    if images is None or text is None:
        return _read_prompts(text if images is None else images)
    if isinstance(text, str):
        return {"text": text, "images": images}
    if not isinstance(text, list | tuple) or any(not isinstance(one, str) for one in text):
        raise ValueError("With images=..., text is a text or a list of texts; a chat holds its images itself.")
    if not isinstance(images, list | tuple) or len(images) != len(text):
        raise ValueError(f"There are {len(text)} texts; pass a list of as many images (or lists of images).")
    return [{"text": one, "images": about} for one, about in zip(text, images, strict=True)]


def _read_prompts(prompts: Any) -> Any:
    if isinstance(prompts, list | tuple) and prompts and isinstance(prompts[0], Mapping) and "role" in prompts[0]:
        return Chat(prompts)  # type: ignore[arg-type]
    if type(prompts).__module__.startswith("PIL."):
        raise ValueError("An image alone is no question; pass text=... with it.")
    return check_inputs(prompts)
