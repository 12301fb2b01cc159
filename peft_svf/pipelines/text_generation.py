"""Transformer2Pipeline: text generation in which every prompt is answered by the expert it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType
from transformers.utils.chat_template_utils import Chat

from peft_svf.answering import answer_text, plain_prompt
from peft_svf.pipelines.context import ContextMixin
from peft_svf.pipelines.requests import check_inputs
from peft_svf.pipelines.routing import RoutingMixin


class Transformer2Pipeline(RoutingMixin, ContextMixin, TextGenerationPipeline):  # type: ignore[misc]
    """
    transformers' text generation pipeline with the self-adaptation of Transformer² (arXiv 2501.06252, section 3.2).

    First pass: a dispatcher chooses an expert, a mixture of experts or the base model for each prompt. Second pass:
    the whole batch is generated at once, each row under its own weights (one `generate` for each of the experts, where
    they adapt those of a mixture-of-experts model). Everything `TextGenerationPipeline` takes works here: lists,
    chats, datasets, generators, `batch_size`, `num_return_sequences`, beams, streamers, an assistant model, generation
    arguments. The differences:

    - Greedy decoding, at most 256 new tokens and never more than the context has room for, unless the model's
      generation config or the call says otherwise.
    - A text is one user message if the tokenizer has a chat template, and `generated_text` is the answer alone
      (`return_full_text=True` puts the text in front of it). Chats behave as in text generation; without a chat
      template they become the text that evaluation makes of them ([`~peft_svf.answering.plain_prompt`]).
    - Every record carries `expert` (the chosen expert's name, "others" for the base model, or "mixture"), `scores`
      (label to probability; `None` where no dispatcher was asked) and, of a mixture, `weights` (by expert, without
      zeros). With `return_seconds=True` also `first_pass_seconds` and `second_pass_seconds`, of the whole batch that
      the prompt was answered in.

    Threads may share a pipeline: none sees another's route, or what another asks of the tokenizer.

    Args:
        model (`str`, `ExpertBank`, `PeftModel` or `PreTrainedModel`):
            A bank's folder or Hub id, a bank, a `PeftModel` with SVF adapters (each becomes an expert whose label is
            its name), a repository with one SVF adapter, or a causal language model (then everything goes to the base
            model). With `pipeline("transformer2-generation")` and no model, the playground bank inside this package.
        tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): defaults to the bank's.
        dispatcher (*optional*):
            `"prompt"`, `"classifier"`, an expert, mixture weights by expert, a one-row [`~peft_svf.dispatch.Route`], a
            function of the prompts, or an object with `route(prompts) -> Route`; see
            [`~peft_svf.dispatch.as_dispatcher`]. Defaults to the bank's classification expert if it has one, else to
            the base model's own judgement. If PEFT's name "default" is the only expert's, there is no label to choose
            by and it answers every prompt.
        kwargs:
            As for `TextGenerationPipeline`; `expert`, what every call is pinned to that says nothing else; and
            `return_seconds`.

    Raises:
        ValueError: not a causal language model. On a call: an unknown expert, an empty prompt or chat, a prompt that
            does not fit the context.
        TypeError: what cannot be a dispatcher; on a call, what cannot be a prompt or pin one.
        ExpertBankError: the model is not a bank, its adapters are not SVF, or an expert does not belong to its base.

    Example:

    ```python
    >>> import peft_svf
    >>> from transformers import pipeline

    >>> pipe = pipeline("transformer2-generation")
    >>> pipe("Tom has 23 apples and buys 18 more. How many apples does Tom have?")
    >>> pipe([{"text": "7 + 5 = ?", "expert": "math"}, "Write a function."], batch_size=2, max_new_tokens=32)
    >>> pipe("How many legs have two cats?", expert={"math": 0.6, "reasoning": 0.4})
    ```
    """

    _default_generation_config = GenerationConfig(max_new_tokens=256, do_sample=False)

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Answer one or several prompts.

        Args:
            text_inputs (`str`, chat, `dict`, or a list, dataset or generator of them):
                A dict is `{"text": ..., "expert": ...}` or `{"messages": ..., "expert": ...}`; its expert is optional
                and may be a mixture, `{"math": 0.7, "code": 0.3}`, the rest of which stays with the base model. The
                rows of a dataset are such dicts.
            expert (`str` or `Mapping[str, float]`, *optional*):
                Pin all prompts that name no expert, "others" for the base model; no first pass then.
            return_seconds (`bool`, *optional*, defaults to `False`): Report what both passes took.
            kwargs: as for `TextGenerationPipeline`.

        Returns:
            A list of records for one prompt (one for each returned sequence), a list of such lists for several, an
            iterator over such lists for a dataset or a generator.
        """
        return super().__call__(check_inputs(text_inputs), **kwargs)

    def _read_request(self, inputs: Any) -> tuple[Any, Any]:
        if isinstance(inputs, Mapping) and inputs.get("images") is not None:
            raise ValueError("This pipeline reads no images; use pipeline('transformer2-image-text-to-text').")
        return super()._read_request(inputs)

    def _preprocess_prompt(self, prompt: str | Chat, **kwargs: Any) -> Any:
        continues = kwargs.get("continue_final_message")
        model_inputs = super()._preprocess_prompt(self._as_model_reads(prompt, continues), **kwargs)
        model_inputs["prompt_text"] = prompt
        self._check_context(model_inputs["input_ids"].shape[-1], kwargs)
        return model_inputs

    def _as_model_reads(self, prompt: str | Chat, continues: bool | None) -> str | Chat:
        """With a chat template a text is one user message; without one a chat is a text."""
        has_template = self.bank.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            return Chat([{"role": "user", "content": prompt}]) if has_template else prompt  # type: ignore[arg-type]
        if has_template:
            return prompt
        messages = list(prompt.messages)
        if not (messages[-1]["role"] == "assistant" if continues is None else continues):
            return plain_prompt(messages)
        begun = answer_text(messages[-1:])
        return plain_prompt(messages[:-1]) + begun if messages[1:] else begun

    def _generate(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        return super()._generate(
            model_inputs, **self._in_context(model_inputs["input_ids"].shape[-1], generate_kwargs)
        )

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, return_type: ReturnType | None = None, **kwargs: Any
    ) -> Any:
        """Text or chat records; a text prompt gets the answer alone unless the full text was asked for."""
        if return_type is None:
            is_text = isinstance(model_outputs["prompt_text"], str)
            return_type = ReturnType.NEW_TEXT if is_text else ReturnType.FULL_TEXT
        return super().postprocess(model_outputs, return_type=return_type, **kwargs)
