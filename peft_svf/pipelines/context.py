"""ContextMixin: prompt and answer of a pipeline fit into the context of its model, or the call says why not."""

from __future__ import annotations

import copy
from typing import Any


class ContextMixin:
    """Comes before the transformers pipeline in the bases of a class."""

    _default_generation_config: Any  # a GenerationConfig
    _generate_kwargs: dict[str, Any] = {}  # said at construction; older versions of transformers do not set it apart
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
        given = self._given(generate_kwargs)
        configs = (given.get("generation_config"), self.model.generation_config)

        def asked(name: str) -> int | None:
            values = (given.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        new_tokens, length = asked("max_new_tokens"), asked("max_length")
        return length - prompt_tokens if new_tokens is None and length is not None else new_tokens

    def _in_context(self, prompt_tokens: int, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, in which the default number of new tokens yields to the room that a prompt leaves."""
        default, context = self._default_generation_config.max_new_tokens, self._context_length
        room = default if context is None else min(default, context - prompt_tokens)
        if room == default or self._asked_new_tokens(prompt_tokens, generate_kwargs) is not None:
            return generate_kwargs
        given = self._given(generate_kwargs)
        config = copy.deepcopy(given.get("generation_config"))
        if config is None:
            return {**generate_kwargs, "max_new_tokens": room}
        config.max_new_tokens = room  # beside a configuration, generate wants no arguments
        return {**given, "generation_config": config}

    def _given(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call asks of generate; its `generation_config` replaces all that was said at construction."""
        return (
            generate_kwargs if "generation_config" in generate_kwargs else {**self._generate_kwargs, **generate_kwargs}
        )
