"""PrefixCache: keys and values of the tokens that all prompts begin with, filled once and never changed."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peft_svf.dispatch.label_scoring.forward import LastLogits
from peft_svf.dispatch.locking import PicklableLock


logger = logging.getLogger(__name__)


class PrefixCache:
    """
    The cached prefix of a scorer. Threads share it: the first one fills it, the others wait, and nobody changes it.

    It is filled again when the model has moved to another device, dtype or attention, or when the caller's `version`
    of the weights is a new one. Whether it can be used at all is known from the types of the model's cache layers
    (full attention, and sliding windows or chunks that prefix, prompt and labels fit into), from its attention
    (4-D masks need `"sdpa"` or `"eager"`), and from a trial on probes.

    Args:
        forward (`LastLogits`): the model.
        tokens (`Sequence[int]`): the prefix.
        needs_4d_mask (`bool`): whether labels have more than one token.
        error (`Callable[[DynamicCache], float]`):
            The largest difference of scores, with this cache and without one, on the probes of the trial.
    """

    def __init__(
        self,
        forward: LastLogits,
        tokens: Sequence[int],
        needs_4d_mask: bool,
        error: Callable[[DynamicCache], float],
    ) -> None:
        self.tokens, self.needs_4d_mask = list(tokens), needs_4d_mask
        self._forward, self.model = forward, forward.model
        self._error = error
        self._lock = PicklableLock()
        self._key: Hashable = None
        self._cache: DynamicCache | None = None
        self._trusted: dict[Hashable, bool] = {}  # outcome of the trial, by device, dtype and attention
        self.fills = 0

    def get(self, version: Hashable = None) -> DynamicCache | None:
        """The filled cache, not to be changed; `None` where the model cannot use one."""
        with self._lock:
            place = (self.model.device, self.model.dtype, self.model.config._attn_implementation)
            if self._key != (place, version):
                self._cache = None
                if self.tokens and self._trusted.get(place, True):
                    self._fill(place)
                self._key = (place, version)
            return self._cache

    @cached_property
    def window(self) -> int | None:
        """The most tokens for which the model's sliding windows and chunks do not matter; `None` if it has none."""
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        return min((layer.sliding_window - 1 for layer in layers if layer.is_sliding), default=None)

    def _fill(self, place: Hashable) -> None:
        try:
            if not self._is_possible():
                self._trusted[place] = False
                return
            cache = self._compute()
            if self._trusted.get(place) or self._passes_trial(place, cache):
                self._cache = cache
        except torch.OutOfMemoryError:
            raise  # a plain forward needs more
        except Exception as error:  # whatever a model without this feature raises
            self._trusted[place] = False
            logger.info("Routing without the prefix cache, which %s refuses: %s", type(self.model).__name__, error)

    def _passes_trial(self, place: Hashable, cache: DynamicCache) -> bool:
        error = self._error(cache)
        passed = error <= (1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1)
        if not math.isnan(error):  # that is the fault of the weights
            self._trusted[place] = passed
        if not passed:
            logger.info("Routing without the prefix cache, which changes the scores by %.1e", error)
        return passed

    def _is_possible(self) -> bool:
        attention = self.model.config._attn_implementation
        if attention not in ALL_MASK_ATTENTION_FUNCTIONS:  # transformers then drops every mask
            return False
        if self.needs_4d_mask and attention not in ("sdpa", "eager"):
            return False
        layers = DynamicCache(config=self.model.config).layers
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def _compute(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self._forward({"input_ids": torch.tensor([self.tokens])}, 1, cache)
        self.fills += 1
        return cache


def for_rows(cache: DynamicCache, rows: int) -> DynamicCache:
    """The cached prefix once for each of `rows` rows, to be written to; the original is left as it is."""
    rows_of = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    rows_of.layers = layers
    for layer in layers:  # the first update concatenates, that is: copies
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, *(-1,) * (layer.keys.dim() - 1))
            layer.values = layer.values.expand(rows, *(-1,) * (layer.values.dim() - 1))
    return rows_of
