"""Download: files of one commit on the Hub, checked before they are fetched, in the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects, validate_repo_id  # type: ignore[attr-defined]

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.errors import HubError
from peft_svf.experts.files import replace_file


# What nobody needs is refused before it is downloaded; a folder that was downloaded by hand has no limits.
LARGEST_WEIGHTS = 2 * 2**30  # bytes; all offsets of the largest open models (DeepSeek-V3, 671B) take 0.4 GB
LARGEST_OTHER = 128 * 2**20  # of configurations, texts and tokenizers, the largest of which have 35 MB
LARGEST_TOTAL = 32 * 2**30  # of a bank without its base model
MOST_FILES = 10_000

LOG_IN = "set HF_TOKEN, or log in with `hf auth login`"
_MAIN = constants.DEFAULT_REVISION
# Of whichever HTTP library this version of huggingface_hub is built on; connection errors are among them
HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_ERRORS = (HTTP_ERROR, OSError, ValueError)


@dataclass(frozen=True)
class Download:
    """
    Files of one commit.

    Args:
        folder (`Path`): Where they lie, in the Hub's cache; shared by everybody who uses the cache, so never written.
        commit (`str`): 40 hexadecimal digits.
        repo_id (`str`): Like "user/bank".
        files (`tuple[str, ...]`, *optional*): All that the commit has, downloaded or not; empty if that is not known.
    """

    folder: Path
    commit: str
    repo_id: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Listing:
    """A commit and the sizes of its files in bytes."""

    commit: str
    sizes: Mapping[str, int]


def is_hub_id(folder_or_id: str | Path, needs_owner: bool = True) -> bool:
    """Whether it can be a repository, "user/name"; old base models like "gpt2" have no owner."""
    if not isinstance(folder_or_id, str) or (needs_owner and folder_or_id.count("/") != 1):
        return False
    try:
        validate_repo_id(folder_or_id)
    except HFValidationError:
        return False
    return True


def download(repo_id: str, revision: str | None, token: str | None, patterns: list[str], what: str) -> Download:
    """
    The files of one commit that match `patterns`.

    The revision is resolved once, and everything comes from that commit. A commit that is in the cache is taken from
    there without a request, and any revision if HF_HUB_OFFLINE is set or the Hub cannot be reached. What a branch or
    tag means offline changes only when a download is complete.

    Args:
        repo_id (`str`): Like "user/bank".
        revision (`str`, *optional*, defaults to the main branch): Branch, tag or commit.
        token (`str`, *optional*): Hub token; by default the one of `hf auth login` or HF_TOKEN.
        patterns (`list[str]`): As of `snapshot_download`; `*` matches slashes too.
        what (`str`): What is looked for, for messages, like "a bank".

    Raises:
        HubError: There is no such repository or revision, no access to it, no connection and nothing in the cache; or
            the commit has files with paths that lead out of it, or ones that are larger than any expert's.
    """
    revision = _MAIN if revision is None else str(getattr(revision, "resolved", revision))
    if _is_commit(revision) and (found := _cached_commit(repo_id, revision, patterns)) is not None:
        return found
    try:
        listing = _ask(repo_id, revision, token)
    except _ERRORS as error:
        if not is_unreachable(error):
            raise hub_error(error, repo_id, revision, what) from error
        return _from_cache(repo_id, revision, patterns, error)
    _check_listing(listing, patterns, f"{repo_id} at {listing.commit[:7]}", what)
    try:
        folder = Path(
            snapshot_download(repo_id, revision=listing.commit, token=token or None, allow_patterns=patterns)
        )
    except _ERRORS as error:
        raise _broken_off(error, repo_id, revision, what) from error
    _check_links(folder, repo_id)
    remember(repo_id, revision, listing.commit)
    return Download(folder, listing.commit, repo_id, tuple(listing.sizes))


def resolve(
    repo_id: str, revision: str | None, token: str | None, what: str, cache_dir: str | None = None
) -> tuple[str | None, bool]:
    """
    The commit of a repository, and whether the Hub could be asked for it.

    transformers and PEFT try each of their many requests for 23 seconds before they look into the cache, so where the
    Hub cannot be reached, they are told to look there only.

    Returns:
        `tuple[str | None, bool]`: The commit, from the cache if the Hub cannot be reached, `None` if it is not there.

    Raises:
        HubError: The Hub answers that there is no such repository or revision, or no access to it.
    """
    revision = revision or _MAIN
    known = _reference(repo_id, revision, cache_dir)
    if known is None:
        raise HubError(f"Cannot load {what} from {repo_id}: {revision!r} is no branch, tag or commit.")
    try:
        return _ask(repo_id, revision, token).commit, True
    except _ERRORS as error:
        if not is_unreachable(error):
            raise hub_error(error, repo_id, revision, what) from error
    return (revision if _is_commit(revision) else known.read_text("utf-8") if known.is_file() else None), False


def is_unreachable(error: BaseException) -> bool:
    """Whether an error says nothing of a repository: offline, no connection, or a fault of the Hub."""
    if isinstance(error, HfHubHTTPError):
        status = status_of(error)
        return status is not None and (status >= 500 or status == 429)
    return isinstance(error, OfflineModeIsEnabled | HTTP_ERROR | ConnectionError | TimeoutError)


def hub_error(error: BaseException, repo_id: str, revision: str, what: str) -> HubError:
    """What an error of huggingface_hub means for somebody who loads `what`, and what to do about it."""
    asked, address = f"Cannot load {what} from {repo_id}", f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return HubError(f"{asked}: it is gated. Accept its terms at {address}, and {LOG_IN} with that account.")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{asked}: there is no such folder here, and the Hub ({constants.ENDPOINT}) has no such repository or "
            f"does not show it to you. Check the name; if it is private, {LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{asked}: it has no branch, tag or commit '{revision}'; see {address}/commits/main.")
    if isinstance(error, HFValidationError):
        return HubError(f"{asked}: that is no id on the Hub, which is USER/NAME of letters, digits, '-', '_' and '.'.")
    status = status_of(error)
    if status == 401:
        return HubError(
            f"{asked}: the Hub does not know the token. It may be mistyped or expired: {LOG_IN}; public repositories "
            "need none."
        )
    if status == 403:
        return HubError(f"{asked}: the token may not read it ({_told(error)}). With another one, {LOG_IN}.")
    return HubError(f"{asked}: {_told(error)}.")


def _api() -> HfApi:
    return HfApi()  # not kept: it takes its address from the environment


def _ask(repo_id: str, revision: str, token: str | None) -> _Listing:
    # The only request that is tried once and with a limit of time: it finds out whether there is a Hub
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = _api().model_info(repo_id, revision=revision, files_metadata=True, token=token, timeout=timeout)
    if info.sha is None:
        raise ValueError(f"{constants.ENDPOINT} does not answer as a Hub does")
    return _Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def _cached_commit(repo_id: str, commit: str, patterns: list[str]) -> Download | None:
    """A commit in the cache if all of its files that match are there, which its list of files tells."""
    cached_tree: Any = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if cached_tree is None:  # before 2.0 nothing tells half a commit from a whole one
        return None
    try:
        names = tuple(entry.path for entry in cached_tree(repo_id, revision=commit))
        folder = snapshot_download(repo_id, revision=commit, allow_patterns=patterns, local_files_only=True)
    except Exception as error:
        if isinstance(error, LocalEntryNotFoundError) or type(error).__name__ == "CachedRepoTreeNotFoundError":
            return None
        raise
    _check_links(Path(folder), repo_id)
    return Download(Path(folder), commit, repo_id, names)


def _from_cache(repo_id: str, revision: str, patterns: list[str], error: Exception) -> Download:
    """What the cache has of a revision, now that the Hub cannot be asked."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as missing:
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = (
            "HF_HUB_OFFLINE is set"
            if offline
            else f"The Hub ({constants.ENDPOINT}) cannot be reached now ({_told(error)})"
        )
        remedy = "Load it once without HF_HUB_OFFLINE" if offline else "Try again later"
        raise HubError(
            f"{reason}, and the cache ({constants.HF_HUB_CACHE}) does not have {repo_id} at '{revision}', or not all "
            f"of it. {remedy}, or pass the folder of a copy."
        ) from missing
    _check_links(folder, repo_id)
    return Download(folder, folder.name, repo_id)


