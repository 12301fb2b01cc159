"""Answers of a model to prompts: rendering, padding and generation, nothing of it left to the model's own settings."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from peft_svf.answering.likelihood import AnswerLikelihoods
from peft_svf.answering.messages import Prompt, plain_prompt
from peft_svf.experts.bank import ExpertBank
from peft_svf.experts.route_weights import RouteWeights


Processor: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
Rendered: TypeAlias = tuple[str, bool]

T = TypeVar("T")


class RowWeights(RouteWeights, Protocol):
    """What is needed of a [`~peft_svf.dispatch.Route`], which lives above this package: its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Sequence[int], /) -> RowWeights: ...


@dataclass(frozen=True)
class Batch:
    """B prompts, rendered and as they are, with their images and the route that they are answered under, if any."""

    texts: Sequence[Rendered]
    prompts: Sequence[Prompt]
    images: Sequence[Any] | None
    route: RowWeights | None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, rows: Sequence[int]) -> Batch:
        """Some of its rows."""

        def of(values: Sequence[T]) -> list[T]:
            return [values[row] for row in rows]

        images = None if self.images is None else of(self.images)
        return Batch(of(self.texts), of(self.prompts), images, None if self.route is None else self.route[rows])


class ScoredAnswer(NamedTuple):
    """An answer, and the sum of the log-probabilities of its tokens under the model that gave it."""

    text: str
    log_likelihood: float


