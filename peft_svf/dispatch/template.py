"""RoutingTemplate: the text that asks a model for the label of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_svf.dispatch.locking import PicklableLock
from peft_svf.experts.bank import BASE_LABEL, ExpertEntry


# Different first characters: whatever the tokenizer merges at the border shows up as a difference
_PROBES = ("a", "7", "\n", "Ω?", " x", "")


def default_instruction(entries: Sequence[ExpertEntry]) -> str:
    """
    An instruction for ordinary chat models, written from labels and descriptions.

    In the spirit of the classification prompt in the paper's appendix (arXiv 2501.06252, Appendix D): name the
    categories, describe them, ask for one; here for the bare label, so that it can be scored without generating.
    """
    lines = ["Classify the user's request into exactly one of these categories:"]
    lines += [
        f"- {entry.label}: {entry.description}" if entry.description else f"- {entry.label}" for entry in entries
    ]
    lines.append(f"- {BASE_LABEL}: anything that does not clearly belong to one of the categories above")
    labels = ", ".join(entry.label for entry in entries)
    lines.append(f"Consider which skill the request needs most. Answer with one word: {labels} or {BASE_LABEL}.")
    return "\n".join(lines)


class RoutingTemplate:
    """
    Renders and tokenizes `instruction` + prompt up to the point where the label begins.

    With a chat template the instruction is the system message (in front of the user message where the template has no
    system role) and the label is what the assistant says. Without one it is plain text that ends in "Category:".

    Several threads may use one template: it has a copy of the tokenizer to itself, behind a lock. A fast tokenizer
    keeps padding and truncation as its own settings from call to call, so a thread that truncates changes the tokens
    that another one gets, or both fail with "Already borrowed".

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model that classifies.
        instruction (`str`): what to do and which labels there are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, instruction: str) -> None:
        self._lock = PicklableLock()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.instruction = instruction
        self.is_chat = tokenizer.chat_template is not None
        self._in_parts = False
        self._in_parts = self.is_chat and self._wants_parts()
        self._system_role = self.is_chat and self._has_system_role()
        self._answer_start = self._find_answer_start() if self.is_chat else " "

    def render(self, text: str) -> str:
        """The full text that precedes the label (and, without a chat template, the space after the colon)."""
        if not self.is_chat:
            return f"{self.instruction}\n\n{text}\nCategory:"
        return self._apply(self.messages(text), add_generation_prompt=True) + self._answer_start

    def messages(self, text: str) -> list[dict[str, str]]:
        """The chat that [`render`] renders."""
        if self._system_role:
            return [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}]
        return [{"role": "user", "content": f"{self.instruction}\n\n{text}"}]

    def encode(self, text: str) -> list[int]:
        """Token ids of `render(text)`."""
        return self._encode(self.render(text))

    def label_ids(self, label: str) -> list[int]:
        """Token ids of a label as the continuation of a rendered prompt."""
        label = label if self.is_chat else self._answer_start + label
        prompt = self.render(_PROBES[0])
        head, whole = self._encode(prompt), self._encode(prompt + label)
        if len(whole) > len(head) and whole[: len(head)] == head:
            return whole[len(head) :]
        # the tokenizer merges the border: the label on its own
        return self._tokenize(label, special=False)

    def prefix_ids(self) -> list[int]:
        """The longest token prefix that rendered prompts share, safe against merges at the border to the prompt."""
        probes = [self.encode(probe) for probe in _PROBES]
        prefix = []
        for column in zip(*probes, strict=False):
            if len(set(column)) > 1:
                break
            prefix.append(column[0])
        return prefix

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenize(text, special=not self.is_chat)
        # some tokenizers close every text; the label is to follow
        return ids[:-1] if not self.is_chat and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _tokenize(self, text: str, special: bool) -> list[int]:
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _apply(self, messages: list[dict[str, str]], **options: Any) -> str:
        chat: list[Any] = list(messages)
        if self._in_parts:
            chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, **options))

    def _wants_parts(self) -> bool:
        """Templates of vision-language models may read contents as lists of parts, and render nothing of a text."""
        try:
            return "probe" not in self._apply([{"role": "user", "content": "probe"}])
        except (TemplateError, TypeError):
            return True

    def _has_system_role(self) -> bool:
        messages = [{"role": "system", "content": self.instruction}, {"role": "user", "content": "a"}]
        try:
            rendered = self._apply(messages)
        except TemplateError:  # "System role not supported"
            return False
        return self.instruction.strip() in rendered

    def _find_answer_start(self) -> str:
        """What the template writes between the generation prompt and the assistant's words: mostly nothing."""
        label, messages = "label", self.messages("a")
        prompt = self._apply(messages, add_generation_prompt=True)
        answered = [*messages, {"role": "assistant", "content": label}]
        whole = self._apply(answered)
        start = whole[len(prompt) :]
        return start[: start.index(label)] if whole.startswith(prompt) and label in start else ""
