"""The parts of adaptation.py, one file each; `PARTS` maps the names that `--parts` takes to them.

Every part yields pieces of the report, in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from adapting import first_pass, generation_of_candidates, mixed_batch, routing, unseen
from adapting.setting import Setting


PARTS: dict[str, Callable[[Setting], Iterator[str]]] = {
    "first-pass": first_pass.measure,
    "mixed-batch": mixed_batch.measure,
    "cem": generation_of_candidates.measure,
    "routing": routing.measure,
    "unseen": unseen.measure,
}
