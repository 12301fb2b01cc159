"""Peak memory of a training step: the allocator's count on CUDA; on a CPU, the bytes of all tensors alive at a time.

On a CPU the step runs on fake tensors, which have shapes and lifetimes but no data: the count is exact, takes no time,
and does not depend on what else the machine does. What kernels allocate inside is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the largest such count so far."""

    def __init__(self, alive_before: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in alive_before:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self._add, func(*args, **(kwargs or {})))

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return tensor

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(model: nn.Module, make_step: Callable[[torch.Tensor], Callable[[], Any]], tokens: torch.Tensor) -> int:
    """Peak memory of one step in steady state, weights included. On a CPU, `model` is of no use afterwards.

    Args:
        model (`nn.Module`): What is trained.
        make_step (`Callable`): Takes token ids and returns the step as a function; called once.
        tokens (`torch.Tensor`): The token ids, shape (rows, length).
    """
    if tokens.is_cuda:
        return _peak_on_cuda(make_step(tokens))
    with FakeTensorMode() as mode:
        _replace_by_fakes(model, mode)
        alive = [*model.parameters(), *model.buffers()]
        step = make_step(mode.from_tensor(tokens))
        with LiveBytes(alive) as count:
            step()  # creates the state of the optimizer
            count.peak = count.now
            step()
    return count.peak


def _peak_on_cuda(step: Callable[[], Any]) -> int:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _replace_by_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)
