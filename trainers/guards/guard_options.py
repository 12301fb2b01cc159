"""What the options of the guards must be, checked when the configuration is made."""

from __future__ import annotations

from typing import Any


def check_guard_options(args: Any) -> None:
    """Raise for patiences and thresholds that cannot work."""
    patience = args.early_stopping_patience
    if patience is not None:
        if patience < 1:
            raise ValueError(
                f"`early_stopping_patience` is a number of evaluations, at least 1, not {patience}: leave it out to "
                "train to the end."
            )
        if not args.load_best_model_at_end:
            raise ValueError(
                "`early_stopping_patience` stops when the best checkpoint has not improved: it needs "
                "`load_best_model_at_end=True`, which also returns to that checkpoint."
            )
    for name in ("zero_variance_patience", "collapse_patience"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` is a number of steps, or 0 for never, not {getattr(args, name)}.")
    if not args.collapse_kl > 0.0:
        raise ValueError(
            f"`collapse_kl` is a KL in nats per token and must be positive, but it is {args.collapse_kl}: "
            "`collapse_patience=0` turns the guard off."
        )
