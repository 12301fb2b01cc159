"""RoutingMixin: the two passes of Transformer² around one of transformers' own generation pipelines."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import Chat

from peft_svf.dispatch import Dispatcher, as_dispatcher
from peft_svf.dispatch.route import MIXTURE, Prompt, Route
from peft_svf.experts.bank import ExpertBank
from peft_svf.pipelines.requests import Pinned, Request, check_pinned, check_prompt, pinned_route
from peft_svf.pipelines.row_groups import join_rows, take_rows
from peft_svf.pipelines.saving import save_pipeline, saved_dispatcher
from peft_svf.pipelines.wrapping import NAMELESS, as_bank


# A tokenizer keeps truncation and padding from one call to the next, and threads and pipelines share it
TOKENIZING = threading.RLock()
if hasattr(os, "register_at_fork"):  # data loader workers must not inherit it from a thread that they do not have
    os.register_at_fork(
        before=TOKENIZING.acquire, after_in_parent=TOKENIZING.release, after_in_child=TOKENIZING.release
    )


class RoutingMixin:
    """
    First pass: the dispatcher chooses an expert or a mixture for every prompt of a batch that is not pinned. Second
    pass: one `generate` for the whole batch, each row under its own weights; or one for each of the experts, where
    they adapt modules that cannot tell rows apart (vision towers, the experts of a mixture-of-experts model). Nothing
    of the model is changed, and a route belongs to the thread that runs the batch, so threads may share a pipeline.

    Comes before the transformers pipeline in the bases of a class. The `preprocess` of that pipeline has to return a
    mapping; its `_forward` has to call `self.model.generate` once, with the rows of the batch in their order, and to
    return a dict of the form that [`~peft_svf.pipelines.row_groups.join_rows`] knows, whose first value has one entry
    for each row (unbatching reads the batch size from it).

    What a subclass may override:

    - `_as_bank(model, tokenizer)`: the bank behind `model`.
    - `_read_request(inputs)`: takes one input of a call apart into what is answered and what it is pinned to.
    - `_preprocess_prompt(prompt, **kwargs)`: tokenizes the first of the two.
    - `_question(prompt)`: the text or chat that the dispatcher is asked about.
    - `_generate(model_inputs, **kwargs)`: the `_forward` of that pipeline, on rows that are generated at once.
    """

    _load_tokenizer = False  # the bank has it
    _load_video_processor = False

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        dispatcher: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.bank = self._as_bank(model, tokenizer)
        _pad_for_generation(self.bank.tokenizer)
        self.dispatcher: Dispatcher = self._as_dispatcher(dispatcher)
        super().__init__(model=self.bank.model, tokenizer=self.bank.tokenizer, **kwargs)  # type: ignore[call-arg]

    def _as_bank(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> ExpertBank:
        return as_bank(model, tokenizer)

    def _as_dispatcher(self, dispatcher: Any) -> Dispatcher:
        if dispatcher is None and list(self.bank.experts) == [NAMELESS]:
            dispatcher = NAMELESS  # there is no label to choose by, and somebody asked for this adapter
        return as_dispatcher(saved_dispatcher(self.bank) if dispatcher is None else dispatcher, self.bank)

    def save_pretrained(
        self, save_directory: str | Path, include_base: bool | None = None, max_shard_size: Any = None
    ) -> Path:
        """
        Write the pipeline's bank and the options of its dispatcher as a folder that `pipeline(model=...)` loads.

        Args:
            save_directory (`str` or `Path`): see [`ExpertBank.save_pretrained`].
            include_base (`bool`, *optional*): by default only if there is no checkpoint to refer to.
            max_shard_size (*optional*): not used; transformers' `push_to_hub` passes it.
        """
        return save_pipeline(self.bank, self.dispatcher, save_directory, include_base)

    def check_model_type(self, supported_models: Any) -> None:
        """Done before, by `as_bank`: transformers' own check knows neither PeftModel nor this task."""

    def _sanitize_parameters(
        self, expert: Any = None, return_seconds: bool | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        if expert is not None:
            preprocess["expert"] = check_pinned(self.bank, expert)
        if return_seconds is not None:
            forward["return_seconds"] = return_seconds
        return preprocess, forward, postprocess

    # ---------------------------------------------------------------- one prompt
    def preprocess(self, inputs: Any, expert: Pinned | None = None, **kwargs: Any) -> Any:
        """Tokenize one prompt; `{"text" | "messages": ..., "expert": ...}` pins the expert of this prompt."""
        prompt, pinned = self._read_request(inputs)
        pinned = expert if pinned is None else check_pinned(self.bank, pinned)
        with TOKENIZING:
            model_inputs = self._preprocess_prompt(prompt, **kwargs)
        model_inputs["request"] = Request(prompt, pinned)  # in every item: a batch needs the same keys in all
        return model_inputs

    def _read_request(self, inputs: Any) -> tuple[Any, Any]:
        pinned = None
        if isinstance(inputs, Mapping):
            given = {key: value for key, value in inputs.items() if value is not None}  # datasets fill rows with None
            if "text" not in given and "messages" not in given:
                raise ValueError(f"A prompt given as a dict needs 'text' or 'messages'; it has {sorted(inputs)}.")
            pinned = given.get("expert")
            inputs = given["messages"] if "messages" in given else given["text"]
        return check_prompt(inputs), pinned

    def _preprocess_prompt(self, prompt: Any, **kwargs: Any) -> Any:
        return super().preprocess(prompt, **kwargs)  # type: ignore[misc]

    # ---------------------------------------------------------------- one batch
    def _forward(self, model_inputs: Any, return_seconds: bool = False, **generate_kwargs: Any) -> Any:
        requests = model_inputs.pop("request")
        batched = isinstance(requests, list)  # batch_size 1 is not wrapped in a list
        rows = requests if batched else [requests]
        times = [self._now(return_seconds)]
        route = self._route(rows)
        times.append(self._now(return_seconds))
        outputs = self._second_pass(model_inputs, route, **generate_kwargs)
        times.append(self._now(return_seconds))
        adaptations = _adaptations(route)
        if return_seconds:
            seconds = {"first_pass_seconds": times[1] - times[0], "second_pass_seconds": times[2] - times[1]}
            adaptations = [adaptation | seconds for adaptation in adaptations]
        # behind what transformers returns: unbatching reads the batch size from the first key
        outputs["adaptation"] = adaptations if batched else adaptations[0]
        return outputs

    def _second_pass(self, model_inputs: Any, route: Route, **generate_kwargs: Any) -> Any:
        self.model = self.bank.model  # the first expert of a bank without experts makes it a PeftModel
        groups = self.bank.row_groups(route)
        if len(groups) == 1:
            with self.bank.routed(route):
                return self._generate(model_inputs, **generate_kwargs)
        self._refuse_streamer(generate_kwargs)
        outputs = []
        for rows in groups:
            with self.bank.routed(route[rows]):
                outputs.append(self._generate(take_rows(model_inputs, rows), **generate_kwargs))
        return join_rows(outputs, groups, self.bank.tokenizer.pad_token_id)

    def _generate(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        return super()._forward(model_inputs, **generate_kwargs)  # type: ignore[misc]

    def _refuse_streamer(self, generate_kwargs: dict[str, Any]) -> None:
        of_call = generate_kwargs.get("generate_kwargs") or generate_kwargs  # the image pipeline has them in one
        if {**getattr(self, "_generate_kwargs", {}), **of_call}.get("streamer") is not None:
            raise ValueError(
                "A streamer follows one generate, but the experts of this batch adapt modules that cannot tell rows "
                "apart, so that each expert needs its own; pass batch_size=1."
            )

    def _route(self, requests: list[Request]) -> Route:
        """First pass: the dispatcher's route of the rows that are not pinned, put together with the others."""
        open_rows = [row for row, request in enumerate(requests) if request.pinned is None]
        fixed_rows = [row for row, request in enumerate(requests) if request.pinned is not None]
        asked = self._ask([self._question(requests[row].prompt) for row in open_rows]) if open_rows else None
        if not fixed_rows and asked is not None:
            return asked
        fixed = pinned_route(self.bank, [requests[row].pinned for row in fixed_rows], asked)  # type: ignore[misc]
        if asked is None:
            return fixed
        order = [*open_rows, *fixed_rows]
        return Route.concatenate([asked, fixed])[[order.index(row) for row in range(len(requests))]]

    def _ask(self, questions: list[Prompt]) -> Route:
        route = self.dispatcher.route(questions)
        if len(route) != len(questions):
            raise ValueError(f"The dispatcher was given {len(questions)} prompts and routed {len(route)}.")
        used = route.weights.flatten(0, -2).any(0).tolist()  # (K,)
        for name, is_used in zip(route.experts, used, strict=True):
            if is_used:
                self.bank.check_expert(name)
        return route

    def _question(self, prompt: Any) -> Prompt:
        question: Prompt = prompt.messages if isinstance(prompt, Chat) else prompt  # type: ignore[assignment]
        return question

    def _now(self, wanted: bool) -> float:
        if not wanted:
            return 0.0
        device: torch.device = self.device  # type: ignore[attr-defined]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """transformers' records, each with what the first pass decided."""
        adaptation = model_outputs.pop("adaptation")
        return [record | adaptation for record in super().postprocess(model_outputs, **kwargs)]  # type: ignore[misc]


def _adaptations(route: Route) -> list[dict[str, Any]]:
    """What the records of each row say about its route."""
    names = route.names()
    adaptations: list[dict[str, Any]] = [
        {"expert": name, "scores": scores} for name, scores in zip(names, route.scores, strict=True)
    ]
    if MIXTURE in names:
        for adaptation, name, weights in zip(adaptations, names, route.row_weights(), strict=True):
            if name == MIXTURE:
                adaptation["weights"] = weights
    return adaptations


def _pad_for_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    """On the left, with any token: batches hide it by the attention mask."""
    tokenizer.padding_side = "left"  # older versions of transformers leave it as it is
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
