"""as_dispatcher: the dispatcher that a user means by a word, a route, a mixture, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_svf.dispatch.classifier import ClassifierDispatcher
from peft_svf.dispatch.prompt import PromptDispatcher
from peft_svf.dispatch.route import Dispatcher, Route
from peft_svf.dispatch.simple import CallableDispatcher, FixedDispatcher
from peft_svf.experts.bank import ExpertBank


_BY_WORD: dict[str, Callable[[ExpertBank], Dispatcher]] = {
    "prompt": PromptDispatcher,
    "classifier": ClassifierDispatcher,
}


def as_dispatcher(value: Any, bank: ExpertBank) -> Dispatcher:
    """
    The dispatcher for a bank that `value` stands for.

    Args:
        value:
            `None` for the bank's classification expert if it has one, else for its base model's own judgement;
            `"prompt"` ([`PromptDispatcher`]) or `"classifier"` ([`ClassifierDispatcher`]); an expert's name,
            `"others"`, mixture weights by expert, or a [`Route`] of one row, for every prompt ([`FixedDispatcher`]); a
            function of the prompts ([`CallableDispatcher`]); or an object with `route(prompts) -> Route`, as it is.
        bank (`ExpertBank`): the bank.

    Raises:
        ValueError: a word that means nothing here, or two things; a dispatcher of another model's bank; a value that
            the dispatcher refuses.
        TypeError: anything else.
    """
    if value is None:
        return PromptDispatcher(bank) if bank.classifier is None else ClassifierDispatcher(bank)
    if isinstance(value, str):
        return _by_word(value, bank)
    if isinstance(value, Route | Mapping):
        return FixedDispatcher(bank, value)
    if isinstance(value, type):
        raise TypeError(f"dispatcher is the class {value.__name__}; pass an object: {value.__name__}(...).")
    if isinstance(value, Dispatcher):
        other = getattr(value, "bank", None)
        if isinstance(other, ExpertBank) and other.model is not bank.model:
            raise ValueError(
                f"This {type(value).__name__} belongs to the bank of another model; make one for this bank."
            )
        return value
    if callable(value):
        return CallableDispatcher(bank, value)
    raise TypeError(
        'dispatcher must be "prompt", "classifier", an expert, mixture weights, a Route, a function of the prompts or '
        f"an object with route(prompts) -> Route; {type(value).__name__} is none of them."
    )


def _by_word(word: str, bank: ExpertBank) -> Dispatcher:
    if word in _BY_WORD and word in bank.experts:
        raise ValueError(
            f"dispatcher={word!r} can mean the kind of dispatcher or the expert of that name; pass "
            f"{_BY_WORD[word].__name__}(bank) or FixedDispatcher(bank, {word!r})."
        )
    if word in _BY_WORD:
        return _BY_WORD[word](bank)
    try:
        return FixedDispatcher(bank, word)
    except ValueError as error:
        raise ValueError(
            f"""dispatcher={word!r} is neither "prompt" nor "classifier" nor an expert. {error}"""
        ) from None