def _check_listing(listing: _Listing, patterns: list[str], where: str, what: str) -> None:
    """Refuse what would be written outside of the cache's folder for the commit, or is too large to be `what`."""
    for path in listing.sizes:
        if not _stays_inside(path):
            raise HubError(
                f"{where} has a file {path!r}, which would be written outside of its folder: do not use it."
            )
    wanted: list[str] = list(filter_repo_objects(listing.sizes, allow_patterns=patterns))
    if len(wanted) > MOST_FILES:
        raise HubError(f"{where} has {len(wanted):,} files to download, more than {what} has: at most {MOST_FILES:,}.")
    by_hand = f"If it is what you want, `hf download {where.split()[0]} --local-dir FOLDER` and pass that folder."
    for path in wanted:
        largest = LARGEST_WEIGHTS if path.endswith(".safetensors") else LARGEST_OTHER
        if not _is_base(path) and listing.sizes[path] > largest:
            raise HubError(
                f"{where}: {path} has {listing.sizes[path]:,} bytes, more than {what} needs (at most {largest:,}). "
                f"{by_hand}"
            )
    total = sum(listing.sizes[path] for path in wanted if not _is_base(path))
    if total > LARGEST_TOTAL:
        raise HubError(f"{where} has {total:,} bytes, more than {what} needs (at most {LARGEST_TOTAL:,}). {by_hand}")


