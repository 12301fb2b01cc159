"""ExpertError: what cannot be done with experts, banks and their repositories."""

from __future__ import annotations


class ExpertError(Exception):
    """
    An expert, a bank or a repository of them that cannot be used; the message names the thing and the remedy.

    Deliberately not a `ValueError`: `transformers.pipeline` catches OSError, ValueError, TypeError and RuntimeError
    while it loads a model, tries again in float32 and buries the message under two tracebacks.
    """


class HubError(ExpertError):
    """The Hub refused, has no such repository, or cannot be reached."""
