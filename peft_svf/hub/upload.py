"""A staged folder becomes one commit on the Hub, or nothing does."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

from peft_svf.experts.download import is_unreachable
from peft_svf.experts.errors import HubError
from peft_svf.hub.collection import add_to_collection
from peft_svf.hub.destination import Destination, Pushed
from peft_svf.hub.errors import HUB_FAULTS, as_hub_errors
from peft_svf.hub.remote import Remote, read_remote
from peft_svf.hub_cards.card_files import CARD


_UNREADABLE: tuple[type[Exception], ...] = (HubError, *HUB_FAULTS)


def upload(folder: Path, destination: Destination, kind: str, before: Remote) -> Pushed:
    """
    Make a repository hold what is in `folder`, and of a former push nothing else; files of its owner stay.

    Args:
        folder (`Path`): Everything that shall be on the Hub, as it shall be there.
        destination ([`Destination`]): Where.
        kind (`str`): `EXPERT` or `BANK`; a repository that holds another kind is refused.
        before ([`~peft_svf.hub.remote.Remote`]): The repository as it was found; if it has changed since, the push
            is refused.

    Returns:
        [`Pushed`]: The commit; if the Hub has the same files already, that of these, and none is made.

    Raises:
        HubError: The Hub refused or was not reached. The repository holds what it held before, unless the message
            says that the commit is there.
    """
    doing = f"push to {destination.repo_id}"
    staged = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with as_hub_errors(doing):
        _check_free(before, destination, kind)
        if not before.exists:
            destination.api.create_repo(destination.repo_id, private=destination.private, exist_ok=True)
    with as_hub_errors(doing, "" if before.exists else _created(destination)):
        if not before.exists:
            before = read_remote(destination)
        if not before.has_branch:
            destination.api.create_branch(destination.repo_id, branch=destination.revision, exist_ok=True)
        pushed = _commit(staged, before, destination, kind)
    _name(pushed, before, destination)
    return pushed


def _check_free(remote: Remote, destination: Destination, kind: str) -> None:
    """Refuse to put an expert in the place of a bank, and the reverse, to move a tag, and to show what is private."""
    if remote.exists and destination.private and not destination.api.model_info(destination.repo_id).private:
        raise HubError(
            f"{destination.repo_id} is public, and what you push is to be private; make the repository private on the "
            "Hub, or choose another one."
        )
    if remote.kind not in (None, kind):
        raise HubError(
            f"{destination.repo_id} holds {remote.kind}, and {kind} would take its place; choose another repository, "
            "or delete that one on the Hub first."
        )
    tagged = remote.tags.get(destination.tag or "")
    if tagged is not None and tagged != remote.head:
        raise HubError(
            f"{destination.repo_id} has a tag '{destination.tag}' already, on commit {tagged[:7]}; choose another "
            "name, or delete the tag on the Hub."
        )


def _commit(staged: dict[str, Path], before: Remote, destination: Destination, kind: str) -> Pushed:
    changed, left_over = before.changed(staged), before.left_over(staged, kind)
    assert before.head is not None
    url = f"{destination.api.endpoint}/{destination.repo_id}"
    if not changed and not left_over:
        return Pushed(url, before.head, destination.repo_id, unchanged=True)
    if before.tags.get(destination.tag or "") is not None:
        raise HubError(
            f"{destination.repo_id} has a tag '{destination.tag}' already, for other files than these; choose another "
            "name, or delete the tag on the Hub."
        )
    try:
        made = _send(changed, left_over, before, destination, kind)
    except HUB_FAULTS as error:
        arrived = _arrived(staged, before, destination, kind) if is_unreachable(error) else None
        if arrived is None:
            raise
        return Pushed(url, arrived, destination.repo_id)
    return Pushed(url, made.oid, destination.repo_id, pull_request=made.pr_url)


def _send(
    changed: dict[str, Path], left_over: list[str], before: Remote, destination: Destination, kind: str
) -> CommitInfo:
    paths = sorted(changed, key=lambda path: (path == CARD, path))  # the card last
    # not upload_folder, which may spread a folder over several commits
    return destination.api.create_commit(
        destination.repo_id,
        [
            *(CommitOperationDelete(path, is_folder=False) for path in left_over),
            *(CommitOperationAdd(path, changed[path]) for path in paths),
        ],
        commit_message=destination.commit_message or f"Push {kind} with peft-svf",
        commit_description=destination.commit_description,
        revision=destination.branch,
        create_pr=destination.create_pr,
        parent_commit=None if destination.create_pr else before.head,
    )


def _arrived(staged: dict[str, Path], before: Remote, destination: Destination, kind: str) -> str | None:
    """The commit, if the Hub made it although its answer did not come."""
    if destination.create_pr:
        return None
    try:
        now = read_remote(destination)
    except _UNREADABLE:
        return None
    is_there = now.head != before.head and not now.changed(staged) and not now.left_over(staged, kind)
    return now.head if is_there else None


def _name(pushed: Pushed, before: Remote, destination: Destination) -> None:
    """Tag the commit and put the repository into a collection."""
    done = f" The commit {pushed.commit[:7]} is in {destination.repo_id}; push again for the rest."
    with as_hub_errors(f"tag {destination.repo_id}", done):
        if destination.tag is not None and destination.tag not in before.tags:
            destination.api.create_tag(destination.repo_id, tag=destination.tag, revision=pushed.commit)
    if destination.collection is not None:
        add_to_collection(
            destination.repo_id,
            destination.collection,
            private=bool(destination.private),
            token=destination.token,
            note_on_failure=done,
        )


def _created(destination: Destination) -> str:
    return f" The repository {destination.repo_id} was created for this and is empty; push again, or delete it."
