"""The pictures of a card, or in words why one is missing and how to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_svf.experts.expert import Expert
from peft_svf.hub_cards.card_files import CONFUSION, LEARNING_CURVE, LEVERS
from peft_svf.hub_cards.expert_facts import ExpertCardData


HOW_CURVE = "`peft_svf.plots.plot_learning_curve` draws it from `learning_curve.csv`"
NO_MATPLOTLIB = 'matplotlib was not installed when the card was written (`pip install "peft-svf[plots]"`)'


@dataclass(frozen=True)
class Picture:
    """
    One picture of a card.

    Args:
        title (`str`): What it shows.
        file (`str`): Its name in the card's folder.
        missing (`str`, *optional*): Why it is not there, in Markdown.
    """

    title: str
    file: str
    missing: str | None = None


def expert_pictures(
    facts: ExpertCardData, expert: Expert | None, folder: Path, staging: Path, draw: bool
) -> list[Picture]:
    """
    Draw the levers and the learning curve of an expert.

    Args:
        facts ([`ExpertCardData`]), expert ([`Expert`], *optional*): What is drawn.
        folder (`Path`): The card's; a learning curve that a training has drawn there is taken.
        staging (`Path`): Where the pictures are written.
        draw (`bool`): Otherwise they are missing.
    """
    how = f"`peft-svf inspect {facts.repo_id or 'path/to/this/folder'} --plot {LEVERS}` draws it"
    levers = "Levers: how far z is from 1, by layer, module and group of singular values"
    curve = "Learning curve: reward by step"
    if not draw:
        later = "it was not drawn yet"
        return [Picture(levers, LEVERS, f"{later}; {how}"), Picture(curve, LEARNING_CURVE, f"{later}; {HOW_CURVE}")]
    return [_levers(levers, how, facts, expert, staging), _curve(curve, facts, folder, staging)]


def confusion_picture(confusion: Any, staging: Path, draw: bool) -> Picture:
    """Draw the confusion matrix of a bank's dispatcher."""
    title, how = "Confusion matrix of the dispatcher", "`peft-svf route --plot` draws it"
    if not draw:
        return Picture(title, CONFUSION, f"it was not drawn yet; {how}")

    def plot(path: Path) -> None:
        from peft_svf.plots import plot_confusion_matrix

        plot_confusion_matrix(confusion.counts, confusion.true, confusion.chosen, path)

    return _drawn(title, CONFUSION, plot, staging, how)


def _levers(title: str, how: str, facts: ExpertCardData, expert: Expert | None, staging: Path) -> Picture:
    if expert is None:
        return Picture(title, LEVERS, f"there was no adapter beside the card; {how}")
    if expert.config.parametrization != "offset":
        why = "the adapter holds logits, which become z only with the singular values of the base model"
        return Picture(title, LEVERS, f"{why}; `Expert.from_model` of the loaded model gives z")

    def plot(path: Path) -> None:
        from peft_svf.plots import plot_levers

        plot_levers(expert, path, facts.name)

    return _drawn(title, LEVERS, plot, staging, how)


def _curve(title: str, facts: ExpertCardData, folder: Path, staging: Path) -> Picture:
    if (folder / LEARNING_CURVE).is_file():
        return Picture(title, LEARNING_CURVE)
    rows = [dict(row) for row in facts.learning_curve if "step" in row]
    if not rows:
        return Picture(title, LEARNING_CURVE, "the rewards by step are not recorded")

    def plot(path: Path) -> None:
        from peft_svf.plots import plot_learning_curve

        plot_learning_curve(rows, path)

    return _drawn(title, LEARNING_CURVE, plot, staging, HOW_CURVE)


def _drawn(title: str, file: str, plot: Callable[[Path], None], staging: Path, how: str) -> Picture:
    try:
        plot(staging / file)
    except ImportError:
        return Picture(title, file, f"{NO_MATPLOTLIB}; {how}")
    except ValueError:  # facts that cannot be drawn are no reason for no card
        return Picture(title, file, f"what is recorded cannot be drawn; {how}")
    return Picture(title, file)
