"""LabelTree: the tokens of several labels without their last ones, each common beginning only once.

    "word count" = (a b c), "word play" = (a b d), "sums" = (s):    a ── b        nodes: (a), (a b)

A node is a beginning of a label; the token after it is predicted there. First tokens are predicted before the tree, at
the end of the prompt. Hundreds of labels that begin alike ("expert-17") cost little more than a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelTree:
    """
    Some labels of a scorer as a tree of tokens.

    Args:
        members (`list[int]`): which labels of the scorer these are; L of them.
        first (`Tensor` of shape `(L,)`): the first token of each label.
        tokens (`Tensor` of shape `(T,)`): the token of each node.
        depths (`Tensor` of shape `(T,)`): its position behind the prompt, from 0.
        visible (`Tensor` of shape `(T, T)`, bool): what each node attends to: the nodes it begins with, and itself.
        steps (`Tensor` of shape `(3, S)`):
            One column for each further token of a label: position in `members`, node that predicts it, the token.
    """

    members: list[int]
    first: Tensor
    tokens: Tensor
    depths: Tensor
    visible: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, label_ids: Sequence[Sequence[int]], members: list[int]) -> LabelTree:
        """The tree of the labels `members` out of `label_ids`."""
        nodes: dict[tuple[int, ...], int] = {}
        steps = []
        for position, member in enumerate(members):
            for beginning, token in _beginnings(label_ids[member]):
                steps.append((position, nodes.setdefault(beginning, len(nodes)), token))
        visible = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for beginning, node in nodes.items():
            visible[node, [nodes[beginning[:length]] for length in range(1, len(beginning) + 1)]] = True
        return cls(
            members,
            torch.tensor([label_ids[member][0] for member in members]),
            torch.tensor([beginning[-1] for beginning in nodes], dtype=torch.long),
            torch.tensor([len(beginning) - 1 for beginning in nodes], dtype=torch.long),
            visible,
            torch.tensor(steps, dtype=torch.long).reshape(-1, 3).T,
        )

    def read(self, first: Tensor, logits: Tensor) -> Tensor:
        """
        Log-probabilities of the labels.

        Args:
            first (`Tensor` of shape `(B, V)`): log-probabilities of the next token after each prompt.
            logits (`Tensor` of shape `(B, T, V)`): logits at the nodes.

        Returns:
            `Tensor` of shape `(B, L)`.
        """
        scores = first[:, self.first.to(first.device)]
        if not len(self):
            return scores
        position, node, token = self.steps.to(logits.device)
        logits = logits.float()
        further = logits[:, node, token] - logits.logsumexp(-1)[:, node]  # (B, S)
        return scores.index_add(1, position.to(first.device), further.to(first.device))


def split_into_trees(label_ids: Sequence[Sequence[int]], most: int) -> list[LabelTree]:
    """Trees of at most `most` nodes (or of one label), which together hold all labels."""
    trees: list[LabelTree] = []
    members: list[int] = []
    nodes: set[tuple[int, ...]] = set()
    for member in sorted(range(len(label_ids)), key=lambda i: list(label_ids[i])):  # those that begin alike together
        added = {beginning for beginning, _ in _beginnings(label_ids[member])}
        if members and len(nodes | added) > most:
            trees.append(LabelTree.build(label_ids, members))
            members, nodes = [], set()
        members.append(member)
        nodes |= added
    return [*trees, LabelTree.build(label_ids, members)]


def _beginnings(label: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each proper beginning of a label that is not empty, with the token after it."""
    return ((tuple(label[:length]), label[length]) for length in range(1, len(label)))
