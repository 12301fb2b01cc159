"""The commit of the Hub that a base model was loaded from, which transformers does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from peft_svf.experts.download import is_hub_id


def base_commit(config: Any) -> str | None:
    """
    The commit that a model was loaded from; `None` if it came from a folder, or if the cache does not tell.

    Args:
        config (`PreTrainedConfig`): Of the model; `_commit_hash`, where this version of transformers keeps it, wins.
    """
    commit = getattr(config, "_commit_hash", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if commit is not None or not name or Path(name).exists() or not is_hub_id(name, needs_owner=False):
        return commit
    return cached_commit(name)


def cached_commit(model: str) -> str | None:
    """
    The commit of a base model in the Hub's cache.

    The only one in the cache that has weights; or, of several, the one that the main branch was when last asked for.
    """
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
    commits = {path.parent.name for path in storage.glob("snapshots/*/*") if path.suffix in (".safetensors", ".bin")}
    main = storage / "refs" / "main"
    if len(commits) > 1 and main.is_file():
        commits &= {main.read_text("utf-8").strip()}
    return commits.pop() if len(commits) == 1 else None
