"""The pictures of `peft-svf inspect`: checked before anything is read, one file an expert where that is meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_svf.cli.output_files import check_output_file
from peft_svf.cli.sharing.inspected_experts import LEARNING_CURVE, Inspected
from peft_svf.dispatch.few_shot.examples import ADAPTATION_FILE
from peft_svf.plots import (
    Spectra,
    check_picture,
    plot_learning_curve,
    plot_levers,
    plot_mixture_weights,
    plot_moved_components,
    plot_spectra,
)


def check_pictures(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` if the picture that is asked for cannot be made; nothing was read."""
    if arguments.plot is None:
        if arguments.kind != "levers":
            raise ValueError(f"--kind {arguments.kind} says what to draw: add --plot FILE")
        return
    if arguments.kind == "spectra" and arguments.model is None:
        raise ValueError("--kind spectra draws the singular values of the base model: add --model FOLDER")
    check_output_file(arguments.plot, "--plot")
    check_picture(arguments.plot)


def draw_pictures(
    own: Sequence[Inspected], experts: Sequence[Inspected], spectra: Spectra | None, arguments: argparse.Namespace
) -> list[Path]:
    """Write the pictures and return their paths; those of single experts are named after them if there are several."""
    path: Path | None = arguments.plot
    if path is None:
        return []
    if arguments.kind == "components":
        plot_moved_components({one.name: one.expert for one in experts}, path)
        return [path]
    if arguments.kind == "spectra" and spectra is not None:
        plot_spectra(spectra, path, Path(arguments.model).resolve().name)
        return [path]
    draw = _drawers()[arguments.kind]
    paths = [path] if len(own) == 1 else [path.with_name(f"{path.stem}-{one.name}{path.suffix}") for one in own]
    for one, target in zip(own, paths, strict=True):
        draw(one, target)
    return paths


def _drawers() -> dict[str, Callable[[Inspected, Path], None]]:
    return {
        "levers": lambda one, path: plot_levers(one.expert, path, one.facts.name),
        "mixture": _draw_mixture,
        "learning-curve": _draw_learning_curve,
    }


def _draw_mixture(one: Inspected, path: Path) -> None:
    weights = one.mixture()
    if weights is None:
        raise ValueError(f"{one.expert.source} has no {ADAPTATION_FILE}: it was not made by `peft-svf adapt`")
    plot_mixture_weights(weights, path, one.facts.name)


def _draw_learning_curve(one: Inspected, path: Path) -> None:
    curve = one.learning_curve()
    if curve is None:
        raise ValueError(f"{one.expert.source} has no {LEARNING_CURVE} and none in its facts; training draws its own")
    plot_learning_curve(curve, path, title=one.facts.name)
