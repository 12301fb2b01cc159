"""Where something is pushed to, and how; and what came of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from huggingface_hub import CommitInfo, HfApi, get_token

from peft_svf.experts.download import is_hub_id
from peft_svf.experts.errors import HubError
from peft_svf.hub.errors import LOG_IN, as_hub_errors


_GIT_NAME = re.compile(r"(?!.*(\.\.|//|/\.|\./|\.lock$))\w[\w./+-]*(?<![./])", re.ASCII)


@dataclass(frozen=True)
class Destination:
    """
    A repository, and how it is written; the arguments are those of [`~peft_svf.hub.push_expert`].

    Raises:
        HubError: Arguments that contradict one another, or no token.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = field(default=None, repr=False)  # a secret is in no message
    branch: str | None = None
    tag: str | None = None
    commit_message: str | None = None
    commit_description: str | None = None
    create_pr: bool = False
    collection: str | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not is_hub_id(self.repo_id, needs_owner=False):
            raise HubError(f"{self.repo_id!r} is no Hub id; it is USER/NAME, of letters, digits, '-', '_' and '.'.")
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not _GIT_NAME.fullmatch(name):
                raise HubError(f"{name!r} cannot name a {kind}: use letters, digits, '-', '_', '.' and '/'.")
        if self.create_pr and self.tag is not None:
            raise HubError("A pull request cannot be tagged before it is merged; leave out tag=, or create_pr=.")
        if self.token is False or (self.token in (None, True) and get_token() is None):
            raise HubError(f"Cannot push to {self.repo_id}: there is no token; {LOG_IN}.")

    @property
    def api(self) -> HfApi:
        """The Hub's client, with the token."""
        return HfApi(token=self.token)

    @property
    def revision(self) -> str:
        """The branch that is written."""
        return self.branch or "main"

    def with_namespace(self) -> Destination:
        """The same with the user's name in front of a repository's name that has none, as transformers does."""
        if "/" in self.repo_id:
            return self
        with as_hub_errors(f"push to {self.repo_id}"):
            user = self.api.whoami()["name"]
        return replace(self, repo_id=f"{user}/{self.repo_id}")


@dataclass(frozen=True)
class Pushed:
    """
    What a push has done.

    Args:
        url (`str`): The repository's page.
        commit (`str`): The commit that holds what was pushed.
        repo_id (`str`): `"user/name"`.
        unchanged (`bool`, *optional*, defaults to `False`): The Hub had the same files already; nothing was committed.
        pull_request (`str`, *optional*): The page of the pull request that was opened.
    """

    url: str
    commit: str
    repo_id: str
    unchanged: bool = False
    pull_request: str | None = None

    def as_commit_info(self, message: str, description: str | None = None) -> CommitInfo:
        """The same as transformers' `push_to_hub` returns it."""
        return CommitInfo(
            commit_url=f"{self.url}/commit/{self.commit}",
            commit_message=message,
            commit_description=description or "",
            oid=self.commit,
            pr_url=self.pull_request,
        )
