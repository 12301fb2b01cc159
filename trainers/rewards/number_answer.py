"""Which number a completion states as its final answer."""

from __future__ import annotations

import itertools
import re

from peft_svf.trainers.rewards.numbers import NumberInText, Quantity, find_numbers, parse_number, plain
from peft_svf.trainers.rewards.stated_answer import (
    Statement,
    boxes,
    copied_from,
    last_sentence_with_digits,
    statements,
)


# Between "the answer is" and its number.
_LEAD = re.compile(
    r"[\s*_`\"'“”(\[{$:=>~≈-]*(?:(?:approximately|about|exactly|around|roughly|only|just|simply|thus|therefore|then"
    r"|indeed|now|equal\sto|given\sby|a\stotal\sof|either|between|maybe|perhaps|probably|both)[\s*_:(\[{$]*)*"
    r"(?:\\[(\[]\s*)?(?:[A-Za-z]\w{0,20}\s*=[\s$]*)?",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"(?<![A-Za-z])(?:not|never|cannot|unknown)(?![A-Za-z])|n['’]t(?![A-Za-z])", re.IGNORECASE)
_BREAKS = re.compile(
    r"(?<![A-Za-z])(?:because|since|so|with|which|where|as|when|if|after|from|by|for|than|of|per|then)(?![A-Za-z])",
    re.IGNORECASE,
)
# Between two numbers that are listed: "3 or 4", "3 apples and 4 pears", "3, maybe 4", "3 4".
_JOINED = re.compile(
    r"(?:\s|\*\*|\$|[.()\[\]])*(?:[A-Za-z'-]{1,20}\s?){0,3}(?:\s|[$*)\]])*"
    r"(?:,?\s*(?:and|or|to|through|nor|versus|maybe|perhaps|possibly|alternatively)(?![A-Za-z])|[,;/&])"
    r"(?:\s*(?:maybe|perhaps|possibly|either|even)(?![A-Za-z]))?(?:[\s*_$(\[{]|[A-Za-z]\s?=)*",
    re.IGNORECASE,
)
_IS_RESULT = re.compile(r"=\s?(?:[A-Z]{0,3}[$€£]\s?|\*\*)?$")
_CONCLUDES = re.compile(
    r"(?<![A-Za-z])(?:so|thus|therefore|hence)[,:]?\s+(?:[A-Z]{0,3}[$€£]\s?|\*\*)?$", re.IGNORECASE
)


def stated_numbers(completion: str, prompt: str = "") -> list[Quantity]:
    """
    The final answer of a completion, as numbers.

    The last statement that holds a number counts: `#### 42`, `\\boxed{42}`, `<answer>42</answer>`, "The answer is 42",
    "**Answer:** $42". Without any statement it is what the last sentence that is no remark on the solution itself ends
    in ("2+1=3, so 31"), or else the result of its last equation, or else its last number: "It costs 42 dollars. I used
    2 steps." states 42. A text that ends in a question, or in a sentence copied from the prompt, states nothing.

    Args:
        completion (`str`): What the model wrote, without the prompt.
        prompt (`str`, *optional*, defaults to `""`): What it was asked, to recognise sentences that it only copied.

    Returns:
        `list[Quantity]`: One number; several if one statement gives different ones ("3 or 4"); none if no number is
        stated.
    """
    for statement in reversed(statements(completion)):
        if numbers := _in_statement(statement):
            return _different(numbers)
    return _different(_in_last_sentence(completion, prompt))


def _in_statement(statement: Statement) -> list[Quantity]:
    if statement.kind in ("words", "hashes"):
        return _in_words(statement.parts[0], complete=statement.kind == "hashes")
    numbers: list[Quantity] = []
    for part in statement.parts:
        numbers += _in_words(part, complete=True)
    return numbers


def _in_words(text: str, complete: bool) -> list[Quantity]:
    """Numbers that a passage gives as the answer; with `complete`, nothing but numbers and units may stand in it."""
    for _, _, inner in boxes(text):
        text = inner
    if (single := parse_number(text)) is not None:
        return [single]
    text = plain(text)
    found = list(find_numbers(text))
    if not found or _NEGATED.search(text[: found[0].start]):
        return []
    readable = [number.quantity for number in found if number.quantity]
    if _LEAD.fullmatch(text[: found[0].start]) and found[0].quantity:
        listed = [found[0].quantity, *_joined(text, found)]
        return [] if complete and not _nothing_else(text, found) else listed
    # An equation ("6 * 7 = 42"), or words before the only number ("the answer is that she makes 42 dollars").
    return readable if len(set(readable)) == 1 and (not complete or "=" in text) else []


def _nothing_else(text: str, found: list[NumberInText]) -> bool:
    """Whether only units follow the last number: "3 or 4 cm", but not "3. Compute the total"."""
    rest = text[found[-1].end :]
    return not re.search(r"[.:;]\s*[A-Za-z]", rest) and len(rest.split()) <= 6


def _joined(text: str, found: list[NumberInText]) -> list[Quantity]:
    listed = []
    for before, number in itertools.pairwise(found):
        between = text[before.end : number.start]
        if number.quantity is None or not _is_join(between):
            break
        listed.append(number.quantity)
    return listed


def _is_join(between: str) -> bool:
    """Whether the text between two numbers lists them: "3 or 4", "3 apples and 4 pears", "3 4"."""
    if not between.strip():
        return True
    return len(between) <= 60 and not _BREAKS.search(between) and _JOINED.fullmatch(between) is not None


def _in_last_sentence(completion: str, prompt: str) -> list[Quantity]:
    sentence = last_sentence_with_digits(completion)
    if sentence is None or "\\boxed" in sentence or copied_from(sentence, prompt):  # a box that was cut off
        return []
    text = plain(sentence[-1000:])
    found = list(find_numbers(text))
    if not found:
        return []
    results = [i for i, number in enumerate(found) if _IS_RESULT.search(text, 0, number.start)]
    if _CONCLUDES.search(text, 0, found[-1].start) and _nothing_else(text, found):
        results.append(len(found) - 1)
    last = results[-1] if results else len(found) - 1
    stated = found[last].quantity
    if stated is None or _NEGATED.search(text[max(0, found[last].start - 12) : found[last].start]):
        return []
    if results:
        return [stated, *_joined(text, found[last:])]
    listed = [stated]
    for before, number in zip(found[-2::-1], found[:0:-1], strict=False):
        if before.quantity is None or not _is_join(text[before.end : number.start]):
            break
        listed.insert(0, before.quantity)
    return listed


def _different(numbers: list[Quantity]) -> list[Quantity]:
    """One of each value, unless two of the same value differ in their known units (5 hours and 5 minutes)."""
    return list({(number.value, number.percent, number.unit): number for number in numbers}.values())
