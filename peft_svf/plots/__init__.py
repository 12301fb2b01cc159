"""Pictures of experts and of self-adaptation. Drawing needs the optional extra `plots` (matplotlib); tables do not."""

from peft_svf.plots.canvas import check_picture
from peft_svf.plots.confusion_matrix import confusion_matrix_figure, plot_confusion_matrix
from peft_svf.plots.learning_curve import learning_curve_figure, plot_learning_curve
from peft_svf.plots.levers import Levers, levers, levers_figure, plot_levers


__all__ = [
    "Levers",
    "check_picture",
    "confusion_matrix_figure",
    "learning_curve_figure",
    "levers",
    "levers_figure",
    "plot_confusion_matrix",
    "plot_learning_curve",
    "plot_levers",
]
