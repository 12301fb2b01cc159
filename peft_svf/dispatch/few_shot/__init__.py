"""Few-shot adaptation: the mixture of experts that answers a few examples best (Transformer², strategy C)."""
