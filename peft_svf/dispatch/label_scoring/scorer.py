"""LabelScorer: log-probabilities of labels after prompts, whichever way the model allows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from peft_svf.dispatch.label_scoring.forward import LastLogits
from peft_svf.dispatch.label_scoring.label_tree import split_into_trees
from peft_svf.dispatch.label_scoring.packing import PackedPrompts
from peft_svf.dispatch.label_scoring.prefix_cache import PrefixCache, for_rows
from peft_svf.dispatch.template import RoutingTemplate


class LabelScorer:
    """
    Scores fixed labels as the next text after a rendered prompt; several threads may share one scorer.

    The prefix cache belongs to the weights that it was computed with: call a scorer only ever under the same adapter
    state, or tell it with `version` that the state is another one. A plain forward for each prompt gives the same
    result where the cache cannot be used: state space and linear attention layers, alibi, sliding windows that are
    shorter than a prompt with its instruction, flash-attention (and every other attention but sdpa and eager) if
    labels have several tokens, attention for which transformers makes no masks, and prompts that change the tokens
    of the prefix. Whether the cached forward can be trusted is also tried out once, on two probes. Flash-attention
    itself was not tested: its tests run an attention function of that name with its contract (2-D masks, no 4-D ones).

    Args:
        model (`PreTrainedModel`): a causal language model.
        template (`RoutingTemplate`): renders and tokenizes what precedes the label.
        labels (`Sequence[str]`):
            At least one. If the tokens of one begin another, all get the end token appended, if there is one.
        use_cache (`bool`, *optional*, defaults to `True`): `False` always takes the plain forward.
        max_logits (`int`, *optional*, defaults to `2**26`):
            How many logits one forward may compute, rows × positions × vocabulary (256 MiB in float32); prompts, then
            labels, are split accordingly. One row with one label is never split.
        max_tokens (`int`, *optional*, defaults to `2**14`):
            How many tokens one forward may see, the cached ones included; prompts are split accordingly.

    Raises:
        ValueError: no labels, or labels that the tokenizer cannot tell apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        template: RoutingTemplate,
        labels: Sequence[str],
        use_cache: bool = True,
        max_logits: int = 2**26,
        max_tokens: int = 2**14,
    ) -> None:
        self.model, self.template, self.labels = model, template, tuple(labels)
        self.label_ids = _told_apart(self.labels, template)
        self.prefix = template.prefix_ids()
        self.use_cache, self.max_logits, self.max_tokens = use_cache, max_logits, max_tokens
        pad = template.tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad  # masked, any id will do
        self._forward = LastLogits(model)
        self._longest_tail = max(map(len, self.label_ids)) - 1
        nodes = min(max_logits // self._forward.vocabulary - 1, max_tokens // 2)
        self._trees = split_into_trees(self.label_ids, max(1, nodes))
        self._cache = PrefixCache(self._forward, self.prefix, self._longest_tail > 0, self._error_on_probes)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], version: Hashable = None) -> Tensor:
        """
        Log-probability of every label after every prompt.

        Args:
            prompts (`Sequence[str]`): B texts.
            version (`Hashable`, *optional*):
                Which state the weights are in; a value other than the last call's makes the prefix be computed anew.

        Returns:
            `torch.Tensor` of shape `(B, L)`, float32, on the CPU.

        Raises:
            ValueError: prompt, instruction and label together are longer than the context of the model, or the model
                gives scores that are not finite.
        """
        rows = [self.template.encode(prompt) for prompt in prompts]
        for row in rows:
            self._check_length(len(row))
        cache = self._cache.get(version) if self.use_cache and rows else None
        cached = [] if cache is None else [i for i, row in enumerate(rows) if self._fits_cache(row)]
        scores = torch.empty(len(rows), len(self.labels))
        if cache is not None and cached:
            scores[cached] = self._score_cached(cache, [rows[i] for i in cached])
        for i in sorted(set(range(len(rows))) - set(cached)):
            scores[i] = self._score_plain(rows[i])
        if not scores.isfinite().all():
            raise ValueError(
                f"{type(self.model).__name__} gives labels scores that are not finite numbers: its weights, or those "
                f"of the expert that classifies, hold NaN, or overflow in {self.model.dtype}."
            )
        return scores

    def _check_length(self, prompt_tokens: int) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = prompt_tokens + self._longest_tail
        if context is not None and needed > context:
            raise ValueError(
                f"Routing this prompt takes {needed} tokens with its instruction ({len(self.prefix)}), the model has "
                f"a context of {context}; shorten the prompt or pin an expert with expert=..."
            )

    # ---------------------------------------------------------------- plain forward
    def _score_plain(self, row: list[int]) -> Tensor:
        """Scores (L,) by forwards whose rows are the prompt with a label without its last token, right padded."""
        labels = sorted(range(len(self.labels)), key=lambda i: self.label_ids[i])
        width, keep = len(row) + self._longest_tail, self._longest_tail + 1
        each = min(self.max_logits // self._forward.computed(keep, width), self.max_tokens // width)
        scores = torch.empty(len(labels))
        for group in _groups_of_tails(labels, self.label_ids, max(1, each)):
            scores[group] = self._score_group(row, group)
        return scores

    def _score_group(self, row: list[int], group: list[int]) -> Tensor:
        tails = list(dict.fromkeys(tuple(self.label_ids[i][:-1]) for i in group))
        longest = max(map(len, tails))
        ids = torch.full((len(tails), len(row) + longest), self._pad)
        mask = torch.zeros_like(ids)
        for i, tail in enumerate(tails):
            length = len(row) + len(tail)
            ids[i, :length] = torch.tensor([*row, *tail])
            mask[i, :length] = 1
        logits = self._forward({"input_ids": ids, "attention_mask": mask}, longest + 1).float()
        logp = logits.log_softmax(-1)  # (tails, longest + 1, V); column 0 is the decision
        scores = []
        for label in (self.label_ids[i] for i in group):
            own = logp[tails.index(tuple(label[:-1]))]
            scores.append(own[torch.arange(len(label)), torch.tensor(label)].sum())
        return torch.stack(scores).cpu()

    # ---------------------------------------------------------------- cached forward
    def _fits_cache(self, row: list[int]) -> bool:
        length, window = len(self.prefix), self._cache.window
        if window is not None and len(row) + max(map(len, self._trees)) > window:
            return False
        return row[:length] == self.prefix and len(row) > length

    def _score_cached(self, cache: DynamicCache, rows: list[list[int]]) -> Tensor:
        """Scores (B, L) of prompts that begin with the prefix."""
        scores = torch.empty(len(rows), len(self.labels))
        for batch in self._batches(rows):
            scores[batch] = self._score_batch(cache, [rows[i] for i in batch])
        return scores

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """The indices of rows in batches that keep to the limits; rows of similar length together."""
        members = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        nodes = max(map(len, self._trees))
        while members:
            width = len(rows[members[0]]) + nodes
            logits = self._forward.computed(nodes + 1, width - len(self.prefix))
            count = max(1, min(self.max_logits // logits, self.max_tokens // width))
            yield members[:count]
            members = members[count:]

    def _score_batch(self, cache: DynamicCache, rows: list[list[int]]) -> Tensor:
        """Scores (B, L) of the rows of one forward; a forward for each tree, to be exact."""
        prompts = PackedPrompts([row[len(self.prefix) :] for row in rows], len(self.prefix), self._pad)
        cache = for_rows(cache, len(rows))
        scores = torch.empty(len(rows), len(self.labels))
        first: Tensor | None = None  # log-probabilities of the next token after the prompts, (B, V)
        for tree in self._trees:
            if first is None:
                logits = self._forward(prompts.with_tree(tree), len(tree) + 1, cache)
                first, logits = logits[:, 0].float().log_softmax(-1), logits[:, 1:]
            elif len(tree):
                logits = self._forward(prompts.tree_only(tree), len(tree), cache)
            scores[:, tree.members] = tree.read(first, logits).cpu()
            cache.crop(-len(tree))  # the prompts stay in the cache for the next tree
        return scores

    def _error_on_probes(self, cache: DynamicCache) -> float:
        """How much the scores of two probes of different length differ between both ways."""
        probes = [self.template.encode(text) for text in ("a", "7 x and some more words")]
        if not all(map(self._fits_cache, probes)):
            return float("inf")
        fast = self._score_cached(cache, probes)
        slow = torch.stack([self._score_plain(probe) for probe in probes])
        return (fast - slow).abs().max().item()


def _told_apart(labels: Sequence[str], template: RoutingTemplate) -> list[list[int]]:
    """Token ids of the labels; with the end token if one begins another: "math" would always beat "mathematics"."""
    if not labels:
        raise ValueError("There are no labels to score.")
    label_ids = [template.label_ids(label) for label in labels]
    order = sorted(range(len(labels)), key=lambda i: label_ids[i])
    for i, j in pairwise(order):  # what begins another comes right before one that it begins
        if label_ids[i] == label_ids[j] or not label_ids[i]:
            raise ValueError(
                f"The tokenizer makes the same tokens of the labels {labels[i]!r} and {labels[j]!r}, or none; choose "
                "labels of other letters."
            )
    clash = any(label_ids[j][: len(label_ids[i])] == label_ids[i] for i, j in pairwise(order))
    end = template.tokenizer.eos_token_id
    return [[*ids, end] for ids in label_ids] if clash and end is not None else label_ids


def _groups_of_tails(labels: list[int], label_ids: list[list[int]], most: int) -> Iterator[list[int]]:
    """Labels in groups of at most `most` distinct beginnings (all but the last token)."""
    group: list[int] = []
    tails: set[tuple[int, ...]] = set()
    for label in labels:
        tail = tuple(label_ids[label][:-1])
        if group and len(tails | {tail}) > most:
            yield group
            group, tails = [], set()
        group.append(label)
        tails.add(tail)
    yield group
