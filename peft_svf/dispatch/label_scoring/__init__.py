"""Log-probabilities of a set of labels after each prompt, from one forward over a cached instruction prefix."""

from peft_svf.dispatch.label_scoring.scorer import LabelScorer


__all__ = ["LabelScorer"]
