"""Work that the processes of `accelerate launch` share, with the same result as in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed


T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """
    Which of how many processes this is.

    Args:
        index (`int`, *optional*, defaults to 0): Rank of this process.
        count (`int`, *optional*, defaults to 1): Number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """The processes that were launched together; one where nothing was launched."""
        joined = distributed.is_available() and distributed.is_initialized()
        if not joined and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState()  # joins them if nobody has yet
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.index == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th of the items, from `index` on."""
        return list(items[self.index :: self.count])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, one process after another. All must call this together."""
        gathered: list[T] = gather_object(items) if self.count > 1 else items
        return gathered
