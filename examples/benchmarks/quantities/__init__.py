"""The quantities that tuner.py measures, one file each; `QUANTITIES` maps the names that `--parts` takes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from report import Row

from quantities import basis, expert_file, memory, merged, mixed_batch, switching, training
from quantities.setting import Setting


# For every shape and dtype.
QUANTITIES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "basis": basis.measure,
    "memory": memory.measure,
    "merged": merged.measure,
    "training": training.measure,
    "mixed": mixed_batch.measure,
    "file": expert_file.measure,
}
# Once: these do not depend on shape and dtype.
SINGLE_QUANTITIES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "switching": switching.measure,
    "8b": memory.compute_8b,
    "8b-file": expert_file.measure_8b,
}
