"""What the Hub's refusals and broken connections mean for somebody who pushes, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from peft_svf.experts.download import HTTP_ERROR, is_unreachable, status_of, told
from peft_svf.experts.errors import HubError


TOKENS = "https://huggingface.co/settings/tokens"
LOG_IN = f"log in with `hf auth login`, or set HF_TOKEN to a token with write access from {TOKENS}"
HUB_FAULTS: tuple[type[Exception], ...] = (HTTP_ERROR, OSError)  # OSError covers the Hub's own answers
_CAUGHT: tuple[type[Exception], ...] = (*HUB_FAULTS, ValueError, RuntimeError)


@contextmanager
def as_hub_errors(doing: str, note: str = "") -> Iterator[None]:
    """
    Raise what fails inside as a `HubError` with the remedy.

    Args:
        doing (`str`): What was tried, like "push to user/expert".
        note (`str`, *optional*): What the reader must know besides, like what was made already.
    """
    try:
        yield
    except HubError:
        raise
    except _CAUGHT as error:
        # huggingface_hub raises a plain RuntimeError from the error that broke an upload of LFS
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, Exception) or not isinstance(cause, (*HUB_FAULTS, ValueError)):
            raise
        raise HubError(f"Cannot {doing}: {_reason(cause)}{note}") from error


def _reason(error: Exception) -> str:
    status, said = status_of(error), told(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub."
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token; {LOG_IN}."
    if status is None and is_unreachable(error):
        return f"the Hub cannot be reached, or the connection broke ({said}); try again, nothing is sent twice."
    if status == 401:
        return f"the Hub does not accept the token ({said}); {LOG_IN}."
    if status == 403:
        return f"the token may not do this ({said}); use one with write access, and a repository of your own."
    if status == 404:
        return f"the Hub has no such repository or branch, or does not show it to you ({said}); check its name."
    if status in (409, 412):
        return f"somebody else changed it meanwhile ({said}); try again."
    if status == 429:
        return f"too many requests ({said}); wait some minutes and try again."
    if status is not None and status >= 500:
        return f"the Hub has a fault ({status}, {said}); try again later, nothing is sent twice."
    return f"{said}."
