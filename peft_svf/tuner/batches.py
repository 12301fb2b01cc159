"""BatchesByThread: which mixed batch each thread runs a model under, shared by all adapted layers of the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch


if TYPE_CHECKING:
    from peft_svf.tuner.layer import SVFLayer


class RowOffsets(Protocol):
    """What an adapted layer needs to know of a mixed batch (see [`MixedBatch`])."""

    def row_offsets(self, layer: SVFLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The offsets for x, shape (k,) or (B, 1, …, k) with as many axes as x; `None` for the base model."""

    def offsets(self, layer: SVFLayer) -> torch.Tensor | None:
        """The offsets of the U distinct mixtures, shape (U, …, k); `None` if all are the base model."""


class BatchesByThread:
    """By thread, the mixed batches that it has entered and not left; the last one counts.

    Copies and pickles are empty, because a route belongs to the model that it was entered on.

    Attributes:
        in_use (`bool`): Whether any thread has a route. Compiled code depends on this only, not on the threads.
    """

    def __init__(self) -> None:
        self.in_use = False
        self._entered: dict[int, list[RowOffsets]] = {}
        self._lock = threading.Lock()

    def current(self) -> RowOffsets | None:
        """The mixed batch that this thread runs, if it runs one."""
        entered = self._entered.get(threading.get_ident())
        return entered[-1] if entered else None

    @contextmanager
    def entered(self, batch: RowOffsets) -> Iterator[None]:
        """Let this thread run under `batch`. Generators may leave in another order than they entered."""
        thread = threading.get_ident()  # not asked again: a generator may be closed by another thread
        try:
            with self._lock:
                self._entered.setdefault(thread, []).append(batch)
                self.in_use = True
            yield
        finally:
            with self._lock:
                self._leave(thread, batch)

    def _leave(self, thread: int, batch: RowOffsets) -> None:
        entered = self._entered.get(thread, [])
        places = [index for index, other in enumerate(entered) if other is batch]
        if places:
            del entered[places[-1]]
        if not entered:
            self._entered.pop(thread, None)
        self.in_use = bool(self._entered)

    def __reduce__(self) -> tuple[type[BatchesByThread], tuple[()]]:
        return BatchesByThread, ()
