"""Collections: the experts and banks of a family, listed together on the Hub."""

from __future__ import annotations

import re

from huggingface_hub import Collection, HfApi

from peft_svf.hub.errors import as_hub_errors


_SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")


def add_to_collection(
    repo_id: str,
    collection: str,
    *,
    namespace: str | None = None,
    description: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
    note_on_failure: str = "",
) -> str:
    """
    Put a repository into a collection; it is there once, however often this is called.

    Args:
        repo_id (`str`): The repository of an expert or a bank.
        collection (`str`):
            The title of a collection, created if `namespace` has none of it; or the slug of an existing one, like
            `"user/math-experts-64f9a55bb3115b4f513ec026"`.
        namespace (`str`, *optional*): User or organization that owns the collection; by default the repository's.
        description (`str`, *optional*): Of a collection that is created.
        private (`bool`, *optional*, defaults to `False`): Whether a collection that is created is private.
        token (`str`, *optional*): Hub token; by default the one of `hf auth login` or HF_TOKEN.
        note_on_failure (`str`, *optional*): Added to the message of an error.

    Returns:
        `str`: The collection's slug.

    Raises:
        HubError: The Hub refused or was not reached.
    """
    api = HfApi(token=token)
    owner = namespace or repo_id.split("/")[0]
    with as_hub_errors(f"put {repo_id} into the collection '{collection}'", note_on_failure):
        if _SLUG.fullmatch(collection):
            found = api.get_collection(collection)
        else:
            found = _by_title(api, owner, collection) or api.create_collection(
                collection, namespace=owner, description=description, private=private, exists_ok=True
            )
        api.add_collection_item(found.slug, repo_id, "model", exists_ok=True)
    return found.slug


def _by_title(api: HfApi, owner: str, title: str) -> Collection | None:
    return next((found for found in api.list_collections(owner=owner) if found.title == title), None)
