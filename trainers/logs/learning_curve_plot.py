"""The picture of the learning curve, which [`peft_svf.plots`] draws, under the names that trainings know it by."""

from __future__ import annotations

from peft_svf.plots.learning_curve import (
    best_step,
    learning_curve_figure,
    plot_learning_curve,
    series,
    validation_rewards,
)


__all__ = ["best_step", "learning_curve_figure", "plot_learning_curve", "series", "validation_rewards"]
