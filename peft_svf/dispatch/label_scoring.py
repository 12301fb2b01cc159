"""LabelScorer: log-probabilities of a few labels after each prompt, from one forward over a cached instruction prefix.

Row layout of the cached forward, behind the P tokens of the prefix (n: longest prompt tail; column n − 1 decides):

    [ pad … pad | own prompt tail, right aligned | label 0 tail | label 1 tail | … ]

A label tail is the label without its last token: its j-th token is predicted at the position before it. Tails see the
prefix and the prompt but not one another, by a 4-D attention mask; one-token labels need none.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from peft_svf.dispatch.template import RoutingTemplate


logger = logging.getLogger(__name__)


class LabelScorer:
    """
    Scores fixed labels as the next text after a rendered prompt.

    The prefix cache belongs to the weights that the first call computes with: call a scorer only ever under the same
    adapter state. Where cache or mask are not supported (sliding windows, state space models, alibi, flash attention
    with long labels), or a prompt changes the tokens of the prefix, a plain forward for each prompt gives the same
    result; whether the cached forward can be trusted is tried out once, on two probes.

    Args:
        model (`PreTrainedModel`): a causal language model.
        template (`RoutingTemplate`): renders and tokenizes what precedes the label.
        labels (`Sequence[str]`): at least one. If the tokens of one begin another, all get the end token appended.
        use_cache (`bool`, *optional*, defaults to `True`): `False` always takes the plain forward.
    """

    def __init__(
        self, model: PreTrainedModel, template: RoutingTemplate, labels: Sequence[str], use_cache: bool = True
    ) -> None:
        self.model, self.template, self.labels = model, template, tuple(labels)
        self.label_ids = _prefix_free([template.label_ids(label) for label in labels], template.tokenizer.eos_token_id)
        self.tails = [ids[:-1] for ids in self.label_ids]
        self.prefix = template.prefix_ids()
        self.use_cache = use_cache
        pad = template.tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad  # masked, any id will do
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: DynamicCache | None = None
        self._cache_place: tuple[torch.device, torch.dtype] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """
        Log-probability of every label after every prompt.

        Args:
            prompts (`Sequence[str]`): B texts.

        Returns:
            `torch.Tensor` of shape `(B, L)`, float32, on the CPU.

        Raises:
            ValueError: prompt, instruction and label together are longer than the context of the model.
        """
        rows = [self.template.encode(prompt) for prompt in prompts]
        for row in rows:
            self._check_length(len(row))
        length = len(self.prefix)
        trusted = self.use_cache and self._cache_is_ready()
        cached = [i for i, row in enumerate(rows) if trusted and row[:length] == self.prefix and len(row) > length]
        scores = torch.empty(len(rows), len(self.labels))
        if cached:
            scores[cached] = self._score_cached([rows[i][length:] for i in cached])
        for i in sorted(set(range(len(rows))) - set(cached)):
            scores[i] = self._score_plain(rows[i])
        return scores

    def _check_length(self, prompt_tokens: int) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = prompt_tokens + max(map(len, self.tails))
        if context is not None and needed > context:
            raise ValueError(
                f"Routing this prompt takes {needed} tokens with its instruction ({len(self.prefix)}), the model has "
                f"a context of {context}; shorten the prompt or pin an expert with expert=..."
            )

    # ---------------------------------------------------------------- plain forward
    def _score_plain(self, row: list[int]) -> Tensor:
        """Scores (L,) by one forward whose rows are the prompt with each distinct label tail, padded on the right."""
        tails = sorted({tuple(tail) for tail in self.tails})
        longest = max(map(len, tails))
        ids = torch.full((len(tails), len(row) + longest), self._pad)
        mask = torch.zeros_like(ids)
        for i, tail in enumerate(tails):
            length = len(row) + len(tail)
            ids[i, :length] = torch.tensor([*row, *tail])
            mask[i, :length] = 1
        keep = longest + 1
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
        ).logits
        logp = logits[:, -keep:].float().log_softmax(-1)  # (tails, longest + 1, V); column 0 is the decision
        scores = []
        for label in self.label_ids:
            own = logp[tails.index(tuple(label[:-1]))]
            scores.append(own[torch.arange(len(label)), torch.tensor(label)].sum())
        return torch.stack(scores).cpu()

    # ---------------------------------------------------------------- cached forward
    def _cache_is_ready(self) -> bool:
        """Fill the prefix cache if needed; `False` if this model cannot use it."""
        place = (self.model.device, self.model.dtype)
        if self._cache_place == place:
            return self._cache is not None
        self._cache, self._cache_place = None, place
        if not self.prefix or not self._cache_is_possible():
            return False
        try:
            self._fill_cache()
            trusted = self._cache_agrees()
        except Exception as error:  # whatever a model without this feature raises
            logger.info("Routing without the prefix cache, which %s refuses: %s", type(self.model).__name__, error)
            trusted = False
        if not trusted:
            self._cache = None
        return trusted

    def _cache_is_possible(self) -> bool:
        layers = DynamicCache(config=self.model.config).layers
        if any(type(layer) is not DynamicLayer for layer in layers):  # sliding windows, linear attention
            return False
        return not any(self.tails) or self.model.config._attn_implementation in ("sdpa", "eager")

    def _fill_cache(self) -> None:
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([self.prefix], device=self.model.device)
        options = {"logits_to_keep": 1} if self._keeps_logits else {}
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        self._cache = cache

    def _cache_agrees(self) -> bool:
        """Do both ways give the same scores on two probes of different length?"""
        probes = [self.template.encode(text) for text in ("a", "7 x and some more words")]
        fast = self._score_cached([probe[len(self.prefix) :] for probe in probes])
        slow = torch.stack([self._score_plain(probe) for probe in probes])
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1
        error = (fast - slow).abs().max().item()
        if not error <= tolerance:
            logger.info("Routing without the prefix cache, which changes the scores by %.1e", error)
        return error <= tolerance

    def _score_cached(self, rows: list[list[int]]) -> Tensor:
        """Scores (B, L) of prompts given as the tokens behind the prefix."""
        device, prefix = self.model.device, len(self.prefix)
        packed = [token for tail in self.tails for token in tail]
        batch, longest = len(rows), max(map(len, rows))
        ids = torch.full((batch, longest + len(packed)), self._pad)
        real = torch.zeros(batch, longest, dtype=torch.bool)  # (B, n)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) : longest] = torch.tensor(row)
            real[i, longest - len(row) :] = True
        positions = (prefix + real.long().cumsum(1) - 1).clamp(min=0)
        if packed:
            ids[:, longest:] = torch.tensor(packed)
            restart = torch.tensor([[j for tail in self.tails for j in range(len(tail))]])
            positions = torch.cat([positions, prefix + real.sum(1, keepdim=True) + restart], 1)
            mask = self._packed_mask(real)
        else:
            mask = torch.cat([torch.ones(batch, prefix, dtype=torch.long), real.long()], 1)
        options = {"logits_to_keep": len(packed) + 1} if self._keeps_logits else {}
        cache = copy.deepcopy(self._cache)
        assert cache is not None
        rows_of_prefix = torch.zeros(batch, dtype=torch.long, device=device)
        cache.reorder_cache(rows_of_prefix)  # type: ignore[arg-type]  # one copy of the prefix per row
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits
        return self._read_packed(logits[:, -len(packed) - 1 :].float().log_softmax(-1)).cpu()

    def _read_packed(self, logp: Tensor) -> Tensor:
        """From log-probabilities at the decision and at all label tails, (B, 1 + T, V), to scores (B, L)."""
        scores, start = [], 1
        for label, tail in zip(self.label_ids, self.tails, strict=True):
            columns = [0, *range(start, start + len(tail))]
            scores.append(logp[:, columns, label].sum(1))
            start += len(tail)
        return torch.stack(scores, 1)

    def _packed_mask(self, real: Tensor) -> Tensor:
        """Additive mask (B, 1, n + T, P + n + T): prompts causal, label tails mutually invisible."""
        batch, longest = real.shape
        prefix, packed = len(self.prefix), sum(map(len, self.tails))
        allow = torch.zeros(batch, 1, longest + packed, prefix + longest + packed, dtype=torch.bool)
        allow[..., :prefix] = True
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        allow[..., :longest, prefix : prefix + longest] = (causal & real[:, None, :])[:, None]
        allow[..., longest:, prefix : prefix + longest] = real[:, None, None, :]
        start = longest
        for tail in self.tails:
            stop = start + len(tail)
            allow[..., start:stop, prefix + start : prefix + stop] = torch.ones(len(tail), len(tail)).tril().bool()
            start = stop
        dtype = self.model.dtype
        return torch.zeros(allow.shape, dtype=dtype).masked_fill(~allow, torch.finfo(dtype).min)


def _prefix_free(label_ids: list[list[int]], end: int | None) -> list[list[int]]:
    """Append the end token to every label if one begins another: "math" would always beat "mathematics"."""
    clash = any(
        i != j and long[: len(short)] == short for i, short in enumerate(label_ids) for j, long in enumerate(label_ids)
    )
    return [[*ids, end] for ids in label_ids] if clash and end is not None else label_ids
