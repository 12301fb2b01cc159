"""The levers picture of a mixture, as the app shows it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from page import mixture_in_words, note, picture

from peft_svf.experts import ExpertBank, ExpertError
from peft_svf.experts.algebra import mix
from peft_svf.experts.expert import Expert
from peft_svf.plots import levers_figure


def levers(bank: ExpertBank, weights: Mapping[str, float]) -> str:
    """The picture of the mixture that answered, or a note that says why there is none."""
    if not weights:
        return note("The base model answered alone: it leaves every singular value as it is.")
    try:
        source = data_uri(levers_figure(mixed_expert(bank, weights)))
    except (ImportError, ExpertError) as error:
        return note(str(error))
    words = mixture_in_words(weights, bank)
    return picture(source, f"The levers of {words}: z − 1 by layer, module and size of the singular values.")


def mixed_expert(bank: ExpertBank, weights: Mapping[str, float]) -> Expert:
    """The mixture as one expert."""
    return mix([Expert.from_model(bank.model, name) for name in weights], list(weights.values()))


def data_uri(figure: Any) -> str:
    """A matplotlib figure as the address of a PNG, so that nothing is written to a disk."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