def _stays_inside(path: str) -> bool:
    """Whether a path in a repository is one below its folder, on any system."""
    parts = PurePosixPath(path).parts
    return path.isprintable() and not (path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0])


def _is_base(path: str) -> bool:
    """Whether it is weights of the base model in a bank, which may be as large as models are."""
    return path.startswith(f"{BASE_FOLDER}/") and path.endswith(".safetensors")


def _check_links(folder: Path, repo_id: str) -> None:
    """The cache's own links lead to blobs beside the commit; any other way out of it was made by somebody else."""
    storage = folder.parents[1].resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(storage):
            raise HubError(
                f"In the cache of {repo_id}, {path} leads out of it, to {path.resolve()}: delete {storage} and load "
                "it again."
            )


def _broken_off(error: Exception, repo_id: str, revision: str, what: str) -> HubError:
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError) and not is_unreachable(cause):
        return hub_error(cause, repo_id, revision, what)
    return HubError(
        f"The download of {repo_id} broke off ({_told(cause)}). Try again: what has arrived is kept, and nothing "
        "incomplete is used."
    )


def remember(repo_id: str, revision: str | None, commit: str, cache_dir: str | None = None) -> None:
    """Let a branch or tag mean this commit where the Hub cannot be asked."""
    revision = revision or _MAIN
    if _is_commit(revision):
        return
    path = _reference(repo_id, revision, cache_dir)
    if path is None:
        return
    try:
        if not path.is_file() or path.read_text("utf-8") != commit:
            replace_file(path, lambda partial: partial.write_text(commit, "utf-8"))
    except OSError:
        pass  # a cache that is only read: online nothing is lost by it


def _reference(repo_id: str, revision: str, cache_dir: str | None) -> Path | None:
    """The file in the Hub's cache that holds the commit of a branch or tag; `None` for a name that leads elsewhere."""
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    references = Path(cache_dir or constants.HF_HUB_CACHE, name, "refs").expanduser().resolve()
    path = references / revision
    return path if path.resolve().is_relative_to(references) else None


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def status_of(error: BaseException) -> int | None:
    """HTTP status of the Hub's answer; `None` if there was none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def told(error: BaseException) -> str:
    """What the server or the library says, on one line."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300].rstrip(".")


def _told(error: BaseException) -> str:
    status = status_of(error)
    return told(error) if status is None else f"{status}, {told(error)}"


def matching(names: Iterable[str], ending: str) -> list[str]:
    """The folders, of one level, that have a file of this name: experts of a bank."""
    found = [name.split("/") for name in names]
    return sorted(parts[0] for parts in found if len(parts) == 2 and parts[1] == ending)
