"""ContextMixin: prompt and answer of a pipeline fit into the context of its model, or the call says why not."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


class ContextMixin:
    """Comes before the transformers pipeline in the bases of a class."""

    _default_generation_config: GenerationConfig
    _generate_kwargs: dict[str, Any]  # of construction
    model: Any

    @property
    def _context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_context(
        self,
        prompt_tokens: int,
        generate_kwargs: dict[str, Any],
        what: str = "tokens",
        shorter: str = "shorten the prompt",
    ) -> None:
        """Raise a `ValueError` if a prompt leaves no room for the tokens that were asked for, or for any."""
        context = self._context_length
        if context is None:
            return
        new_tokens = self._asked_new_tokens(prompt_tokens, generate_kwargs)
        if prompt_tokens + (new_tokens or 1) <= context:
            return
        room = context - prompt_tokens
        remedy = f"pass max_new_tokens={room} or {shorter}" if room > 0 else shorter
        asked = f" and max_new_tokens is {new_tokens}" if new_tokens else ""
        raise ValueError(
            f"The prompt has {prompt_tokens} {what}{asked}, but the model's context is {context}; {remedy}."
        )

    def _asked_new_tokens(self, prompt_tokens: int, generate_kwargs: dict[str, Any]) -> int | None:
        """How many tokens user or model ask for; `None` if that is left to the pipeline."""
        if "generation_config" not in generate_kwargs:
            generate_kwargs = {**self._generate_kwargs, **generate_kwargs}
        configs = (generate_kwargs.get("generation_config"), self.model.generation_config)

        def asked(name: str) -> int | None:
            given = (generate_kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in given if value is not None), None)

        new_tokens, length = asked("max_new_tokens"), asked("max_length")
        return length - prompt_tokens if new_tokens is None and length is not None else new_tokens

    def _prepare_generate_kwargs(self, generate_kwargs: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        # The default number of new tokens yields to the room that the longest prompt of the batch leaves
        prompt_length = generate_kwargs.pop("prompt_length", None)
        context = self._context_length
        if prompt_length and context and self._asked_new_tokens(prompt_length, generate_kwargs) is None:
            overrides["max_new_tokens"] = min(self._default_generation_config.max_new_tokens, context - prompt_length)
        prepared: dict[str, Any] = super()._prepare_generate_kwargs(generate_kwargs, **overrides)  # type: ignore[misc]
        return prepared
