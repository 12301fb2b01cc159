"""Which base model a repository names: the Hub's id and a commit, never a folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.base_commit import cached_commit
from peft_svf.experts.download import is_hub_id
from peft_svf.experts.errors import HubError
from peft_svf.hub.errors import as_hub_errors


_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseReference:
    """
    A base model on the Hub, or, in a bank that holds its base model, the folder of it.

    Args:
        model (`str`): Hub id; `"base"` inside such a bank.
        revision (`str`, *optional*): Its commit.
    """

    model: str
    revision: str | None = None


def find_base(
    given: tuple[str | None, str | None],
    candidates: Sequence[tuple[str | None, str | None]],
    what: str,
    remedy: str,
    api: HfApi,
) -> BaseReference:
    """
    The base model of an expert or a bank, with its commit.

    Args:
        given (`tuple[str | None, str | None]`): Hub id and revision that the user gave.
        candidates (`Sequence[tuple[str | None, str | None]]`):
            Names and revisions under which the base model was loaded or recorded, the most reliable first: Hub ids
            or folders. A folder of the Hub's cache stands for the repository and commit that it holds.
        what (`str`): The expert or bank, for messages.
        remedy (`str`): What can be done if no candidate is on the Hub.
        api (`HfApi`): Asked for the commit where only the id is known.

    Raises:
        HubError: The base model is no repository on the Hub, or has no such revision.
    """
    model, revision = given
    if model is not None:
        if not is_hub_id(model, needs_owner=False):
            raise HubError(f"base_model={model!r} is no Hub id such as 'user/base'; {remedy}")
        return _pinned(model, revision, what, remedy, api)
    for name, recorded in candidates:
        found = on_hub(name, recorded)
        if found is not None:
            commit = revision or found.revision or cached_commit(found.model)
            return _pinned(found.model, commit, what, remedy, api)
    names = " and ".join(dict.fromkeys(f"'{name}'" for name, _ in candidates if name))
    raise HubError(
        f"The base model of {what} is {f'the local folder {names}' if names else 'not known'}, which means nothing to "
        f"others; {remedy}"
    )


def on_hub(name: str | None, revision: str | None = None) -> BaseReference | None:
    """What a Hub id or a folder in the Hub's cache refers to; `None` for any other folder."""
    if not name:
        return None
    path = Path(name)
    cached = path.parent.parent.name.split("--")
    if path.parent.name == "snapshots" and cached[0] == "models" and _COMMIT.fullmatch(path.name):
        return BaseReference("/".join(cached[1:]), path.name)
    if name == BASE_FOLDER or not is_hub_id(name, needs_owner=False) or path.exists():
        return None
    return BaseReference(name, revision)


def _pinned(model: str, revision: str | None, what: str, remedy: str, api: HfApi) -> BaseReference:
    """With the commit that a branch or tag, or else the main branch, has now."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return BaseReference(model, revision)
    with as_hub_errors(f"find the base model {model} of {what}"):
        try:
            info = api.model_info(model, revision=revision)
        except RevisionNotFoundError as error:
            raise HubError(f"The base model {model} has no revision '{revision}'; give its commit.") from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"The base model of {what} is called '{model}', and the Hub has none of that name (or does not show "
                f"it to you); {remedy}"
            ) from error
    _check_base({file.rfilename for file in info.siblings or ()}, model, what)
    return BaseReference(model, info.sha)


def _check_base(files: set[str], model: str, what: str) -> None:
    """Refuse a repository of experts, onto which no expert can be loaded."""
    if f"{BASE_FOLDER}/config.json" in files:
        raise HubError(
            f"{model} is a bank, which holds its base model in a folder, and the base model of {what} must have a "
            "repository of its own; push the base model there (its push_to_hub), and give that id."
        )
    is_adapter = "adapter_config.json" in files and "config.json" not in files
    if is_adapter or "modeling_transformer2.py" in files:
        raise HubError(f"{model} holds experts, and is no base model; give the id of the base model of {what}.")
