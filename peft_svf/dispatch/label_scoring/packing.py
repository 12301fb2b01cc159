"""Packing: the inputs of a cached forward, which scores all labels of a tree behind several prompts.

Row layout, behind the P tokens of the cached prefix (n: longest prompt tail; the column before the tree decides):

    [ pad … pad | own prompt tail, right aligned | nodes of the label tree ]

Nodes see the prefix, the prompt and the nodes that they begin with, by a 4-D attention mask; an empty tree (labels of
one token) needs none. Further trees are scored behind the same prompts, which are in the cache by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_svf.dispatch.label_scoring.label_tree import LabelTree


class PackedPrompts:
    """
    Prompts of one forward, given as the tokens behind the prefix.

    Args:
        rows (`Sequence[Sequence[int]]`): B token lists, none empty.
        prefix (`int`): P, how many tokens are cached before them.
        pad (`int`): any token; it is masked.
    """

    def __init__(self, rows: Sequence[Sequence[int]], prefix: int, pad: int) -> None:
        self.prefix, self.longest = prefix, max(map(len, rows))
        self.ids = torch.full((len(rows), self.longest), pad)  # (B, n)
        self.real = torch.zeros(len(rows), self.longest, dtype=torch.bool)  # (B, n)
        for i, row in enumerate(rows):
            self.ids[i, self.longest - len(row) :] = torch.tensor(row)
            self.real[i, self.longest - len(row) :] = True

    def with_tree(self, tree: LabelTree) -> dict[str, Tensor]:
        """The inputs of the first forward: prompts and tree, n + T tokens."""
        positions = (self.prefix + self.real.long().cumsum(1) - 1).clamp(min=0)
        if not len(tree):  # a 2-D mask, which every attention takes
            cached = torch.ones(len(self.ids), self.prefix, dtype=torch.long)
            mask = torch.cat([cached, self.real.long()], 1)  # (B, P + n)
            return {"input_ids": self.ids, "position_ids": positions, "attention_mask": mask}
        nodes = self.tree_only(tree)
        causal = torch.ones(self.longest, self.longest, dtype=torch.bool).tril() & self.real[:, None]  # (B, n, n)
        visible = torch.cat(
            [
                torch.ones(*self.ids.shape, self.prefix, dtype=torch.bool),
                causal,
                torch.zeros(*self.ids.shape, len(tree), dtype=torch.bool),
            ],
            -1,
        )
        return {
            "input_ids": torch.cat([self.ids, nodes["input_ids"]], 1),
            "position_ids": torch.cat([positions, nodes["position_ids"]], 1),
            "attention_mask": torch.cat([visible[:, None], nodes["attention_mask"]], 2),
        }

    def tree_only(self, tree: LabelTree) -> dict[str, Tensor]:
        """The inputs of a further forward, when the prompts are cached too: T tokens, mask (B, 1, T, P + n + T)."""
        rows, nodes = len(self.ids), len(tree)
        visible = torch.cat(
            [
                torch.ones(rows, nodes, self.prefix, dtype=torch.bool),
                self.real[:, None].expand(-1, nodes, -1),
                tree.visible.expand(rows, -1, -1),
            ],
            -1,
        )
        return {
            "input_ids": tree.tokens.expand(rows, -1),
            "position_ids": self.prefix + self.real.sum(1, keepdim=True) + tree.depths,
            "attention_mask": visible[:, None],
        }
