"""BatchedImageTextToTextPipeline: transformers' pipeline for texts about images, a batch processed as a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.meta import find_undeclared_variables
from transformers import GenerationConfig, GenerationMixin, ImageTextToTextPipeline
from transformers.image_utils import load_image
from transformers.pipelines.image_text_to_text import ReturnType
from transformers.utils.chat_template_utils import Chat, _compile_jinja_template

from peft_svf.pipelines.context import ContextMixin


_IMAGE_KEYS = ("image", "url", "path", "base64")  # of a part of type "image", as processors know them
_SHORTER = "shorten it, or pass fewer or smaller images"
_TEMPLATE_ARGUMENTS = {"chat_template", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True)
class ImageQuestion:
    """A text about images: one or a list of `PIL.Image`, URL, path or base64."""

    text: str
    images: Any


class BatchedImageTextToTextPipeline(ContextMixin, ImageTextToTextPipeline):
    """
    transformers' pipeline with three differences.

    transformers processes each prompt on its own and puts the tensors together without knowing what they mean: padding
    is on the right, prompts with and without images do not fit together, and of packed pixels (Qwen2-VL) all but the
    first row are lost. The model's processor knows how a batch is made, so here it makes it.

    Generation arguments of a call are generation arguments; transformers gives all but `max_new_tokens` to the
    processor, which ignores them. And prompt and answer fit into the context, or the call says why not.
    """

    processor: Any  # never None

    def _sanitize_parameters(  # type: ignore[override]
        self, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        of_pipeline = {
            *inspect.signature(ImageTextToTextPipeline._sanitize_parameters).parameters,
            "add_special_tokens",
        }
        of_pipeline |= _TEMPLATE_ARGUMENTS | _template_variables(self.processor.chat_template)
        of_generate = _generation_arguments(self.model)
        own: dict[str, Any] = {}
        generation = dict(generate_kwargs or {})
        for name, value in kwargs.items():
            if name not in of_pipeline and name not in of_generate:
                raise ValueError(
                    f"Unknown argument '{name}': neither the pipeline nor generate() nor the model's chat template "
                    "knows it. Arguments of the processor go into processor_kwargs={...}."
                )
            (own if name in of_pipeline else generation)[name] = value
        preprocess, forward, postprocess = super()._sanitize_parameters(generate_kwargs=generation or None, **own)
        if "processor_kwargs" in preprocess:  # for the whole batch
            forward["processor_kwargs"] = preprocess.pop("processor_kwargs")
        return preprocess, forward, postprocess

    # ---------------------------------------------------------------- one prompt
    def preprocess(  # type: ignore[override]
        self, inputs: str | Chat | ImageQuestion, timeout: float | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Render one prompt and load its images."""
        prompt: str | Chat = inputs.text if isinstance(inputs, ImageQuestion) else inputs
        messages = _with_parts(_messages(inputs)) if isinstance(inputs, Chat) else _user_message(inputs)
        images = _load_images(messages, timeout)
        if self.processor.chat_template is None:
            parts = [part for message in messages for part in message["content"]]
            rendered = "".join(part["text"] for part in parts if part["type"] == "text")
        else:
            rendered = self._render(messages, **kwargs)
        if isinstance(prompt, Chat) and _messages(prompt)[-1]["role"] == "assistant":
            # transformers continues a last message only if it consists of parts
            *before, last = _messages(prompt)
            prompt = Chat([*before, *_with_parts([last])])  # type: ignore[arg-type]
        return {"prompt_text": prompt, "rendered": rendered, "images": images}

    def _render(
        self, messages: list[dict[str, Any]], continue_final_message: bool | None = None, **template_kwargs: Any
    ) -> str:
        if continue_final_message is None:
            continue_final_message = messages[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not continue_final_message, **template_kwargs}
        return str(
            self.processor.apply_chat_template(
                messages, tokenize=False, continue_final_message=continue_final_message, **options
            )
        )

    # ---------------------------------------------------------------- one batch
    def _forward(  # type: ignore[override]
        self,
        model_inputs: Mapping[str, Any],
        generate_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        prompts, rendered, images = (model_inputs[name] for name in ("prompt_text", "rendered", "images"))
        if not isinstance(prompts, list):  # batch_size 1
            rendered, images = [rendered], [images]
        batch = self._process(rendered, images, processor_kwargs or {})
        batch["text"] = prompts
        prompt_length = batch["input_ids"].shape[-1]
        generate_kwargs = generate_kwargs or {}
        self._check_context(prompt_length, generate_kwargs, "tokens with its images", _SHORTER)
        outputs: dict[str, Any] = super()._forward(
            batch, generate_kwargs=self._in_context(prompt_length, generate_kwargs)
        )
        return outputs

    def _process(self, rendered: list[str], images: list[list[Any]], processor_kwargs: dict[str, Any]) -> Any:
        options = {"padding": True, "padding_side": "left", **processor_kwargs}
        bos = self.processor.tokenizer.bos_token
        if self.processor.chat_template is not None and bos is not None and rendered[0].startswith(bos):
            options.setdefault("add_special_tokens", False)
        batch = self.processor(text=rendered, images=images if any(images) else None, return_tensors="pt", **options)
        return batch.to(self.device, dtype=self.dtype)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Mapping[str, Any], return_type: ReturnType | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Records; a text gets the answer alone unless the full text was asked for, a chat is continued."""
        if return_type is None:
            is_text = not isinstance(model_outputs["prompt_text"], Chat)
            return_type = ReturnType.NEW_TEXT if is_text else ReturnType.FULL_TEXT
        records: list[dict[str, Any]] = super().postprocess(model_outputs, return_type=return_type, **kwargs)
        return records


def _template_variables(chat_template: str | dict[str, str] | None) -> set[str]:
    templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
    parsed = [_compile_jinja_template(text).environment.parse(text) for text in templates if text is not None]
    return {name for template in parsed for name in find_undeclared_variables(template)}


def _generation_arguments(model: Any) -> set[str]:
    """All that `model.generate` takes: fields of its configuration, its own arguments and those of the model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    fields |= {"tokenizer", "assistant_tokenizer"}  # for stop_strings and assistants
    arguments = {*inspect.signature(GenerationMixin.generate).parameters, *inspect.signature(inner.forward).parameters}
    return fields | arguments - {"self", "kwargs", "inputs"}


def _messages(chat: Chat) -> list[dict[str, Any]]:
    return list(chat.messages)  # transformers' annotation says dict


def _user_message(question: str | ImageQuestion) -> list[dict[str, Any]]:
    """A text, or a text about images, as the one message of a chat: the images, then the text."""
    if isinstance(question, str):
        question = ImageQuestion(question, [])
    images = question.images if isinstance(question.images, list | tuple) else [question.images]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def _with_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are lists of typed parts, which is all that some chat templates understand."""
    typed = []
    for message in messages:
        content = message["content"] or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        typed.append({**message, "content": parts})
    return typed


def _load_images(messages: list[dict[str, Any]], timeout: float | None) -> list[Any]:
    """Load the images of `messages`, in their order; what remains in the messages is where they are."""
    images = []
    for part in (part for message in messages for part in message["content"]):
        if part.get("type") == "image_url":  # OpenAI's form
            url = part.pop("image_url")
            part.update(type="image", url=url["url"] if isinstance(url, Mapping) else url)
        if part.get("type") not in ("text", "image"):
            raise ValueError(f"A part of a message is of type 'text' or 'image', not {part.get('type')!r}.")
        if part["type"] == "text":
            continue
        source = next((part.pop(key) for key in _IMAGE_KEYS if part.get(key) is not None), None)
        if source is None:
            raise ValueError(f"An image of the chat has none of {', '.join(_IMAGE_KEYS)}; it has {sorted(part)}.")
        images.append(load_image(source, timeout=timeout))
    return images
