"""RoutingMixin: the two passes of Transformer² around one of transformers' own generation pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import Chat

from peft_svf.dispatch import Dispatcher, PromptDispatcher
from peft_svf.experts.bank import BASE_LABEL, ExpertBank
from peft_svf.tuner.mixed_batch import BASE_MODEL


class RoutingMixin:
    """
    First pass: the dispatcher chooses an expert for every prompt of a batch that is not pinned. Second pass: one
    `generate` for the whole batch, each row under its own expert. The adapter state of the model is not touched.

    Comes before the transformers pipeline in the bases of a class.
    """

    _load_tokenizer = False  # the bank has it
    _load_video_processor = False

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        dispatcher: Dispatcher | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if dispatcher is not None and not isinstance(dispatcher, Dispatcher):
            raise ValueError(
                f"dispatcher must have a method route(prompts) -> Route; {type(dispatcher).__name__} has not."
            )
        self.bank = as_bank(model, tokenizer)
        if self.bank.tokenizer.pad_token_id is None:
            self.bank.tokenizer.pad_token = self.bank.tokenizer.eos_token
        self.dispatcher: Dispatcher = dispatcher if dispatcher is not None else PromptDispatcher(self.bank)
        super().__init__(model=self.bank.model, tokenizer=self.bank.tokenizer, **kwargs)  # type: ignore[call-arg]

    def check_model_type(self, supported_models: Any) -> None:
        """Done before, by `as_bank`: transformers' own check knows neither PeftModel nor this task."""

    def _sanitize_parameters(self, expert: str | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        if expert is not None:
            preprocess["expert"] = self.bank.check_expert(expert)
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, expert: str | None = None, **kwargs: Any) -> Any:
        """Tokenize one prompt; `{"text" | "messages": ..., "expert": ...}` pins the expert of this prompt."""
        if isinstance(inputs, Mapping):
            if "text" not in inputs and "messages" not in inputs:
                raise ValueError(f"A prompt given as a dict needs 'text' or 'messages'; it has {sorted(inputs)}.")
            pinned = inputs.get("expert")
            expert = expert if pinned is None else self.bank.check_expert(pinned)
            inputs = inputs["messages"] if "messages" in inputs else inputs["text"]
        prompt = check_prompt(inputs)
        model_inputs = self._preprocess_prompt(prompt, **kwargs)
        model_inputs["expert"] = expert  # always there: a batch needs the same keys in every item
        return model_inputs

    def _preprocess_prompt(self, prompt: str | Chat, **kwargs: Any) -> Any:
        return super().preprocess(prompt, **kwargs)  # type: ignore[misc]

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        prompts, pinned = model_inputs["prompt_text"], model_inputs.pop("expert")
        batched = isinstance(prompts, list)  # batch_size 1 is not wrapped in a list
        if not batched:
            prompts, pinned = [prompts], [pinned]
        names, scores = self._choose(prompts, pinned)
        uses_experts = any(name != BASE_LABEL for name in names)
        if uses_experts:
            adapters = [BASE_MODEL if name == BASE_LABEL else name for name in names]
            generate_kwargs["adapter_names"] = adapters
        with nullcontext() if uses_experts else self.bank.base_only():
            outputs = super()._forward(model_inputs, **generate_kwargs)  # type: ignore[misc]
        # behind "generated_sequence": unbatching reads the batch size from the first key
        outputs["expert"] = names if batched else names[0]
        outputs["scores"] = scores if batched else scores[0]
        return outputs

    def _choose(self, prompts: list[Any], pinned: list[str | None]) -> tuple[list[str], list[dict | None]]:
        """First pass: the expert of every row, and the scores of those that were not pinned."""
        names = [name or BASE_LABEL for name in pinned]
        scores: list[dict | None] = [None] * len(prompts)
        open_rows = [row for row, name in enumerate(pinned) if name is None]
        if open_rows:
            asked = [prompts[row] for row in open_rows]
            questions: list[Any] = [prompt.messages if isinstance(prompt, Chat) else prompt for prompt in asked]
            route = self.dispatcher.route(questions)
            if len(route) != len(open_rows):
                raise ValueError(f"The dispatcher was given {len(open_rows)} prompts and routed {len(route)}.")
            for row, name, row_scores in zip(open_rows, route.chosen(), route.scores, strict=True):
                names[row], scores[row] = self.bank.check_expert(name), row_scores
        return names, scores

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """transformers' records, each with `expert` (name or "others") and `scores` (None if pinned)."""
        added = {"expert": model_outputs.pop("expert"), "scores": model_outputs.pop("scores")}
        return [record | added for record in super().postprocess(model_outputs, **kwargs)]  # type: ignore[misc]


def as_bank(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> ExpertBank:
    """
    The bank behind whatever a pipeline was given as its model.

    Args:
        model: a bank's folder or Hub id, an `ExpertBank`, a `PeftModel` with SVF adapters (each becomes an expert,
            unless `AutoModelForCausalLM` loaded the model from a bank) or a causal language model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): replaces the bank's.

    Raises:
        ValueError: not a causal language model.
        ExpertBankError: not a bank.
    """
    if isinstance(model, str | Path):
        model = ExpertBank.from_pretrained(model)
    bank = model if isinstance(model, ExpertBank) else getattr(model, "expert_bank", None)
    if bank is None:
        _check_causal_lm(model)
        return ExpertBank(model, tokenizer)
    _check_causal_lm(bank.model)
    if tokenizer is None:
        return bank
    return ExpertBank(bank.model, tokenizer, bank.experts, bank.instruction, bank.base_revision)


def _check_causal_lm(model: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    can_generate = hasattr(inner, "can_generate") and inner.can_generate()
    if not can_generate or inner.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inner).__name__} is not a causal language model; load the checkpoint with AutoModelForCausalLM."
        )


def check_prompt(prompt: Any) -> str | Chat:
    """
    Return `prompt` as text or `Chat`.

    Raises:
        ValueError: an empty text, an empty chat, an empty last user message.
        TypeError: neither text nor chat.
    """
    if isinstance(prompt, list | tuple):
        prompt = Chat(prompt)  # type: ignore[arg-type]
    if isinstance(prompt, Chat):
        if not prompt.messages:
            raise ValueError("The chat is empty; give it at least one message with 'role' and 'content'.")
        role, content = prompt.messages[-1]["role"], prompt.messages[-1]["content"]
        empty = not content.strip() if isinstance(content, str) else not content  # a list of typed parts
        if role == "user" and empty:
            raise ValueError("The last message of the chat is empty; write the user's request into its 'content'.")
        return prompt
    if not isinstance(prompt, str):
        raise TypeError(f"A prompt is a text or a chat (a list of messages), not {type(prompt).__name__}.")
    if not prompt.strip():
        raise ValueError("The prompt is empty; pass a text with at least one visible character.")
    return prompt
