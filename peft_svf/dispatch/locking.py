"""PicklableLock: a lock for objects that are copied or sent to other processes, which get a lock of their own."""

from __future__ import annotations

import threading
from types import TracebackType


class PicklableLock:
    """A `threading.RLock` that copies and pickles as a new, free one: data loader workers pickle whole pipelines."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[PicklableLock], tuple[()]]:
        return PicklableLock, ()
