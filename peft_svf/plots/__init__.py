"""Pictures of experts and of self-adaptation. Drawing needs the optional extra `plots` (matplotlib); tables do not."""

from peft_svf.plots.canvas import check_picture
from peft_svf.plots.confusion_matrix import confusion_matrix_figure, plot_confusion_matrix
from peft_svf.plots.learning_curve import learning_curve_figure, plot_learning_curve
from peft_svf.plots.levers import Levers, levers, levers_figure, plot_levers
from peft_svf.plots.levers_table import LeverTotals, grid_text, lever_totals, levers_table, signed
from peft_svf.plots.mixture_weights import mixture_weights_figure, plot_mixture_weights
from peft_svf.plots.moved_components import moved_components, moved_components_figure, plot_moved_components
from peft_svf.plots.spectra import Spectra, read_spectra, relative_changes
from peft_svf.plots.spectra_picture import plot_spectra, spectra_figure


__all__ = [
    "LeverTotals",
    "Levers",
    "Spectra",
    "check_picture",
    "confusion_matrix_figure",
    "grid_text",
    "learning_curve_figure",
    "lever_totals",
    "levers",
    "levers_figure",
    "levers_table",
    "mixture_weights_figure",
    "moved_components",
    "moved_components_figure",
    "plot_confusion_matrix",
    "plot_learning_curve",
    "plot_levers",
    "plot_mixture_weights",
    "plot_moved_components",
    "plot_spectra",
    "read_spectra",
    "relative_changes",
    "signed",
    "spectra_figure",
]
