"""`model.push_to_hub` of a PeftModel with SVF adapters: the repository that `push_expert` makes."""

from __future__ import annotations

from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel

from peft_svf.hub.destination import Destination
from peft_svf.hub.push import push_bank, push_experts


DEFAULT_MESSAGE = "Upload model"


def push_model(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """
    Push the adapters of a model; arguments and result are those of transformers' `push_to_hub`.

    The active adapter lies at the root of the repository, as `PeftModel.from_pretrained(base, repo_id)` looks for it,
    and every other adapter in a folder of its name (`subfolder=`). The model of a bank is pushed as the bank.

    Args:
        max_shard_size (`int` or `str`, *optional*): Not used; an expert is one small file.

    Raises:
        HubError, ExpertError: See [`~peft_svf.hub.push_expert`].
    """
    message = commit_message or DEFAULT_MESSAGE
    options: dict[str, Any] = {
        "private": private,
        "token": token,
        "branch": revision,
        "commit_message": message,
        "commit_description": commit_description,
        "create_pr": create_pr,
        "tags": tuple(tags or ()),
    }
    bank = getattr(model, "expert_bank", None)
    if bank is not None:
        pushed = push_bank(bank, repo_id, **options)
    else:
        destination = Destination(repo_id, **options).with_namespace()
        active = model.active_adapter
        others = [name for name in model.peft_config if name != active]
        pushed = push_experts({"": (model, active), **{name: (model, name) for name in others}}, destination)
    return pushed.as_commit_info(message, commit_description)