@dataclass
class AnswerGenerator:
    """
    Renders prompts and generates answers; `ready` puts the model into the state that `answers` needs.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What answers.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer, or its processor for images.
        max_new_tokens (`int`): Tokens of an answer at most.
        temperature (`float`): 0 is greedy; above it, sampling from the whole vocabulary.
        chat_template_kwargs (`dict`): For the chat template.
        bank ([`ExpertBank`], *optional*): The bank whose model this is, for answers under a route.

    Attributes:
        too_large (`int` or `None`): The smallest batch that did not fit into memory so far.
    """

    model: Any
    processing_class: Processor
    max_new_tokens: int
    temperature: float
    chat_template_kwargs: dict[str, Any]
    bank: ExpertBank | None = None

    def __post_init__(self) -> None:
        self.too_large: int | None = None
        self.has_processor = isinstance(self.processing_class, ProcessorMixin)
        self.tokenizer: Any = self.processing_class.tokenizer if self.has_processor else self.processing_class

    def render(self, prompt: Prompt) -> Rendered:
        """The text of a prompt, and whether the tokenizer has to add its special tokens, as TRL does for texts."""
        if isinstance(prompt, str):
            return prompt, True
        if not self.processing_class.chat_template:
            return plain_prompt(prompt), True
        chat = self._structured(prompt) if self.has_processor else prompt
        text = self.processing_class.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
        return str(text), False

    @contextlib.contextmanager
    def ready(self, seed: int) -> Iterator[None]:
        """Eval mode, a seed of its own, and nothing of the model's generation config but its end tokens."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # PEFT keeps its own
        holders = [holder for holder in (self.model, base) if "generation_config" in vars(holder)]
        saved = [(holder, holder.generation_config) for holder in holders]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        neutral, training = self._generation_config(base.generation_config), self.model.training
        self.model.eval()
        try:
            for holder in holders:
                holder.generation_config = neutral
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                yield
        finally:
            for holder, config in saved:
                holder.generation_config = config
            self.model.train(training)

    def _generation_config(self, own: GenerationConfig) -> GenerationConfig:
        ends = end_tokens(own)
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in ends:
            ends.append(self.tokenizer.eos_token_id)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends or None,
            bos_token_id=own.bos_token_id,
            pad_token_id=self._pad_token_id(),
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )

    def _pad_token_id(self) -> int:
        """Any token will do: the attention mask hides it, and what follows an end token is cut off."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def answers(
        self,
        texts: Sequence[Rendered],
        prompts: Sequence[Prompt],
        images: Sequence[Any] | None = None,
        route: RowWeights | None = None,
    ) -> list[str]:
        """
        Answers to one batch; to halves of it if it does not fit into memory, and to one group of equal weights after
        another if the route changes modules that cannot tell rows apart.

        Args:
            texts (`Sequence[tuple[str, bool]]`): B prompts as `render` gives them.
            prompts (`Sequence[str | list[dict]]`): The prompts themselves, which are rendered again with images.
            images (`Sequence`, *optional*): The image, or the list of images, of each prompt.
            route ([`~peft_svf.dispatch.Route`], *optional*): The weights that each of the B rows is answered under.
        """
        return [answer.text for answer in self._answers(Batch(texts, prompts, images, route), scored=False)]

    def scored_answers(
        self,
        texts: Sequence[Rendered],
        prompts: Sequence[Prompt],
        images: Sequence[Any] | None = None,
        route: RowWeights | None = None,
    ) -> list[ScoredAnswer]:
        """The same answers with their log-likelihoods, which come from the forwards that generated them."""
        return self._answers(Batch(texts, prompts, images, route), scored=True)

    def _answers(self, batch: Batch, scored: bool) -> list[ScoredAnswer]:
        found: dict[int, ScoredAnswer] = {}
        for rows in self._groups(batch):
            found.update(zip(rows, self._halving(batch.rows(rows), scored), strict=True))
        return [found[row] for row in range(len(batch))]

    def _groups(self, batch: Batch) -> list[list[int]]:
        """The rows that can be generated at once: mostly all of them."""
        if batch.route is None:
            return [list(range(len(batch)))]
        if self.bank is None:
            raise ValueError("Answers under a route need the bank of the experts: pass `bank`.")
        if len(batch.route) != len(batch):
            raise ValueError(f"The route has {len(batch.route)} rows, but there are {len(batch)} prompts.")
        return self.bank.row_groups(batch.route)

    def _halving(self, batch: Batch, scored: bool) -> list[ScoredAnswer]:
        try:
            return self._generate(self._inputs(batch.texts, batch.prompts, batch.images), batch.route, scored)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.too_large = min(len(batch), self.too_large or len(batch))
        half = len(batch) // 2
        halves = (range(half), range(half, len(batch)))
        return [answer for rows in halves for answer in self._halving(batch.rows(rows), scored)]

    def _inputs(
        self, texts: Sequence[Rendered], prompts: Sequence[Prompt], images: Sequence[Any] | None
    ) -> dict[str, Tensor]:
        if images is not None:
            return self._inputs_with_images(prompts, images)
        encoded: dict[Rendered, list[int]] = {}  # one prompt under many routes is encoded once
        for text, special in set(texts):
            encoded[text, special] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        rows = [encoded[text] for text in texts]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad_token_id())
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # on the left, so that every row is continued at its end
            ids[i, longest - len(row) :] = torch.tensor(row, dtype=ids.dtype)
            mask[i, longest - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _inputs_with_images(self, prompts: Sequence[Prompt], images: Sequence[Any]) -> dict[str, Tensor]:
        if not self.has_processor:
            raise ValueError(
                "The dataset has images: pass the model's processor (`AutoProcessor`), not its tokenizer."
            )
        chats = [
            self._structured(prompt, picture if isinstance(picture, list) else [picture])
            for prompt, picture in zip(prompts, images, strict=True)
        ]
        inputs = self.processing_class.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **self.chat_template_kwargs,
        )
        return dict(inputs)  # type: ignore[arg-type]

    def _structured(self, prompt: Prompt, images: list[Any] | None = None) -> list[dict[str, Any]]:
        """Messages as processors take them, images before the first question, as TRL's trainers put them."""
        from trl.data_utils import prepare_multimodal_messages

        chat: list[dict[str, Any]] = prepare_multimodal_messages(list(prompt), images=images)
        return chat

    def _generate(self, inputs: dict[str, Tensor], route: RowWeights | None, scored: bool) -> list[ScoredAnswer]:
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        likelihoods = AnswerLikelihoods() if scored else None
        with self._under(route):
            output = self.model.generate(**inputs, **(likelihoods.generate_kwargs if likelihoods else {}))
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        sums = [math.nan] * len(answers)
        if likelihoods is not None:
            sums = likelihoods.of(new_tokens, end_tokens(self.model.generation_config))
        return [ScoredAnswer(text, total) for text, total in zip(answers, sums, strict=True)]

    def _under(self, route: RowWeights | None) -> AbstractContextManager[Any]:
        return nullcontext() if route is None or self.bank is None else self.bank.routed(route)


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
