"""The app's page: pure functions from answers to HTML, and its style. Every text from outside is escaped here."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from answers import Answer

from peft_svf.experts import BASE_LABEL, ExpertBank


STYLE = (Path(__file__).parent / "style.css").read_text("utf-8")
BASE_NAME = "base model"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for the colour-blind too
NO_ANSWER_YET = "<i>no answer yet</i>"


def introduction(bank: ExpertBank, name: str, expected_seconds: float) -> str:
    """The head of the page: what this is, the bank's experts, and how long an answer takes."""
    experts = "".join(
        f"<li><b>{escape(entry.label)}</b> {escape(entry.description)}</li>" for entry in bank.experts.values()
    )
    return (
        "<header><h1>Transformer²</h1>"
        "<p>One base model, small experts. A first pass finds out which expert a prompt needs, a second pass answers "
        f"with it.</p><details><summary>Bank <b>{escape(name)}</b>: {counted(len(bank.experts), 'expert')}</summary>"
        f"<ul>{experts}</ul></details>"
        f"<p class='hint'>Both answers to a short prompt take about {seconds(expected_seconds)} on this machine.</p>"
        "</header>"
    )


def heading(text: str, hint: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2><p class='hint'>{escape(hint)}</p>"


def first_pass(answer: Answer, bank: ExpertBank) -> str:
    """What the dispatcher thinks of the prompt: the route, and a bar for the probability of every label."""
    if answer.scores is None:
        return note("The dispatcher was not asked: the knobs decide.")
    winner = label_of(bank, answer.expert)
    rows = "".join(
        f"<li{' class=chosen' if label == winner else ''}><span class='name'>{escape(label)}"
        f"{' <span class=tick>✓ chosen</span>' if label == winner else ''}</span>"
        f"<span class='value'>{percent(score)}</span>{bar(score)}</li>"
        for label, score in answer.scores.items()
    )
    return (
        f"<p class='route'>Route: <b>{escape(mixture_in_words(answer.weights, bank))}</b></p>"
        f"<ul class='scores' aria-label='Probability of each label'>{rows}</ul>"
    )


def base_answer(answer: Answer) -> str:
    """The answer of the base model alone."""
    return panel("Base model", "no expert", escape(answer.text), f"answered in {seconds(answer.answering_seconds)}")


def adapted_answer(answer: Answer, base: Answer, bank: ExpertBank) -> str:
    """The answer of the route; what the base model did not write is marked."""
    times = f"answered in {seconds(answer.answering_seconds)}"
    if answer.scores is not None:
        times = f"chosen in {seconds(answer.choosing_seconds)}, {times}"
    if answer.text == base.text:
        times = f"the same words as the base model, {times}"
    text = marked(answer.text, base.text)
    return panel("Adapted", mixture_in_words(answer.weights, bank), text, times, "adapted")


def panel(title: str, who: str, safe_text: str, footer: str, kind: str = "base") -> str:
    """One answer: who wrote it, the text as it is (`safe_text` is escaped already), and a line below."""
    shown = safe_text if safe_text.strip() else "<i>an empty answer</i>"
    return (
        f"<article class='answer {kind}'><h3>{escape(title)} <span class='who'>{escape(who)}</span></h3>"
        f"<pre>{shown}</pre><p class='footer'>{escape(footer)}</p></article>"
    )


def marked(text: str, other: str) -> str:
    """`text`, escaped, with those words marked that `other` has not at this place."""
    words, others = (re.findall(r"\w+|\s+|[^\w\s]", part) for part in (text, other))
    pieces = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        piece = escape("".join(words[start:end]))
        pieces.append(f"<mark>{piece}</mark>" if kind != "equal" and piece.strip() else piece)
    return "".join(pieces)


def mixture(weights: Mapping[str, float], bank: ExpertBank) -> str:
    """The mixture as one bar, its parts named below; more than 1 in all subtracts the base model."""
    shares = {**weights, BASE_LABEL: 1 - sum(weights.values())}
    shown = {name: share for name, share in shares.items() if abs(share) > 5e-4}
    size = sum(abs(share) for share in shown.values())
    names = list(bank.experts)
    segments = "".join(
        f"<span style='width:{100 * abs(share) / size:.2f}%;background:{color(name, names)}'></span>"
        for name, share in shown.items()
    )
    parts = "".join(
        f"<li><i style='background:{color(name, names)}'></i>{escape(label_of(bank, name, BASE_NAME))} "
        f"{share:.2f}</li>"
        for name, share in shown.items()
    )
    more = note("More than 1 in all, so the base model is subtracted.") if shares[BASE_LABEL] < -5e-4 else ""
    return f"<div class='mixture'><div class='stack' aria-hidden='true'>{segments}</div><ul>{parts}</ul>{more}</div>"


def picture(source: str, description: str) -> str:
    """A picture (a data URI) that scrolls in its own frame where the screen is narrow."""
    return (
        f"<figure class='levers' tabindex='0' role='group' aria-label='{escape(description)}'>"
        f"<img src='{escape(source)}' alt='{escape(description)}'></figure>"
    )


def note(text: str) -> str:
    """A quiet remark."""
    return f"<p class='note'>{escape(text)}</p>"


def complaint(text: str) -> str:
    """What the user can do about a prompt that has no answer."""
    return f"<p class='complaint' role='alert'>{escape(text)}</p>"


def mixture_in_words(weights: Mapping[str, float], bank: ExpertBank) -> str:
    """ "math", "base model", or "0.60 math + 0.20 code + 0.20 base model"."""
    rest = 1 - sum(weights.values())
    if not weights:
        return BASE_NAME
    if len(weights) == 1 and abs(rest) < 5e-4:
        return label_of(bank, next(iter(weights)))
    parts = [f"{weight:.2f} {label_of(bank, name)}" for name, weight in weights.items()]
    if abs(rest) >= 5e-4:
        parts.append(f"{rest:.2f} {BASE_NAME}")
    return " + ".join(parts).replace("+ -", "− ")


def label_of(bank: ExpertBank, name: str, base: str = BASE_LABEL) -> str:
    """The label of an expert; `base` for the base model."""
    return bank.experts[name].label if name in bank.experts else base if name == BASE_LABEL else name


def bar(share: float) -> str:
    """A bar of this share; the number stands beside it, so readers of screens skip the bar."""
    return f"<span class='bar' aria-hidden='true'><i style='width:{100 * share:.1f}%'></i></span>"


def color(name: str, names: Sequence[str]) -> str:
    """One colour for each expert; grey for the base model."""
    return COLORS[names.index(name) % len(COLORS)] if name in names else "#8b93a1"


def percent(share: float) -> str:
    """A probability for people."""
    return "> 99.9 %" if 0.9995 <= share < 1 else "< 0.1 %" if 0 < share < 5e-4 else f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.2f} s" if value >= 0.095 else f"{1000 * value:.0f} ms"


def counted(number: int, noun: str) -> str:
    """ "1 expert", "3 experts"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def escape(text: str) -> str:
    """Text that can stand anywhere in HTML, in attributes too."""
    return html.escape(text, quote=True)
