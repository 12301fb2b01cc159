"""What the app does when somebody asks, turns a knob, or lets the dispatcher choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr
import page
from answers import Answer, Answerer
from levers import levers


class Update(NamedTuple):
    """New values for the parts of the page; `gr.skip()` leaves a part as it is."""

    message: Any
    scores: Any
    base: Any
    adapted: Any
    mixture: Any
    asked: Any
    weights: Any


NOTHING = Update(*[gr.skip()] * len(Update._fields))


class Handlers:
    """
    The events of the page. Threads share it: what belongs to one visitor is in `asked` and `weights`, on the page.

    Args:
        answerer (`Answerer`): Computes.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.bank = answerer.bank

    def ask(self, prompt: str, dispatcher: str) -> tuple[Any, ...]:
        """Answer by the dispatcher's route, and set the sliders to it."""
        try:
            adapted = self.answerer.chosen(prompt, dispatcher)
            base = self.answerer.base(prompt)
        except ValueError as error:
            return *NOTHING._replace(message=page.complaint(str(error))), *[gr.skip()] * len(self.bank.experts)
        update = self._answered(prompt, adapted, base)._replace(scores=page.first_pass(adapted, self.bank))
        return *update, *slider_positions(adapted.weights, self.bank.experts)

    def ask_example(self, prompt: str, dispatcher: str) -> tuple[Any, ...]:
        """Put an example into the prompt's place and answer it."""
        return prompt, *self.ask(prompt, dispatcher)

    def turn(self, prompt: str, asked: str, *positions: float) -> tuple[Any, ...]:
        """Answer by the sliders."""
        weights = {name: weight for name, weight in zip(self.bank.experts, positions, strict=True) if weight}
        try:
            adapted = self.answerer.mixed(prompt, weights)
            base = self.answerer.base(prompt)
        except ValueError as error:
            return tuple(NOTHING._replace(message=page.complaint(str(error))))
        scores = gr.skip() if prompt == asked else page.first_pass(adapted, self.bank)  # those of another prompt
        return tuple(self._answered(prompt, adapted, base)._replace(scores=scores))

    def show(self, weights: Mapping[str, float]) -> str:
        """The levers of the mixture that answered last."""
        return levers(self.bank, weights)

    def _answered(self, prompt: str, adapted: Answer, base: Answer) -> Update:
        return Update(
            "",
            gr.skip(),
            page.base_answer(base),
            page.adapted_answer(adapted, base, self.bank),
            page.mixture(adapted.weights, self.bank),
            prompt,
            dict(adapted.weights),
        )


def slider_positions(weights: Mapping[str, float], experts: Mapping[str, Any]) -> list[float]:
    """Where the sliders stand for a mixture; they have no place for what lies outside of 0 and 1."""
    return [round(min(1.0, max(0.0, weights.get(name, 0.0))), 2) for name in experts]
